// SPDX-License-Identifier: MIT
#include "headwise/policies/knorm.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "headwise/heads/select_tokens.hpp"
#include "support/selection_goldens.hpp"

namespace headwise {
namespace {

using test::GoldenLayer;
using test::KeptLists;

TEST(Knorm, ScoresAndKeepsAsKvpress) {
  const GoldenLayer layer;
  TokenScores scores(32);
  for (int h = 0; h < 2; ++h) knorm::add_head(layer.keys(h), layer.positions, scores);
  EXPECT_NEAR(scores.scores(0)[0], -3.336587, 1e-6);
  test::expect_scores("knorm", scores);
  EXPECT_EQ(test::lists_of(select_tokens(scores, {}, uniform_counts(scores, 16))),
            (KeptLists{{1, 2, 5, 10, 15, 16, 17, 19, 20, 21, 22, 23, 24, 27, 29, 31},
                       {2, 3, 4, 5, 6, 7, 12, 15, 17, 18, 19, 21, 23, 25, 28, 31}}));
}

/// DMS: a threshold instead of a count, a token judged when it leaves the last 8.
TEST(Knorm, KeepsAboveAThresholdAsKvpress) {
  const GoldenLayer layer;
  std::vector<std::int32_t> stored[2];
  for (std::int32_t length = 24; length <= 28; ++length) {
    for (int h = 0; h < 2; ++h) {
      auto& of_head = stored[h];
      for (std::int32_t pos = of_head.empty() ? 0 : length - 1; pos < length; ++pos) {
        of_head.push_back(pos);
      }
      std::vector<float> rows;
      for (const std::int32_t pos : of_head) {
        rows.insert(rows.end(), layer.keys(h).row(pos), layer.keys(h).row(pos) + 8);
      }
      TokenScores scores(length);
      knorm::add_head(RowView::dense(rows.data(), std::ssize(of_head), 8), of_head, scores);
      KeptPositions kept;
      select_above(scores, {0, 8}, -3.395F, kept);
      of_head.assign(kept.of_head(0).begin(), kept.of_head(0).end());
    }
    if (length == 24) {
      EXPECT_EQ(stored[0], (std::vector<std::int32_t>{0, 1, 2, 5, 10, 12, 13, 15, 16, 17, 18, 19,
                                                      20, 21, 22, 23}));
    }
  }
  EXPECT_EQ(stored[1], (std::vector<std::int32_t>{2,  3,  4,  5,  6,  7,  11, 12, 13, 15, 17,
                                                  18, 19, 20, 21, 22, 23, 24, 25, 26, 27}));
}

TEST(Knorm, KeysThatAreNotFiniteGoFirst) {
  std::vector<float> rows(3 * 8, 1.0F);
  rows[0] = std::numeric_limits<float>::quiet_NaN();
  rows[8] = std::numeric_limits<float>::infinity();
  TokenScores scores(3);
  const std::vector<std::int32_t> stored{0, 1, 2};
  knorm::add_head(RowView::dense(rows.data(), 3, 8), stored, scores);
  EXPECT_EQ(scores.order(0, {}).front(), 2);
}

}  // namespace
}  // namespace headwise
