// SPDX-License-Identifier: MIT
#include "headwise/attention/query_moments.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "support/errors.hpp"

namespace headwise {
namespace {

TEST(QueryMoments, AreMeanAndCovarianceHoweverAPromptIsCut) {
  const std::vector<float> rows{1, 2, 3, 5, -1, 0, 4, 4};
  QueryMoments whole(2);
  whole.add(RowView::dense(rows.data(), 4, 2));
  QueryMoments cut(2);
  cut.add(RowView::dense(rows.data(), 1, 2));
  cut.add(RowView::dense(rows.data() + 2, 3, 2));
  for (const QueryMoments& moments : {whole, cut}) {
    EXPECT_EQ(moments.count(), 4);
    EXPECT_EQ(moments.mean(), (std::vector<double>{1.75, 2.75}));
    const std::vector<double> covariance = moments.covariance();
    EXPECT_DOUBLE_EQ(covariance[0], 27.0 / 4 - 1.75 * 1.75);
    EXPECT_DOUBLE_EQ(covariance[1], 33.0 / 4 - 1.75 * 2.75);
    EXPECT_DOUBLE_EQ(covariance[2], covariance[1]);
    EXPECT_DOUBLE_EQ(covariance[3], 45.0 / 4 - 2.75 * 2.75);
  }
}

TEST(QueryMoments, MayComeFromACalibration) {
  const std::vector<double> mean{0.5, -2.0};
  const std::vector<double> covariance{4.0, 1.0, 1.0, 2.0};
  const QueryMoments moments(mean, covariance);
  EXPECT_EQ(moments.mean(), mean);
  for (std::size_t i = 0; i < 4; ++i) EXPECT_DOUBLE_EQ(moments.covariance()[i], covariance[i]);
  EXPECT_EQ(testing::message_of<ConfigError>([&] { QueryMoments(mean, mean); }),
            "a covariance of 2 numbers beside a mean of 2");
}

TEST(QueryMoments, OfNothingAreZero) {
  const QueryMoments moments(3);
  EXPECT_EQ(moments.mean(), std::vector<double>(3, 0.0));
  EXPECT_EQ(moments.covariance(), std::vector<double>(9, 0.0));
  EXPECT_EQ(QueryMoments::bytes(128), (128 + 128 * 128) * sizeof(double));
  EXPECT_THROW(QueryMoments(0), ConfigError);
  QueryMoments other(2);
  const std::vector<float> row(3);
  EXPECT_THROW(other.add(RowView::dense(row.data(), 1, 3)), ConfigError);
}

}  // namespace
}  // namespace headwise
