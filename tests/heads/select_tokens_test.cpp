// SPDX-License-Identifier: MIT
#include "headwise/heads/select_tokens.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <random>
#include <set>
#include <vector>

#include "support/errors.hpp"

namespace headwise {
namespace {

using List = std::vector<std::int32_t>;

List list_of(const KeptPositions& kept, std::int64_t head) {
  const auto positions = kept.of_head(head);
  return {positions.begin(), positions.end()};
}

TEST(SelectTokens, KeepsTheBestAscending) {
  TokenScores scores(6);
  std::ranges::copy(std::vector<float>{1, 6, 2, 5, 3, 4}, scores.add_head().begin());
  const List stored{0, 3, 4, 5};
  std::ranges::copy(std::vector<float>{9, 1, 8, 2}, scores.add_head(stored).begin());
  const KeptPositions kept = select_tokens(scores, {}, KeepCounts{3, 2});
  EXPECT_EQ(list_of(kept, 0), (List{1, 3, 5}));
  EXPECT_EQ(list_of(kept, 1), (List{0, 4}));
  EXPECT_EQ(list_of(select_tokens(scores, {}, KeepCounts{0, 9}), 0), List{});
  EXPECT_EQ(list_of(select_tokens(scores, {}, KeepCounts{0, 9}), 1), stored);
}

TEST(SelectTokens, ProtectedTokensStayWhateverTheyScore) {
  TokenScores scores(8);
  std::ranges::copy(std::vector<float>{-9, 6, 2, 5, 3, 4, -8, -7}, scores.add_head().begin());
  EXPECT_EQ(list_of(select_tokens(scores, {1, 2}, KeepCounts{5}), 0), (List{0, 1, 3, 6, 7}));
  EXPECT_EQ(list_of(select_tokens(scores, {1, 2}, KeepCounts{3}), 0), (List{0, 6, 7}));
  // StreamingLLM needs no scores.
  EXPECT_EQ(list_of(select_tokens(scores, {2, 3}, KeepCounts{5}), 0), (List{0, 1, 5, 6, 7}));
}

TEST(SelectTokens, KeepsTheSetsOfTheStreamingScorer) {
  TokenScores scores(32);
  (void)scores.add_head();
  List expected{0, 1, 2, 3};
  for (std::int32_t j = 20; j < 32; ++j) expected.push_back(j);
  EXPECT_EQ(list_of(select_tokens(scores, {4, 12}, uniform_counts(scores, 16)), 0), expected);
}

TEST(SelectTokens, LargerCountsKeepSupersets) {
  std::mt19937 random(7);
  TokenScores scores(60);
  for (float& x : scores.add_head()) x = static_cast<float>(random() % 9);  // many ties
  List last;
  for (std::int64_t count = 5; count <= 60; ++count) {
    const List now = list_of(select_tokens(scores, {2, 3}, KeepCounts{count}), 0);
    EXPECT_EQ(std::ssize(now), count);
    EXPECT_TRUE(std::ranges::is_sorted(now));
    EXPECT_TRUE(std::ranges::includes(now, last));
    last = now;
  }
}

TEST(SelectTokens, NaNAndInfinitiesGoFirst) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  TokenScores scores(5);
  std::ranges::copy(
      std::vector<float>{kInf, 1.0F, std::numeric_limits<float>::quiet_NaN(), 2.0F, -kInf},
      scores.add_head().begin());
  EXPECT_EQ(list_of(select_tokens(scores, {}, KeepCounts{2}), 0), (List{1, 3}));
  EXPECT_EQ(list_of(select_tokens(scores, {0, 1}, KeepCounts{2}), 0), (List{3, 4}));
}

TEST(SelectTokens, RefusesCountsBelowTheProtectedSetAndAppendsNothing) {
  using testing::message_of;
  TokenScores scores(9);
  (void)scores.add_head();
  (void)scores.add_head();
  KeptPositions kept;
  EXPECT_EQ(message_of<ConfigError>([&] {
              select_tokens(scores, {1, 4}, KeepCounts{5, 4}, kept);
            }),
            "KV head 1: 4 tokens are to be kept, but 5 are protected");
  EXPECT_EQ(message_of<ConfigError>([&] { select_tokens(scores, {}, KeepCounts{5}, kept); }),
            "1 counts for 2 KV heads");
  EXPECT_EQ(kept.num_heads(), 0);
  // All that there is may be less than what would be protected.
  TokenScores few(3);
  (void)few.add_head();
  EXPECT_EQ(list_of(select_tokens(few, {4, 4}, uniform_counts(few, 10)), 0), (List{0, 1, 2}));
}

TEST(SelectAbove, KeepsWhatScoresEnoughAndIsProtected) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  TokenScores scores(7);
  std::ranges::copy(std::vector<float>{-1, 2, 1.5F, kInf, 1.4F, 3, -9}, scores.add_head().begin());
  KeptPositions kept;
  select_above(scores, {1, 1}, 1.5F, kept);
  EXPECT_EQ(list_of(kept, 0), (List{0, 1, 2, 5, 6}));
  EXPECT_THROW(select_above(scores, {}, kInf, kept), ConfigError);
}

}  // namespace
}  // namespace headwise
