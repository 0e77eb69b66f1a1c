// SPDX-License-Identifier: MIT
#include "headwise/heads/select.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <type_traits>
#include <vector>

#include "support/errors.hpp"

namespace headwise {
namespace {

using testing::message_of;

constexpr Window kWindow{.sink = 64, .recent = 256};

/// 1 for a retrieval head, 0 for a streaming one, layer by layer.
std::string mask_of(const HeadPlan& plan) {
  std::string mask;
  for (const HeadBudget& budget : plan.budgets()) mask += is_retrieval(budget) ? '1' : '0';
  return mask;
}

std::string mask_at(const std::vector<double>& values, double sparsity) {
  const HeadScores scores = HeadScores::dense(1, static_cast<int>(values.size()), values);
  return mask_of(select(scores, {.sparsity = sparsity, .window = kWindow}));
}

// The first row of the published Llama-3.1-8B-Instruct gates.
const std::vector<double> kGates{0.6055, 0, 0.9688, 0.6836, 0.0249, 0.9688, 0.0398, 0};

TEST(Select, FollowsThePublishedQuantile) {
  EXPECT_EQ(mask_at(kGates, 0), "11111111");
  EXPECT_EQ(mask_at(kGates, .25), "10111110");
  EXPECT_EQ(mask_at(kGates, .5), "10110100");
  EXPECT_EQ(mask_at(kGates, .75), "00100100");
  EXPECT_EQ(mask_at(kGates, 1), "00000000");
  const std::vector<double> rising{.1, .2, .3, .4, .5};
  EXPECT_EQ(mask_at(rising, .25), "01111");
  EXPECT_EQ(mask_at(rising, .5), "00111");
  EXPECT_EQ(mask_at(rising, .75), "00011");
}

TEST(Select, StreamsExactlyTheCountWhenAllValuesTie) {
  EXPECT_EQ(mask_at({1, 1, 1, 1}, .5), "0011");  // ceil(1.5); the lower head streams first
  EXPECT_EQ(mask_at({1, 1, 1, 1}, .25), "0111");
}

TEST(Select, BreaksTiesOfClippedValuesByTheRawOnes) {
  EXPECT_EQ(mask_at({0, -1e-3, 0, -2e-3, 1}, .5), "10101");
  EXPECT_EQ(mask_at({1.0078, 1, 1.0039, 1, 0}, .75), "10100");
}

TEST(Select, BreaksFullTiesByLayerThenHead) {
  const HeadScores scores = HeadScores::dense(2, 2, std::vector<double>(4, .5));
  EXPECT_EQ(mask_of(select(scores, {.sparsity = .9, .window = kWindow})), "0001");
}

TEST(Select, GivesStreamingHeadsTheWindow) {
  const HeadScores scores = HeadScores::dense(1, 2, std::vector<double>{.9, .1});
  const HeadPlan plan = select(scores, {.sparsity = .5, .window = kWindow});
  EXPECT_EQ(plan.budget(0, 0), HeadBudget{KeepEverything{}});
  EXPECT_EQ(plan.budget(0, 1), HeadBudget{KeepWindow{kWindow}});
  EXPECT_EQ(plan.sparsity(), .5);
}

TEST(Select, NeverTurnsAStreamingHeadBackAtAHigherSparsity) {
  SplitMix64 random(7);
  std::vector<double> values(112);
  // Few distinct values, some outside [0, 1]: ties everywhere.
  for (double& value : values) value = static_cast<double>(random.next() % 9) / 6.0 - .2;
  const HeadScores scores = HeadScores::dense(28, 4, values);
  for (const std::optional<std::uint64_t> seed : {std::optional<std::uint64_t>{}, {3}}) {
    std::string last(112, '1');
    for (int i = 0; i <= 1000; ++i) {
      const SelectOptions options{.sparsity = i / 1000.0, .window = kWindow, .jitter_seed = seed};
      const HeadPlan plan = select(scores, options);
      const std::string mask = mask_of(plan);
      for (std::size_t head = 0; head < mask.size(); ++head) ASSERT_LE(mask[head], last[head]);
      ASSERT_EQ(static_cast<std::size_t>(std::count(mask.begin(), mask.end(), '0')),
                num_streaming(112, options.sparsity));
      last = mask;
    }
  }
}

TEST(Select, IsDeterministicAndJitterIsSeeded) {
  const HeadScores scores = HeadScores::dense(4, 8, std::vector<double>(32, 1.0));
  const auto mask = [&](std::optional<std::uint64_t> seed) {
    return mask_of(select(scores, {.sparsity = .5, .window = kWindow, .jitter_seed = seed}));
  };
  EXPECT_EQ(mask({}), mask({}));
  EXPECT_EQ(mask(1), mask(1));
  EXPECT_NE(mask(1), mask(2));
  EXPECT_NE(mask(1), mask({}));
}

TEST(Select, LetsJitterDecideTiesOnly) {
  std::vector<double> values(64);
  for (std::size_t i = 0; i < 64; ++i) values[i] = static_cast<double>((i * 37) % 64) / 64.0;
  const HeadScores scores = HeadScores::dense(8, 8, values);
  EXPECT_EQ(streaming_order(scores, 5), streaming_order(scores));
}

TEST(Select, HasTheRoundedCountWhereAsked) {
  const HeadScores scores = HeadScores::dense(28, 4, std::vector<double>(112));
  SelectOptions options{.sparsity = .2, .window = kWindow};
  EXPECT_DOUBLE_EQ(select(scores, options).sparsity(), 23 / 112.0);
  options.count_rule = CountRule::kRound;
  EXPECT_DOUBLE_EQ(select(scores, options).sparsity(), 22 / 112.0);
}

TEST(Select, RefusesAMissingWindowAndABadSparsity) {
  const HeadScores scores = HeadScores::dense(1, 2, std::vector<double>(2));
  EXPECT_EQ(message_of<ConfigError>([&] { (void)select(scores, {.sparsity = .5}); }),
            "select needs a window: the scores do not say what a streaming head keeps");
  EXPECT_EQ(
      message_of<ConfigError>([&] { (void)select(scores, {.sparsity = 50, .window = kWindow}); }),
      "sparsity must be in [0, 1], got 50");
  EXPECT_EQ(message_of<ConfigError>([&] {
              (void)select(scores, {.sparsity = .5, .window = {.sink = 4, .recent = 0}});
            }),
            "recent, which counts the current token, must be in [1, 1099511627776], got 0");
}

TEST(SelectTop, KeepsTheHighestOfUnequalLayersAndTakesAnyBudget) {
  const HeadScores scores(std::vector<int>{1, 3}, {.2, .9, .1, .8});
  const HeadPlan plan = select_top(scores, 2, KeepGrowingWindow{});
  EXPECT_EQ(mask_of(plan), "0101");
  EXPECT_EQ(plan.num_kv_heads(1), 3);
  EXPECT_EQ(plan.budget(0, 0), HeadBudget{KeepGrowingWindow{}});
  EXPECT_EQ(mask_of(select_top(scores, 0, KeepWindow{kWindow})), "0000");
  EXPECT_EQ(mask_of(select_top(scores, 4, KeepWindow{kWindow})), "1111");
  EXPECT_EQ(message_of<ConfigError>([&] { (void)select_top(scores, 5, KeepEverything{}); }),
            "cannot keep 5 heads of 4");
}

TEST(SelectAtLeast, IncludesTheThreshold) {
  const HeadScores scores = HeadScores::dense(1, 4, std::vector<double>{.1, .09, 1.88, 0});
  EXPECT_EQ(mask_of(select_at_least(scores, .1, KeepWindow{kWindow})), "1010");
  EXPECT_EQ(message_of<ConfigError>(
                [&] { (void)select_at_least(scores, std::nan(""), KeepWindow{kWindow}); }),
            "a threshold must be finite, got nan");
}

template <class Scores>
concept Selectable = requires(const Scores& scores) {
  select(scores, SelectOptions{});
};
static_assert(Selectable<HeadScores>);
static_assert(!Selectable<QueryHeadScores>, "query heads must be reduced first");

}  // namespace
}  // namespace headwise
