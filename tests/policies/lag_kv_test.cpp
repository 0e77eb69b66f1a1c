// SPDX-License-Identifier: MIT
#include "headwise/policies/lag_kv.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <vector>

#include "headwise/core/bits.hpp"
#include "headwise/heads/select_tokens.hpp"
#include "support/selection_goldens.hpp"

namespace headwise {
namespace {

using test::GoldenLayer;
using test::KeptLists;

TokenScores scores_of(const lag_kv::Policy& policy) {
  const GoldenLayer layer;
  TokenScores scores(32);
  for (int h = 0; h < 2; ++h) {
    lag_kv::add_head(policy, layer.keys(h), layer.values(h), layer.positions, scores);
  }
  return scores;
}

TEST(LagKv, RanksAndKeepsAsKvpress) {
  const TokenScores scores = scores_of({.sink = 2, .lag = 6});
  test::expect_scores("lagkv", scores);
  EXPECT_EQ(test::lists_of(select_tokens(scores, {}, uniform_counts(scores, 16))),
            (KeptLists{{0, 1, 3, 4, 11, 13, 14, 18, 20, 25, 26, 27, 28, 29, 30, 31},
                       {0, 1, 3, 7, 9, 10, 16, 17, 21, 25, 26, 27, 28, 29, 30, 31}}));
}

TEST(LagKv, ComparesScoresAcrossPartitionsWhereAsked) {
  const TokenScores scores = scores_of({.sink = 2, .lag = 6, .cross = true});
  EXPECT_NEAR(scores.scores(0)[5], 0.151027, 1e-6);
  test::expect_scores("lagkv_cross", scores);
}

TEST(LagKv, AShortPromptIsCutByAge) {
  const TokenScores scores = scores_of({.sink = 4, .lag = 128});
  test::expect_scores("lagkv_short", scores);
  EXPECT_EQ(test::lists_of(select_tokens(scores, {}, uniform_counts(scores, 6)))[1],
            (std::vector<std::int32_t>{0, 1, 2, 3, 30, 31}));
}

TEST(LagKv, PartitionsKeepAsManyAndTheNewestTheRemainder) {
  const TokenScores scores = scores_of({.sink = 2, .lag = 6});
  for (std::int64_t count = 8; count <= 32; ++count) {
    const auto kept = test::lists_of(select_tokens(scores, {}, uniform_counts(scores, count)))[0];
    std::vector<std::int64_t> of_partition(4, 0);
    for (const std::int32_t pos : kept) {
      if (pos >= 2 && pos < 26) ++of_partition[static_cast<std::size_t>((pos - 2) / 6)];
    }
    for (std::size_t p = 0; p < 4; ++p) {
      const std::int64_t each = (count - 8) / 4;
      const bool has_more = static_cast<std::int64_t>(p) >= 4 - (count - 8) % 4;
      EXPECT_EQ(of_partition[p], each + (has_more ? 1 : 0)) << count;
    }
  }
}

TEST(LagKv, AChannelWithoutARangeIsNoInfinity) {
  std::vector<float> rows(12 * 8);
  for (std::size_t i = 0; i < rows.size(); ++i) {
    rows[i] = i % 8 == 3 ? 1.0F : static_cast<float>((i * 37) % 11);
  }
  std::vector<std::int32_t> stored;
  for (std::int32_t i = 0; i < 12; ++i) stored.push_back(i);
  TokenScores scores(12);
  const RowView view = RowView::dense(rows.data(), 12, 8);
  lag_kv::add_head({.sink = 0, .lag = 6, .cross = true}, view, view, stored, scores);
  for (const float score : scores.scores(0)) EXPECT_TRUE(is_finite(score));
}

TEST(LagKv, ARowOfNaNIsTheFirstOfItsPartitionToGo) {
  std::vector<float> rows(32 * 8);
  for (std::size_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<float>((i * 37) % 11);
  rows[11 * 8 + 3] = NAN;
  std::vector<std::int32_t> stored;
  for (std::int32_t i = 0; i < 32; ++i) stored.push_back(i);
  TokenScores scores(32);
  const RowView view = RowView::dense(rows.data(), 32, 8);
  lag_kv::add_head({.sink = 2, .lag = 6}, view, view, stored, scores);
  EXPECT_EQ(scores.scores(0)[11], 0.0F);
  for (const float score : scores.scores(0)) EXPECT_TRUE(is_finite(score));
}

TEST(LagKv, RefusesWhatIsOutOfRange) {
  const GoldenLayer layer;
  TokenScores scores(32);
  const auto add = [&](lag_kv::Policy policy, std::int64_t values) {
    lag_kv::add_head(policy, layer.keys(0), layer.values(0).rows(0, values), layer.positions,
                     scores);
  };
  EXPECT_THROW(add({.lag = 0}, 32), ConfigError);
  EXPECT_THROW(add({.sink = -1}, 32), ConfigError);
  EXPECT_THROW(add({}, 31), ConfigError);
}

}  // namespace
}  // namespace headwise
