// SPDX-License-Identifier: MIT
#include "headwise/heads/plan.hpp"

#include <gtest/gtest.h>

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
            "a plan needs at least one layer, got 0");
  EXPECT_EQ(message_of<ConfigError>([] {
              HeadPlan(std::vector<int>{2, 0});
            }),
            "layer 1: a plan needs at least 1 KV head, got 0");
}

TEST(HeadPlan, RefusesBudgetsOutOfRange) {
  HeadPlan plan(std::vector<int>{1});
  EXPECT_EQ(message_of<ConfigError>([&] {
              plan.set(0, 0, KeepWindow{{-1, 8}});
            }),
            "sink must be >= 0, got -1");
  EXPECT_EQ(message_of<ConfigError>([&] {
              plan.set(0, 0, KeepWindow{{4, 0}});
            }),
            "recent counts the current token and must be >= 1, got 0");
  EXPECT_EQ(message_of<ConfigError>([&] { plan.set(0, 0, KeepGrowingWindow{.divisor = 0}); }),
            "divisor must be >= 1, got 0");
  EXPECT_EQ(message_of<ConfigError>([&] { plan.set(0, 0, KeepGrowingWindow{.min_recent = 0}); }),
            "min_recent must be >= 1, got 0");
  EXPECT_TRUE(is_retrieval(plan.budget(0, 0)));
}

}  // namespace
}  // namespace headwise
