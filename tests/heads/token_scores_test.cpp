// SPDX-License-Identifier: MIT
#include "headwise/heads/token_scores.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "support/errors.hpp"

namespace headwise {
namespace {

using Order = std::vector<std::int32_t>;

TEST(Protection, CoversFirstAndLastPositionsOfTheSequence) {
  const Protection protection{2, 3};
  for (std::int64_t pos = 0; pos < 10; ++pos) {
    EXPECT_EQ(protection.covers(pos, 10), pos < 2 || pos >= 7);
    EXPECT_TRUE(protection.covers(pos, 5) || pos >= 5);
  }
  EXPECT_FALSE(Protection{}.covers(0, 1));
}

TEST(TokenScores, OrderIsByScoreThenTieScoreThenLowerPosition) {
  TokenScores scores(6);
  const auto out = scores.add_head();
  std::ranges::copy(std::vector<float>{1, 3, 2, 3, 2, 2}, out.begin());
  EXPECT_EQ(scores.order(0, {}), (Order{1, 3, 2, 4, 5, 0}));
  scores.set_tie_scores(std::vector<float>{0, 0, 1, 5, 7, 7});
  EXPECT_EQ(scores.order(0, {}), (Order{3, 1, 4, 5, 2, 0}));
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  scores.set_tie_scores(std::vector<float>{0, kNan, 1, 5, kNan, 7});
  EXPECT_EQ(scores.order(0, {}), (Order{3, 1, 5, 2, 4, 0}));
}

TEST(TokenScores, ProtectedTokensComeFirstNewestFirstWhateverTheyScore) {
  TokenScores scores(6);
  const auto out = scores.add_head();
  std::ranges::copy(std::vector<float>{-9, 3, 2, 3, -7, std::numeric_limits<float>::quiet_NaN()},
                    out.begin());
  EXPECT_EQ(scores.order(0, {1, 2}), (Order{5, 4, 0, 1, 3, 2}));
  EXPECT_EQ(scores.num_protected(0, {1, 2}), 3);
}

TEST(TokenScores, NaNAndInfinitiesComeLast) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  TokenScores scores(6);
  const auto out = scores.add_head();
  std::ranges::copy(std::vector<float>{kInf, -3.0e38F, kNan, 0.0F, -kInf, -kNan}, out.begin());
  EXPECT_EQ(scores.order(0, {}), (Order{3, 1, 0, 2, 4, 5}));
}

TEST(TokenScores, HeadsMayHaveStoredUnlikeTokens) {
  TokenScores scores(10);
  const std::vector<std::int32_t> stored{0, 4, 8, 9};
  std::ranges::copy(std::vector<float>{1, 2, 3, 4}, scores.add_head(stored).begin());
  (void)scores.add_head({});
  (void)scores.add_head();
  ASSERT_EQ(scores.num_heads(), 3);
  EXPECT_EQ(scores.num_tokens(0), 4);
  EXPECT_EQ(scores.num_tokens(1), 0);
  EXPECT_EQ(scores.num_tokens(2), 10);
  EXPECT_EQ(scores.positions(0)[2], 8);
  EXPECT_EQ(scores.scores(0)[2], 3.0F);
  // Positions count, not rows: of the last three, two are stored.
  EXPECT_EQ(scores.num_protected(0, {1, 3}), 3);
  EXPECT_EQ(scores.num_protected(1, {1, 3}), 0);
  EXPECT_EQ(scores.num_protected(2, {1, 3}), 4);
}

TEST(TokenScores, RefusesPositionsThatDoNotAscendOrLieOutside) {
  using testing::message_of;
  TokenScores scores(5);
  for (const Order& wrong : {Order{1, 1}, Order{2, 1}, Order{-1}, Order{5}}) {
    EXPECT_THROW((void)scores.add_head(wrong), ConfigError);
    EXPECT_EQ(scores.num_heads(), 0);
  }
  EXPECT_EQ(message_of<ConfigError>([&] {
              (void)scores.add_head(Order{3, 2});
            }),
            "KV head 0: position 2 after 3 must lie above it and below 5");
  EXPECT_EQ(message_of<ConfigError>([&] { scores.set_tie_scores(std::vector<float>{1}); }),
            "1 tie scores for a head of 0 tokens");
  EXPECT_THROW((void)TokenScores(-1), ConfigError);
  EXPECT_THROW((void)TokenScores(std::int64_t{1} << 31), ConfigError);
}

}  // namespace
}  // namespace headwise
