// SPDX-License-Identifier: MIT
#include "headwise/policies/pinned.hpp"

#include <gtest/gtest.h>

#include <vector>

#include "support/errors.hpp"

namespace headwise {
namespace {

using testing::message_of;

TEST(Pinned, KeepsItsHeadsAndLeavesTheOthers) {
  const HeadPlan streaming(std::vector<int>{2, 2}, KeepWindow{{4, 60}});
  const HeadPlan plan = pinned::Policy{{{1, 0}, {1, 0}}}.plan(streaming);
  EXPECT_TRUE(is_retrieval(plan.budget(1, 0)));
  EXPECT_EQ(plan.sparsity(), .75);
  EXPECT_EQ(plan.budget(0, 0), streaming.budget(0, 0));
  EXPECT_EQ(pinned::Policy{}.plan(streaming), streaming);
  EXPECT_EQ((pinned::Policy{{{1, 0}}}.plan(plan)), plan);
}

TEST(Pinned, RefusesHeadsThatAreNotThere) {
  const HeadPlan plan(std::vector<int>{2, 3});
  const auto message = [&](HeadId head) {
    return message_of<ConfigError>([&] { (void)pinned::Policy{{head}}.plan(plan); });
  };
  EXPECT_EQ(message({2, 0}), "pinned layer 2 is not in [0, 2)");
  EXPECT_EQ(message({-1, 0}), "pinned layer -1 is not in [0, 2)");
  EXPECT_EQ(message({1, 3}), "pinned KV head 3 of layer 1 is not in [0, 3)");
  EXPECT_EQ(message({0, -1}), "pinned KV head -1 of layer 0 is not in [0, 2)");
}

}  // namespace
}  // namespace headwise
