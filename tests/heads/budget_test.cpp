// SPDX-License-Identifier: MIT
#include "headwise/heads/budget.hpp"

#include <gtest/gtest.h>

namespace headwise {
namespace {

TEST(HeadBudget, OnlyKeepingEverythingIsRetrieval) {
  EXPECT_TRUE(is_retrieval(HeadBudget{}));
  EXPECT_FALSE(is_retrieval(KeepWindow{{64, 256}}));
  EXPECT_FALSE(is_retrieval(KeepGrowingWindow{}));
  EXPECT_FALSE(is_retrieval(KeepSelected{}));
}

TEST(KeepGrowingWindow, HasTheBufferOfThePaper) {
  constexpr KeepGrowingWindow kBudget{};  // N0 = 4, S0 = 4000, C = 5
  EXPECT_EQ(kBudget.dropped(0), 0);
  EXPECT_EQ(kBudget.dropped(4000), 0);
  EXPECT_EQ(kBudget.dropped(4004), 0);
  EXPECT_EQ(kBudget.dropped(4005), 1);
  EXPECT_EQ(kBudget.recent(8192), 4000);
  EXPECT_EQ(kBudget.dropped(8192), 4188);
  EXPECT_EQ(kBudget.recent(20000), 4000);
  EXPECT_EQ(kBudget.dropped(20000), 15996);
  EXPECT_EQ(kBudget.recent(100000), 20000);
  EXPECT_EQ(kBudget.dropped(100000), 79996);
}

TEST(KeepGrowingWindow, NeverNeedsADroppedTokenBack) {
  constexpr KeepGrowingWindow kBudget{.sink = 2, .min_recent = 7, .divisor = 3};
  for (std::int64_t n = 1; n < 1000; ++n) EXPECT_GE(kBudget.dropped(n), kBudget.dropped(n - 1));
}

}  // namespace
}  // namespace headwise
