// SPDX-License-Identifier: MIT
#include "headwise/policies/q_filter.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "headwise/heads/select_tokens.hpp"
#include "support/errors.hpp"
#include "support/selection_goldens.hpp"

namespace headwise {
namespace {

TEST(QFilter, ScoresAndKeepsAsKvpress) {
  const test::GoldenLayer layer;
  TokenScores scores(32);
  for (std::uint32_t h = 0; h < 2; ++h) {
    std::vector<float> filter;
    for (std::uint32_t j = 0; j < 8; ++j) filter.push_back(test::golden_value(5, h, 0, j));
    q_filter::add_head(filter, layer.keys(static_cast<int>(h)), layer.positions, scores);
  }
  EXPECT_NEAR(scores.scores(0)[0], 6.632324, 1e-6);
  test::expect_scores("qfilter", scores);
  EXPECT_EQ(test::lists_of(select_tokens(scores, {}, uniform_counts(scores, 16)))[0],
            (std::vector<std::int32_t>{0, 1, 3, 4, 6, 8, 11, 13, 15, 21, 22, 24, 25, 27, 28, 30}));
  EXPECT_EQ(testing::message_of<ConfigError>([&] {
              q_filter::add_head(std::vector<float>(4), layer.keys(0), layer.positions, scores);
            }),
            "a filter of width 4 over keys of width 8");
}

}  // namespace
}  // namespace headwise
