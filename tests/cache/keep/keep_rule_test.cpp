// SPDX-License-Identifier: MIT
#include "headwise/cache/keep/keep_rule.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <string>

#include "headwise/cache/keep/everything.hpp"

namespace headwise {
namespace {

TEST(KeepRule, ARangeThatEndsBeforeItBeginsIsEmpty) {
  static_assert(EntryRange{3, 7}.count() == 4);
  static_assert(EntryRange{7, 7}.count() == 0);
  static_assert(EntryRange{7, 3}.count() == 0);
}

TEST(KeepRule, HighWaterNeverFalls) {
  static_assert(StepLengths{10, 12, 17}.next_high_water() == 17);
  static_assert(StepLengths{10, 30, 17}.next_high_water() == 30);
}

TEST(KeepRule, RowsAreCountedOverAllRuns) {
  const StoredRuns runs{{{{Slot{0}, Pos{0}, 4}, {}, {Slot{9}, Pos{40}, 5}}}};
  EXPECT_EQ(runs.num_rows(), 9);
  EXPECT_EQ(StoredRuns{}.num_rows(), 0);
}

/// As EverythingRule, but its state could not be copied into a snapshot.
struct KeepsText : EverythingRule {
  struct State {
    std::string text;
  };
};

TEST(KeepRule, RemembersPlainBytesOnly) {
  static_assert(KeepRule<EverythingRule>);
  static_assert(!KeepRule<KeepsText>);
  static_assert(!KeepRule<int>);
}

}  // namespace
}  // namespace headwise
