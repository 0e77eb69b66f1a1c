// SPDX-License-Identifier: MIT
#include "headwise/heads/plan.hpp"

#include <gtest/gtest.h>

#include <climits>
#include <vector>

#include "support/errors.hpp"

namespace headwise {
namespace {

using testing::message_of;

TEST(HeadPlan, StartsWithOneBudgetForEveryHead) {
  const HeadPlan plan(ModelShape::uniform(3, 8, 2, 64));
  EXPECT_EQ(plan.num_layers(), 3);
  EXPECT_EQ(plan.num_kv_heads(1), 2);
  EXPECT_EQ(plan.num_heads(), 6U);
  EXPECT_EQ(plan.sparsity(), 0.0);
  EXPECT_EQ(plan.budget(2, 1), HeadBudget{KeepEverything{}});
}

TEST(HeadPlan, SetsOneHeadOfUnequalLayers) {
  HeadPlan plan(std::vector<int>{1, 3}, KeepWindow{{4, 60}});
  plan.set(1, 0, KeepEverything{});
  EXPECT_EQ(plan.sparsity(), 0.75);
  EXPECT_FALSE(is_retrieval(plan.budget(0, 0)));
  EXPECT_TRUE(is_retrieval(plan.budget(1, 0)));
  EXPECT_FALSE(is_retrieval(plan.budget(1, 1)));
}

TEST(HeadPlan, RefusesLayersWithoutHeads) {
  EXPECT_EQ(message_of<ConfigError>([] { HeadPlan(std::vector<int>{}); }),
            "a plan needs at least 1 layer, got 0");
  EXPECT_EQ(message_of<ConfigError>([] {
              HeadPlan(std::vector<int>{2, 0});
            }),
            "layer 1: a plan needs at least 1 head, got 0");
}

TEST(HeadPlan, RefusesBudgetsOutOfRange) {
  HeadPlan plan(std::vector<int>{1});
  EXPECT_EQ(message_of<ConfigError>([&] {
              plan.set(0, 0, KeepWindow{{-1, 8}});
            }),
            "sink must be in [0, 1099511627776], got -1");
  EXPECT_EQ(message_of<ConfigError>([&] {
              plan.set(0, 0, KeepWindow{{4, 0}});
            }),
            "recent, which counts the current token, must be in [1, 1099511627776], got 0");
  EXPECT_EQ(message_of<ConfigError>([&] { plan.set(0, 0, KeepGrowingWindow{.divisor = 0}); }),
            "divisor must be in [1, 1099511627776], got 0");
  EXPECT_EQ(message_of<ConfigError>([&] { plan.set(0, 0, KeepGrowingWindow{.min_recent = 0}); }),
            "min_recent must be in [1, 1099511627776], got 0");
  EXPECT_TRUE(is_retrieval(plan.budget(0, 0)));
}

TEST(HeadPlan, RefusesShapesThatOverflow) {
  EXPECT_EQ(message_of<ConfigError>([] {
              HeadPlan(std::vector<int>{1, INT_MAX});
            }),
            "layer 1: at most 65536 heads, got 2147483647");
  EXPECT_EQ(message_of<ConfigError>([] { HeadPlan(std::vector<int>{-8}); }),
            "layer 0: a plan needs at least 1 head, got -8");
  EXPECT_EQ(message_of<ConfigError>([] { HeadPlan(std::vector<int>(kMaxLayers + 1, 1)); }),
            "num_layers must be in [1, 65536], got 65537");
  EXPECT_EQ(message_of<ConfigError>([] { HeadPlan(std::vector<int>(257, kMaxHeads)); }),
            "heads of all layers must be in [1, 16777216], got 16842752");
}

TEST(HeadPlan, RefusesWindowsThatOverflow) {
  HeadPlan plan(std::vector<int>{1});
  for (const HeadBudget& budget : std::vector<HeadBudget>{
           KeepWindow{{INT64_MAX, 8}}, KeepWindow{{0, INT64_MAX - 1}}, KeepWindow{{0, INT64_MIN}},
           KeepGrowingWindow{.sink = INT64_MAX}, KeepGrowingWindow{.min_recent = INT64_MAX},
           KeepGrowingWindow{.divisor = INT64_MIN}, KeepWindowFrom{{{4, 8}}, 0},
           KeepWindowFrom{{{4, 8}}, INT64_MAX}, KeepWindowFrom{{{4, 0}}, 9},
           KeepWindowFrom{{{4, 8}, -1}, 9}, KeepSelected{-1}, KeepSelected{INT64_MAX}}) {
    EXPECT_THROW(plan.set(0, 0, budget), ConfigError);
    EXPECT_THROW(HeadPlan(std::vector<int>{1}, budget), ConfigError);
  }
  EXPECT_NO_THROW(plan.set(0, 0, KeepWindow{{kMaxTokens, kMaxTokens}}));
  EXPECT_NO_THROW(plan.set(0, 0, KeepWindow{Window::everything()}));
}

TEST(HeadPlan, RefusesAWindowThatSaysWhereItBegins) {
  HeadPlan plan(std::vector<int>{1});
  EXPECT_EQ(message_of<ConfigError>([&] {
              plan.set(0, 0, KeepWindow{{4, 8, 100}});
            }),
            "a window's from must be 0 in a budget, got 100: a head that streams from a length on "
            "is KeepWindowFrom");
  EXPECT_THROW(plan.set(0, 0, KeepWindowFrom{{{4, 8, 1}}, 100}), ConfigError);
}

TEST(ShareBudgets, GivesASharedLayerThoseOfTheLayerThatItReads) {
  const LayerShape own{.num_kv_heads = 2, .group_size = 1, .k_dim = 16, .v_dim = 16};
  LayerShape shared = own;
  shared.kv_layer = 0;
  const ModelShape shape({own, own, shared});
  HeadPlan plan(shape);
  plan.set(0, 1, KeepWindow{{4, 8}});
  plan.set(1, 0, KeepWindow{{5, 9}});
  plan.set(2, 0, KeepWindow{{6, 10}});
  const HeadPlan shares = share_budgets(plan, shape);
  for (int h = 0; h < 2; ++h) {
    EXPECT_EQ(shares.budget(2, h), plan.budget(0, h));
    EXPECT_EQ(shares.budget(1, h), plan.budget(1, h));
  }
  EXPECT_EQ(
      message_of<ConfigError>([&] { (void)share_budgets(plan, ModelShape::uniform(2, 2, 2, 16)); }),
      "the plan has 3 layers, the model 2");
  EXPECT_EQ(
      message_of<ConfigError>([&] { (void)share_budgets(plan, ModelShape::uniform(3, 1, 1, 16)); }),
      "layer 0: the plan has 2 KV heads, the model 1");
}

TEST(HeadPlan, HardenedBuildsStopAtALayerOrKvHeadOutOfRange) {
#if HEADWISE_HARDENED
  HeadPlan plan(std::vector<int>{2, 3});
  for (const int layer : {-1, 2, 7, INT_MAX, INT_MIN}) {
    EXPECT_DEATH((void)plan.num_kv_heads(layer), "layer out of range");
    EXPECT_DEATH((void)plan.budget(layer, 0), "layer out of range");
    EXPECT_DEATH(plan.set(layer, 0, {}), "layer out of range");
  }
  for (const int head : {-1, 2, INT_MAX, INT_MIN}) {  // layer 1 has a third head, layer 0 has not
    EXPECT_DEATH((void)plan.budget(0, head), "head out of range");
    EXPECT_DEATH(plan.set(0, head, {}), "head out of range");
  }
#else
  GTEST_SKIP() << "release builds do not check";
#endif
}

}  // namespace
}  // namespace headwise
