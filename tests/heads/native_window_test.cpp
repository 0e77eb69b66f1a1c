// SPDX-License-Identifier: MIT
#include "headwise/heads/native_window.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace headwise {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

TEST(WithinWindow, KeepsTheSmallerOfTheTwo) {
  const HeadBudget native = KeepWindow{{0, 512}};
  EXPECT_EQ(within_window(KeepEverything{}, 512), native);
  EXPECT_EQ(within_window(KeepSelected{64}, 512), native);
  EXPECT_EQ(within_window(KeepWindow{{4, 1024}}, 512), native);
  EXPECT_EQ(within_window(KeepWindow{{4, 512}}, 512), native);
  EXPECT_EQ(within_window(KeepWindow{Window::everything()}, 512), native);
  EXPECT_EQ(within_window(KeepWindow{{4, 511}}, 512), HeadBudget(KeepWindow{{0, 511}}));
  EXPECT_EQ(within_window(KeepWindow{{64, 1}}, 512), HeadBudget(KeepWindow{{0, 1}}));
}

TEST(WithinWindow, CapsBothPhases) {
  EXPECT_EQ(within_window(KeepWindow{{128, 256}, 8192}, 512),
            HeadBudget(KeepWindow{{0, 256}, 512}));
  EXPECT_EQ(within_window(KeepWindow{{128, 1024}, 8192}, 512), HeadBudget(KeepWindow{{0, 512}}));
  EXPECT_EQ(within_window(KeepWindow{{128, 8192}, 256}, 512),
            HeadBudget(KeepWindow{{0, 512}, 256}));
}

TEST(WithinWindow, StreamsFromTheFirstTokenOn) {
  EXPECT_EQ(within_window(KeepWindowFrom{{{4, 64}}, 16384}, 512), HeadBudget(KeepWindow{{0, 64}}));
  EXPECT_EQ(within_window(KeepWindowFrom{{{4, 900}}, 16384}, 512),
            HeadBudget(KeepWindow{{0, 512}}));
}

TEST(WithinWindow, LeavesABudgetWhereThereIsNone) {
  const HeadBudget budget = KeepWindowFrom{{{4, 64}}, 100};
  EXPECT_EQ(within_window(budget, 0), budget);
}

TEST(WithinWindow, TakesAGrowingWindowThatFoldsOnlyBehindTheLayersOwn) {
  EXPECT_EQ(within_window(KeepGrowingWindow{4, 4000, 5}, 4000), HeadBudget(KeepWindow{{0, 4000}}));
  EXPECT_THAT(([] {
                (void)within_window(KeepGrowingWindow{4, 400, 5}, 512);
              }),
              ThrowsMessage<ConfigError>(AllOf(HasSubstr("400"), HasSubstr("512"))));
}

}  // namespace
}  // namespace headwise
