// SPDX-License-Identifier: MIT
#include "headwise/heads/shard.hpp"

#include <gtest/gtest.h>

#include <vector>

#include "support/errors.hpp"

namespace headwise {
namespace {

using testing::message_of;

/// Head `h` of layer `l` keeps a window of 100 l + h + 1.
HeadPlan numbered_plan(const std::vector<int>& heads) {
  HeadPlan plan(heads);
  for (int layer = 0; layer < plan.num_layers(); ++layer) {
    for (int head = 0; head < plan.num_kv_heads(layer); ++head) {
      plan.set(layer, head, KeepWindow{{0, 100 * layer + head + 1}});
    }
  }
  return plan;
}

TEST(Shard, CutsTheColumnsOfEveryLayer) {
  const HeadPlan plan = numbered_plan({8, 4});
  const HeadPlan part = shard(plan, 1, 2);
  EXPECT_EQ(part.num_layers(), 2);
  EXPECT_EQ(part.num_kv_heads(0), 4);
  EXPECT_EQ(part.num_kv_heads(1), 2);
  EXPECT_EQ(part.budget(0, 0), plan.budget(0, 4));
  EXPECT_EQ(part.budget(0, 3), plan.budget(0, 7));
  EXPECT_EQ(part.budget(1, 1), plan.budget(1, 3));
  EXPECT_EQ(shard(plan, 0, 1), plan);
}

TEST(Shard, GivesEveryHeadToOneRank) {
  const HeadPlan plan = numbered_plan({8, 4});
  for (const int ranks : {1, 2, 4}) {
    for (int layer = 0; layer < 2; ++layer) {
      int head = 0;
      for (int rank = 0; rank < ranks; ++rank) {
        const HeadPlan part = shard(plan, rank, ranks);
        for (int i = 0; i < part.num_kv_heads(layer); ++i) {
          EXPECT_EQ(part.budget(layer, i), plan.budget(layer, head++));
        }
      }
      EXPECT_EQ(head, plan.num_kv_heads(layer));
    }
  }
}

TEST(Shard, RefusesRanksThatDoNotDivide) {
  const HeadPlan plan = numbered_plan({8, 4});
  EXPECT_EQ(message_of<ConfigError>([&] { (void)shard(plan, 0, 8); }),
            "layer 1: 8 ranks do not divide 4 KV heads");
  EXPECT_EQ(message_of<ConfigError>([&] { (void)shard(plan, 2, 2); }),
            "rank must be in [0, 2), got 2");
  EXPECT_EQ(message_of<ConfigError>([&] { (void)shard(plan, -1, 2); }),
            "rank must be in [0, 2), got -1");
  EXPECT_EQ(message_of<ConfigError>([&] { (void)shard(plan, 0, 0); }),
            "num_ranks must be at least 1, got 0");
}

}  // namespace
}  // namespace headwise
