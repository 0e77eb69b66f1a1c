// SPDX-License-Identifier: MIT
#include "headwise/policies/random_heads.hpp"

#include <gtest/gtest.h>

#include <set>
#include <string>

#include "support/errors.hpp"

namespace headwise {
namespace {

constexpr Window kWindow{.sink = 4, .recent = 60};

std::string mask_of(const HeadPlan& plan) {
  std::string mask;
  for (const HeadBudget& budget : plan.budgets()) mask += is_retrieval(budget) ? '1' : '0';
  return mask;
}

TEST(Random, IsTheSamePlanOnEveryPlatform) {
  const ModelShape shape = ModelShape::uniform(6, 8, 4, 32);
  const random_heads::Policy policy{.sparsity = .5, .window = kWindow, .seed = 1};
  // The 12 highest of the first 24 splitmix64(1) values, computed with Python's integers.
  EXPECT_EQ(mask_of(policy.plan(shape)), "111001100101010011110000");
}

TEST(Random, HasTheCountOfTheRealSelection) {
  const ModelShape shape = ModelShape::uniform(32, 32, 8, 128);
  std::set<std::string> masks;
  for (std::uint64_t seed = 0; seed < 10; ++seed) {
    const HeadPlan plan =
        random_heads::Policy{.sparsity = .2, .window = kWindow, .seed = seed}.plan(shape);
    EXPECT_DOUBLE_EQ(plan.sparsity(), 51 / 256.0);
    masks.insert(mask_of(plan));
  }
  EXPECT_EQ(masks.size(), 10U);
}

TEST(Random, NestsThePlansOfOneSeed) {
  const ModelShape shape = ModelShape::uniform(4, 8, 8, 64);
  std::string last(32, '1');
  for (int i = 0; i <= 100; ++i) {
    const std::string mask = mask_of(
        random_heads::Policy{.sparsity = i / 100.0, .window = kWindow, .seed = 9}.plan(shape));
    for (std::size_t head = 0; head < mask.size(); ++head) ASSERT_LE(mask[head], last[head]);
    last = mask;
  }
}

TEST(Random, FavoursNoHead) {
  const ModelShape shape = ModelShape::uniform(2, 8, 4, 64);
  std::vector<int> kept(8);
  for (std::uint64_t seed = 0; seed < 4000; ++seed) {
    const HeadPlan plan =
        random_heads::Policy{.sparsity = .5, .window = kWindow, .seed = seed}.plan(shape);
    for (std::size_t i = 0; i < 8; ++i) kept[i] += is_retrieval(plan.budgets()[i]) ? 1 : 0;
  }
  for (const int count : kept) EXPECT_NEAR(count, 2000, 160);  // five standard deviations
}

TEST(Random, NeedsAWindow) {
  EXPECT_EQ(testing::message_of<ConfigError>(
                [] { (void)random_heads::Policy{}.plan(ModelShape::uniform(1, 2, 2, 64)); }),
            "select needs a window: the scores do not say what a streaming head keeps");
}

}  // namespace
}  // namespace headwise
