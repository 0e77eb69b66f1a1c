// SPDX-License-Identifier: MIT
#include "headwise/policies/snap_kv.hpp"

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "headwise/heads/select_tokens.hpp"
#include "support/errors.hpp"
#include "support/selection_goldens.hpp"

namespace headwise {
namespace {

using test::golden_value;
using test::GoldenLayer;
using test::KeptLists;

TokenScores scores_of(const snap_kv::Policy& policy, const GoldenLayer& layer) {
  TokenScores scores(layer.n);
  for (int h = 0; h < GoldenLayer::kHeads; ++h) {
    snap_kv::add_head(policy, layer.queries(h, layer.n - policy.window, layer.n), layer.keys(h),
                      layer.positions, scores);
  }
  return scores;
}
KeptLists kept_of(const snap_kv::Policy& policy, const TokenScores& scores, std::int64_t count) {
  return test::lists_of(select_tokens(scores, policy.protection(), uniform_counts(scores, count)));
}

TEST(GoldenInputs, AreTheSpecified) {
  EXPECT_EQ(golden_value(1, 0, 0, 0), -0.125F);
  EXPECT_EQ(golden_value(2, 1, 31, 7), 0.296875F);
  const GoldenLayer layer;
  const auto sum = [](const std::vector<float>& x) {
    double total = 0.0;
    for (const float value : x) total += static_cast<double>(value);
    return total;
  };
  EXPECT_EQ(sum(layer.q), -17.765625);
  EXPECT_EQ(sum(layer.k), -2.75);
  EXPECT_EQ(sum(layer.v), -4.015625);
}

TEST(SnapKv, ScoresAndKeepsAsKvpress) {
  const snap_kv::Policy policy{.window = 4, .kernel = 5};
  const TokenScores scores = scores_of(policy, GoldenLayer());
  EXPECT_NEAR(scores.scores(0)[0], 0.021234, 1e-6);
  EXPECT_NEAR(scores.scores(0)[5], 0.038004, 1e-6);
  EXPECT_NEAR(scores.scores(1)[15], 0.037825, 1e-6);
  test::expect_scores("snapkv_kvpress", scores, policy.protection());
  EXPECT_EQ(kept_of(policy, scores, 16),
            (KeptLists{{2, 3, 5, 6, 9, 12, 15, 16, 17, 18, 19, 20, 28, 29, 30, 31},
                       {7, 8, 10, 11, 13, 14, 15, 16, 17, 21, 22, 24, 28, 29, 30, 31}}));
}

TEST(SnapKv, PoolsMaximaAndReducesGroupsAsKvCacheFactory) {
  using snap_kv::Pool;
  using snap_kv::Reduce;
  const snap_kv::Policy max7{.window = 4, .kernel = 7, .pool = Pool::kMax};
  EXPECT_EQ(kept_of(max7, scores_of(max7, GoldenLayer()), 11),
            (KeptLists{{14, 15, 16, 17, 18, 19, 20, 28, 29, 30, 31},
                       {19, 20, 21, 22, 23, 24, 25, 28, 29, 30, 31}}));
  const snap_kv::Policy max_group{.window = 4, .kernel = 5, .reduce = Reduce::kMax};
  const TokenScores scores = scores_of(max_group, GoldenLayer());
  EXPECT_EQ(kept_of(max_group, scores, 17),
            (KeptLists{{1, 2, 3, 4, 5, 9, 12, 15, 16, 17, 18, 19, 20, 28, 29, 30, 31},
                       {5, 6, 7, 8, 9, 10, 11, 14, 15, 21, 22, 23, 24, 28, 29, 30, 31}}));
}

TEST(SnapKv, SelectsForOneQueryHeadAsTheOriginal) {
  const GoldenLayer layer;
  const snap_kv::Policy policy{.window = 4, .kernel = 5};
  ObservedQueries one = layer.queries(0, 28, 32);
  one.group_size = 1;
  TokenScores scores(layer.n);
  snap_kv::add_head(policy, one, layer.keys(0), layer.positions, scores);
  EXPECT_EQ(kept_of(policy, scores, 16),
            (KeptLists{{2, 5, 6, 8, 9, 10, 11, 12, 16, 17, 18, 19, 28, 29, 30, 31}}));
}

TEST(SnapKv, PoolsAtTheEndsWithZerosOrNothing) {
  const std::vector<float> raw{0.05F, 0.40F, 0.02F, 0.01F, 0.30F, 0.02F};
  using snap_kv::Pool;
  const std::vector<float> average = snap_kv::pooled(raw, 3, Pool::kAverage);
  const std::vector<float> expected{0.15F, 0.15667F, 0.14333F, 0.11F, 0.11F, 0.10667F};
  for (std::size_t i = 0; i < raw.size(); ++i) EXPECT_NEAR(average[i], expected[i], 1e-5);
  EXPECT_EQ(snap_kv::pooled(raw, 3, Pool::kMax),
            (std::vector<float>{0.40F, 0.40F, 0.40F, 0.30F, 0.30F, 0.30F}));
  EXPECT_EQ(snap_kv::pooled(raw, 1, Pool::kMax), raw);
  EXPECT_TRUE(snap_kv::pooled({}, 5, Pool::kMax).empty());
  for (const int kernel : {0, 2, 4}) {
    EXPECT_EQ(
        testing::message_of<ConfigError>([&] { (void)snap_kv::pooled(raw, kernel, Pool::kMax); }),
        "a pooling kernel must be odd and at least 1, got " + std::to_string(kernel));
  }
}

TEST(SnapKv, PlateausOfMaximaAreCutByTheUnpooledScores) {
  // Pooled .4 .4 .4 .3 .3 .3: the fourth is the one whose own score is .3.
  TokenScores scores(8);
  const std::vector<float> raw{0.05F, 0.40F, 0.02F, 0.01F, 0.30F, 0.02F, 0.0F, 0.0F};
  const auto out = scores.add_head();
  const std::vector<float> pooled{0.40F, 0.40F, 0.40F, 0.30F, 0.30F, 0.30F, 0.0F, 0.0F};
  std::ranges::copy(pooled, out.begin());
  scores.set_tie_scores(raw);
  EXPECT_EQ(test::lists_of(select_tokens(scores, {0, 2}, uniform_counts(scores, 6))),
            (KeptLists{{0, 1, 2, 4, 6, 7}}));
}

TEST(SnapKv, APromptNoLongerThanTheWindowStaysWhole) {
  for (const std::int64_t n : {1, 3, 4, 5}) {
    const GoldenLayer layer(n);
    const snap_kv::Policy policy{.window = 4, .kernel = 5};
    TokenScores scores(n);
    for (int h = 0; h < 2; ++h) {
      snap_kv::add_head(policy, layer.queries(h, std::max<std::int64_t>(0, n - 4), n),
                        layer.keys(h), layer.positions, scores);
    }
    const KeptLists kept = kept_of(policy, scores, n);
    EXPECT_EQ(kept[0].size(), static_cast<std::size_t>(n));
    EXPECT_EQ(kept[1].size(), static_cast<std::size_t>(n));
  }
}

TEST(SnapKv, AnotherSelectionScoresTheRowsThatAreLeft) {
  // The same queries over fewer keys: softmax over those alone.
  const GoldenLayer layer;
  std::vector<std::int32_t> stored;
  std::vector<float> rows;
  for (std::int32_t j = 0; j < 32; ++j) {
    if (j % 3 == 1 && j < 28) continue;
    stored.push_back(j);
    rows.insert(rows.end(), layer.keys(0).row(j), layer.keys(0).row(j) + 8);
  }
  const snap_kv::Policy policy{.window = 4, .kernel = 1};
  TokenScores scores(32);
  const auto count = static_cast<std::int64_t>(stored.size());
  snap_kv::add_head(policy, layer.queries(0, 28, 32), RowView::dense(rows.data(), count, 8), stored,
                    scores);
  for (std::size_t j = 0; j + 4 < stored.size(); ++j) {
    double expected = 0.0;
    for (int g = 0; g < 2; ++g) {
      for (std::int64_t i = 28; i < 32; ++i) {
        double sum = 0.0;
        double mine = 0.0;
        for (std::size_t t = 0; t < stored.size() && stored[t] <= i; ++t) {
          double dot = 0.0;
          for (int d = 0; d < 8; ++d) {
            dot += static_cast<double>(layer.query_rows(g).row(i)[d]) *
                   static_cast<double>(rows[t * 8 + static_cast<std::size_t>(d)]);
          }
          const double weight = std::exp(dot / std::sqrt(8.0));
          sum += weight;
          if (t == j) mine = weight;
        }
        expected += mine / sum / 8.0;
      }
    }
    EXPECT_NEAR(scores.scores(0)[j], expected, 1e-6);
  }
}

}  // namespace
}  // namespace headwise
