// SPDX-License-Identifier: MIT
#include "headwise/policies/task_kv.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <vector>

#include "headwise/heads/select_tokens.hpp"
#include "support/errors.hpp"
#include "support/selection_goldens.hpp"

namespace headwise {
namespace {

using task_kv::Place;
using task_kv::Split;
using test::KeptLists;
using Roles = std::vector<std::uint8_t>;
using Vectors = std::vector<std::vector<double>>;

// policies-more, section 1: Llama-2-7B-Chat.
TEST(TaskKv, HasFewerHeterogeneousHeadsInHigherLayers) {
  const task_kv::Policy policy;
  EXPECT_EQ(policy.num_heterogeneous({0, 32, 32, 1}), 8);
  EXPECT_EQ(policy.num_heterogeneous({16, 32, 32, 1}), 5);  // 5.935
  EXPECT_EQ(policy.num_heterogeneous({31, 32, 32, 1}), 4);
  EXPECT_EQ(policy.num_heterogeneous({0, 1, 32, 1}), 8);
  for (int layers = 2; layers < 200; ++layers) {
    EXPECT_EQ(policy.num_heterogeneous({layers - 1, layers, 32, 1}), 4) << layers;
    const task_kv::Policy mistral{.bottom_share = 0.3, .top = 1};
    EXPECT_EQ(mistral.num_heterogeneous({layers - 1, layers, 32, 1}), 1) << layers;
  }
  // Groups of 4: 8 x 0.25 at the bottom, max(1, round(4 / 4)) at the top; of 8: a half is even.
  EXPECT_EQ(policy.num_heterogeneous({0, 32, 8, 4}), 2);
  EXPECT_EQ(policy.num_heterogeneous({31, 32, 8, 4}), 1);
  EXPECT_EQ(policy.num_heterogeneous({31, 32, 8, 2}), 2);
  EXPECT_EQ(policy.num_heterogeneous({31, 32, 8, 8}), 1);
  EXPECT_EQ(task_kv::Policy{.top = 40}.num_heterogeneous({31, 32, 32, 1}), 32);  // no more than all
}

TEST(TaskKv, SpendsTheRestOnMiddleTokens) {
  const task_kv::Policy policy;
  EXPECT_EQ(policy.split({0, 32, 32, 1}, 4096, 52428), (Split{8, 0, 547}));
  EXPECT_EQ(policy.split({31, 32, 32, 1}, 4096, 52428), (Split{4, 0, 1015}));
  EXPECT_EQ(policy.split({0, 32, 32, 1}, 4096, 78643), (Split{8, 0, 1639}));
  // All heads are heterogeneous: nothing is divided.
  EXPECT_EQ(task_kv::Policy{.bottom_share = 1.0}.split({0, 2, 4, 1}, 1000, 4000), (Split{4, 0, 0}));
  // Short sequences keep everything.
  EXPECT_EQ(policy.split({0, 32, 32, 1}, 272, 0).middle, 0);
  // More budget than tokens.
  EXPECT_EQ(policy.split({0, 32, 32, 1}, 1000, 1'000'000), (Split{8, 0, 728}));
}

TEST(TaskKv, LowersTheFullHeadsUntilTheOthersFit) {
  // 4 heads of 1000 tokens, 10 protected; 2 full ones take 2020 in all.
  const task_kv::Policy policy{.sink = 4, .recent = 6, .bottom_share = 0.5, .near_extra = 1};
  const Place bottom{0, 2, 4, 1};
  EXPECT_EQ(policy.split(bottom, 1000, 3010), (Split{2, 1, 0}));
  EXPECT_EQ(policy.split(bottom, 1000, 3015), (Split{2, 1, 5}));
  EXPECT_EQ(policy.split(bottom, 1000, 3009), (Split{2, 0, 494}));  // the near one goes first
  EXPECT_EQ(policy.split(bottom, 1000, 2020), (Split{2, 0, 0}));
  EXPECT_EQ(policy.split(bottom, 1000, 2019), (Split{1, 0, 329}));
  EXPECT_EQ(policy.split(bottom, 1000, 1029), (Split{0, 0, 247}));
  EXPECT_EQ(policy.split(bottom, 1000, 39), (Split{0, 0, 0}));
}

TEST(TaskKv, TakesTheHeadsFarthestFromTheCentre) {
  const Vectors vectors{{1, 0}, {0, 1}, {.2, .2}, {3, 3}};  // centre (1.05, 1.05)
  EXPECT_EQ(task_kv::farthest(vectors, 0), (Roles{0, 0, 0, 0}));
  EXPECT_EQ(task_kv::farthest(vectors, 1), (Roles{0, 0, 0, 1}));
  EXPECT_EQ(task_kv::farthest(vectors, 2), (Roles{0, 0, 1, 1}));
  EXPECT_EQ(task_kv::farthest(vectors, 2, 1), (Roles{1, 0, 1, 1}));
  EXPECT_EQ(task_kv::farthest(vectors, 1, 1), (Roles{1, 0, 0, 1}));
  EXPECT_EQ(task_kv::farthest(vectors, 3), (Roles{1, 0, 1, 1}));
  EXPECT_EQ(task_kv::farthest(vectors, 4), (Roles{1, 1, 1, 1}));
  EXPECT_EQ(task_kv::farthest({}, 0), Roles{});
}

/// Pooled mean weights of one query head's last four queries, in double.
std::vector<double> pooled_weights(const test::GoldenLayer& layer, int query_head, int kernel) {
  std::vector<double> raw(32, 0.0);
  for (std::int64_t i = 28; i < 32; ++i) {
    std::vector<double> row;
    for (std::int64_t j = 0; j <= i; ++j) {
      double dot = 0.0;
      for (int d = 0; d < 8; ++d) {
        dot += static_cast<double>(layer.query_rows(query_head).row(i)[d]) *
               static_cast<double>(layer.keys(query_head / 2).row(j)[d]);
      }
      row.push_back(std::exp(dot / std::sqrt(8.0)));
    }
    const double sum = std::accumulate(row.begin(), row.end(), 0.0);
    for (std::size_t j = 0; j < row.size(); ++j) raw[j] += row[j] / sum / 4.0;
  }
  std::vector<double> out(32, 0.0);
  for (int j = 0; j < 32; ++j) {
    for (int i = j - kernel / 2; i <= j + kernel / 2; ++i) {
      if (i >= 0 && i < 32) {
        out[static_cast<std::size_t>(j)] += raw[static_cast<std::size_t>(i)] / kernel;
      }
    }
  }
  return out;
}

TEST(TaskKv, WeighsTheValuesOfTheStrongestTokens) {
  const test::GoldenLayer layer;
  const task_kv::Policy policy{.window = 4, .strongest = 5};
  TokenScores scores(32);
  for (int h = 0; h < 2; ++h) {
    const std::vector<double> vector = task_kv::add_head(
        policy, layer.queries(h, 28, 32), layer.keys(h), layer.values(h), layer.positions, scores);
    std::vector<double> mean(32, 0.0);
    std::vector<double> expected(8, 0.0);
    for (const int g : {2 * h, 2 * h + 1}) {
      const std::vector<double> weights = pooled_weights(layer, g, 7);
      std::vector<double> sorted = weights;
      std::ranges::sort(sorted, std::greater<>());
      for (std::size_t j = 0; j < 32; ++j) {
        mean[j] += weights[j] / 2.0;
        if (weights[j] < sorted[4]) continue;
        for (std::size_t d = 0; d < 8; ++d) {
          expected[d] += weights[j] *
                         static_cast<double>(layer.values(h).row(static_cast<std::int64_t>(j))[d]) /
                         2.0;
        }
      }
    }
    ASSERT_EQ(vector.size(), 8U);
    for (std::size_t d = 0; d < 8; ++d) EXPECT_NEAR(vector[d], expected[d], 1e-6);
    for (std::size_t j = 0; j < 32; ++j) EXPECT_NEAR(scores.scores(h)[j], mean[j], 1e-6);
  }
}

TEST(TaskKv, SelectsByRole) {
  const test::GoldenLayer layer;
  const task_kv::Policy policy{
      .window = 4, .strongest = 8, .sink = 2, .recent = 4, .bottom_share = 0.5};
  TokenScores scores(32);
  Vectors vectors;
  for (int h = 0; h < 2; ++h) {
    vectors.push_back(task_kv::add_head(policy, layer.queries(h, 28, 32), layer.keys(h),
                                        layer.values(h), layer.positions, scores));
  }
  const Split split = policy.split({0, 4, 2, 2}, 32, 32 + 10);
  EXPECT_EQ(split, (Split{1, 0, 4}));
  const KeepCounts counts = task_kv::counts(policy, scores, Roles{0, 1}, split);
  EXPECT_EQ(counts, (KeepCounts{10, 32}));
  const KeptPositions kept = select_tokens(scores, policy.protection(), counts);
  EXPECT_EQ(kept.num_positions(), 42);

  // Eight tokens later the window has moved, the middle has not.
  const auto first = kept.of_head(0);
  std::vector<std::int32_t> stored(first.begin(), first.end());
  for (std::int32_t position = 32; position < 40; ++position) stored.push_back(position);
  KeptPositions later;
  task_kv::add_later(policy, first, 32, stored, 40, later);
  std::vector<std::int32_t> expected(first.begin(), first.begin() + 6);
  for (std::int32_t position = 36; position < 40; ++position) expected.push_back(position);
  EXPECT_EQ(test::lists_of(later), (KeptLists{expected}));
}

TEST(TaskKv, LeavesOutValuesThatAreNotFinite) {
  const test::GoldenLayer layer;
  std::vector<float> values(layer.v.begin(), layer.v.begin() + 32 * 8);
  values[3 * 8 + 1] = std::numeric_limits<float>::quiet_NaN();
  TokenScores scores(32);
  for (const double x :
       task_kv::add_head({}, layer.queries(0, 28, 32), layer.keys(0),
                         RowView::dense(values.data(), 32, 8), layer.positions, scores)) {
    EXPECT_TRUE(is_finite(x));
  }
}

TEST(TaskKv, RefusesWhatDoesNotGoTogether) {
  using testing::message_of;
  const task_kv::Policy policy;
  EXPECT_THROW((void)policy.num_heterogeneous({2, 2, 4, 1}), ConfigError);
  EXPECT_THROW((void)policy.num_heterogeneous({0, 2, 0, 1}), ConfigError);
  EXPECT_THROW((void)policy.split({0, 2, 4, 1}, 10, -1), ConfigError);
  EXPECT_EQ(message_of<ConfigError>(
                [] { (void)task_kv::Policy{.bottom_share = 1.5}.num_heterogeneous({}); }),
            "a share of heads must be in [0, 1], got 1.5");
  EXPECT_THROW((void)task_kv::farthest(Vectors{{1.0}, {1.0, 2.0}}, 1), ConfigError);
  EXPECT_THROW((void)task_kv::farthest(Vectors{{1.0}, {2.0}}, 2, 1), ConfigError);
  const test::GoldenLayer layer;
  TokenScores scores(32);
  const auto refused = [&](const task_kv::Policy& other, std::int64_t first, std::int64_t values) {
    return message_of<ConfigError>([&] {
      (void)task_kv::add_head(other, layer.queries(0, first, 32), layer.keys(0),
                              layer.values(0).rows(0, values), layer.positions, scores);
    });
  };
  EXPECT_THAT(refused({.kernel = 4}, 28, 32), ::testing::HasSubstr("got 4"));
  EXPECT_THAT(refused({.strongest = 0}, 28, 32), ::testing::HasSubstr("got 0"));
  EXPECT_THAT(refused({}, 32, 32), ::testing::HasSubstr("at least one query"));
  EXPECT_THAT(refused({}, 28, 31), ::testing::HasSubstr("31 values at 32 positions"));
  EXPECT_EQ(scores.num_heads(), 0);
  EXPECT_THROW((void)task_kv::counts(policy, scores, Roles{1}, {}), ConfigError);
}

}  // namespace
}  // namespace headwise
