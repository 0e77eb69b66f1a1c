// SPDX-License-Identifier: MIT
#include "headwise/heads/token_counts.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "support/errors.hpp"

namespace headwise {
namespace {

using testing::message_of;

TokenScores scores_of(std::vector<std::vector<float>> heads) {
  TokenScores scores(static_cast<std::int64_t>(heads[0].size()));
  for (const std::vector<float>& head : heads) std::ranges::copy(head, scores.add_head().begin());
  return scores;
}

TEST(TokensLeft, IsAFloorThatRepairsDecimalsAndNeverNone) {
  // Published code: 0, 0, 9, 99, 27, 35, 5.
  EXPECT_EQ(tokens_left(10, 0.9), 1);
  EXPECT_EQ(tokens_left(5, 0.8), 1);
  EXPECT_EQ(tokens_left(100, 0.9), 10);
  EXPECT_EQ(tokens_left(1000, 0.9), 100);
  EXPECT_EQ(tokens_left(30, 0.1), 27);
  EXPECT_EQ(tokens_left(50, 0.3), 35);
  EXPECT_EQ(tokens_left(7, 0.25), 5);
  EXPECT_EQ(tokens_left(4096, 0.875), 512);
  EXPECT_EQ(tokens_left(0, 0.5), 0);
  EXPECT_EQ(tokens_left(9, 0.0), 9);
  EXPECT_EQ(tokens_left(9, 0.999), 1);
}

TEST(TokensLeft, RefusesToRemoveEverything) {
  EXPECT_EQ(message_of<ConfigError>([] { (void)tokens_left(9, 1.0); }),
            "a removed share must be in [0, 1), got 1");
  EXPECT_THROW((void)tokens_left(9, -0.1), ConfigError);
  EXPECT_THROW((void)tokens_left(9, std::numeric_limits<double>::quiet_NaN()), ConfigError);
  EXPECT_THROW((void)tokens_left(-1, 0.5), ConfigError);
}

TEST(TokensOfBytes, AreWholeRows) {
  EXPECT_EQ(tokens_of_bytes(1023, 512), 1);
  EXPECT_EQ(tokens_of_bytes(1024, 512), 2);
  EXPECT_EQ(tokens_of_bytes(0, 512), 0);
  EXPECT_THROW((void)tokens_of_bytes(1, 0), ConfigError);
}

TEST(UniformCounts, AreNoMoreThanIsStored) {
  TokenScores scores(9);
  (void)scores.add_head();
  (void)scores.add_head(std::vector<std::int32_t>{1, 4});
  EXPECT_EQ(uniform_counts(scores, 5), (KeepCounts{5, 2}));
  EXPECT_EQ(uniform_counts(scores, 50), (KeepCounts{9, 2}));
  EXPECT_EQ(uniform_counts(scores, 0), (KeepCounts{0, 0}));
  EXPECT_THROW((void)uniform_counts(scores, -1), ConfigError);
}

TEST(SharedCounts, AreThoseOfTheBestTokensWhosTheyAre) {
  const TokenScores scores = scores_of({{9, 1, 8, 1}, {2, 7, 3, 6}, {0, 0, 0, 5}});
  EXPECT_EQ(shared_counts(scores, {}, 5), (KeepCounts{2, 2, 1}));
  EXPECT_EQ(shared_counts(scores, {}, 4), (KeepCounts{2, 2, 0}));
  EXPECT_EQ(shared_counts(scores, {}, 4, 1), (KeepCounts{2, 1, 1}));
  EXPECT_EQ(shared_counts(scores, {0, 1}, 4), (KeepCounts{2, 1, 1}));
  EXPECT_EQ(shared_counts(scores, {}, 100), (KeepCounts{4, 4, 4}));
  EXPECT_EQ(shared_counts(scores, {2, 1}, 0), (KeepCounts{3, 3, 3}));
  EXPECT_EQ(shared_counts(scores, {}, 0), (KeepCounts{0, 0, 0}));
}

TEST(SharedCounts, EqualScoresGoToTheLowerHead) {
  const TokenScores scores = scores_of({{1, 1, 1}, {1, 1, 1}});
  EXPECT_EQ(shared_counts(scores, {}, 4), (KeepCounts{3, 1}));
}

TEST(SharedCounts, ScalingOrShiftingAllScoresChangesNothing) {
  std::mt19937 random(3);
  std::vector<std::vector<float>> heads(4, std::vector<float>(30));
  for (auto& head : heads) {
    for (float& x : head) x = static_cast<float>(random() % 1000) / 1024.0F;
  }
  const KeepCounts counts = shared_counts(scores_of(heads), {1, 3}, 50, 5);
  EXPECT_EQ(std::accumulate(counts.begin(), counts.end(), std::int64_t{0}), 50);
  for (auto& head : heads) {
    for (float& x : head) x = x * 4.0F + 1.0F;
  }
  EXPECT_EQ(shared_counts(scores_of(heads), {1, 3}, 50, 5), counts);
}

TEST(SharedCounts, PermutingHeadsPermutesThem) {
  const TokenScores one = scores_of({{9, 1, 8, 1}, {2, 7, 3, 6}, {0, 4, 0, 5}});
  const TokenScores other = scores_of({{0, 4, 0, 5}, {9, 1, 8, 1}, {2, 7, 3, 6}});
  for (std::int64_t total = 0; total <= 12; ++total) {
    const KeepCounts a = shared_counts(one, {}, total);
    const KeepCounts b = shared_counts(other, {}, total);
    if (total != 8 && total != 9) {  // where equal scores are cut apart
      EXPECT_EQ((KeepCounts{a[2], a[0], a[1]}), b) << total;
    }
  }
}

TEST(TableCounts, WhatAHeadCannotUseGoesToTheOthers) {
  TokenScores scores(10);
  (void)scores.add_head(std::vector<std::int32_t>{0, 1});
  (void)scores.add_head();
  (void)scores.add_head();
  EXPECT_EQ(table_counts(scores, KeepCounts{2, 3, 4}), (KeepCounts{2, 3, 4}));
  EXPECT_EQ(table_counts(scores, KeepCounts{8, 3, 4}), (KeepCounts{2, 6, 7}));
  EXPECT_EQ(table_counts(scores, KeepCounts{8, 3, 9}), (KeepCounts{2, 8, 10}));
  EXPECT_EQ(table_counts(scores, KeepCounts{50, 0, 0}), (KeepCounts{2, 10, 10}));
  EXPECT_EQ(table_counts(scores, KeepCounts{5, 0, 0}), (KeepCounts{2, 2, 1}));
  EXPECT_EQ(message_of<ConfigError>([&] {
              (void)table_counts(scores, KeepCounts{1, 2});
            }),
            "a table of 2 counts for 3 KV heads");
  EXPECT_THROW((void)table_counts(scores, KeepCounts{1, -1, 3}), ConfigError);
}

}  // namespace
}  // namespace headwise
