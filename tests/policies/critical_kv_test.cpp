// SPDX-License-Identifier: MIT
#include "headwise/policies/critical_kv.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "headwise/policies/ada_kv.hpp"
#include "headwise/policies/snap_kv.hpp"
#include "support/errors.hpp"
#include "support/selection_goldens.hpp"

namespace headwise {
namespace {

using test::GoldenLayer;

struct Inputs {
  Inputs() : scores(32) {
    const GoldenLayer layer;
    for (int h = 0; h < 2; ++h) {
      snap_kv::add_head(snap, layer.queries(h, 28, 32), layer.keys(h), layer.positions, scores);
      std::vector<std::vector<float>> weights(2);
      std::vector<RowView> projections;
      for (std::uint32_t g = 0; g < 2; ++g) {
        for (std::uint32_t o = 0; o < 32; ++o) {
          for (std::uint32_t j = 0; j < 8; ++j) {
            weights[g].push_back(
                test::golden_value(4, o, static_cast<std::uint32_t>(h) * 2 + g, j));
          }
        }
        projections.push_back(RowView::dense(weights[g].data(), 32, 8));
      }
      norms.emplace_back(32);
      critical_kv::projected_norms(projections, layer.values(h), norms.back());
    }
  }
  snap_kv::Policy snap{.window = 4, .kernel = 5};
  TokenScores scores;
  std::vector<std::vector<float>> norms;
};

TEST(CriticalKv, KeepsAsKvpressOverSnapKv) {
  const Inputs in;
  EXPECT_NEAR(in.norms[0][0], 95.456055, 1e-4);
  EXPECT_NEAR(in.norms[0][3], 146.090088, 1e-4);
  KeptPositions kept;
  critical_kv::select({}, in.scores, in.norms, in.snap.protection(), KeepCounts{16, 16}, kept);
  EXPECT_EQ(test::lists_of(kept),
            (test::KeptLists{{1, 3, 4, 7, 9, 11, 15, 16, 17, 18, 19, 20, 28, 29, 30, 31},
                             {5, 8, 9, 10, 11, 13, 14, 15, 16, 17, 22, 25, 28, 29, 30, 31}}));
}

TEST(CriticalKv, KeepsAsKvpressOverAdaKv) {
  const Inputs in;
  const KeepCounts counts = ada_kv::Policy{}.counts(in.scores, in.snap.protection(), 16);
  KeptPositions kept;
  critical_kv::select({}, in.scores, in.norms, in.snap.protection(), counts, kept);
  EXPECT_EQ(
      test::lists_of(kept),
      (test::KeptLists{{3, 4, 7, 15, 16, 17, 18, 19, 20, 28, 29, 30, 31},
                       {5, 7, 8, 9, 10, 11, 13, 14, 15, 16, 17, 19, 22, 24, 25, 28, 29, 30, 31}}));
}

TEST(CriticalKv, RefusesScoresThatMayBeNegative) {
  TokenScores scores(3);
  std::ranges::copy(std::vector<float>{1.0F, -0.5F, 2.0F}, scores.add_head().begin());
  const std::vector<std::vector<float>> norms{{1.0F, 1.0F, 1.0F}};
  KeptPositions kept;
  EXPECT_EQ(testing::message_of<ConfigError>(
                [&] { critical_kv::select({}, scores, norms, {}, KeepCounts{2}, kept); }),
            "KV head 0: a base score must be >= 0, got -0.5");
  EXPECT_THROW(critical_kv::select({}, scores, norms, {}, KeepCounts{2, 2}, kept), ConfigError);
  EXPECT_THROW(critical_kv::select({.first_stage = 1.5}, scores, norms, {}, KeepCounts{2}, kept),
               ConfigError);
  EXPECT_EQ(kept.num_heads(), 0);
}

}  // namespace
}  // namespace headwise
