// SPDX-License-Identifier: MIT
#include "headwise/cache/keep/keep_rule.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <limits>
#include <string>

#include "headwise/cache/keep/everything.hpp"

namespace headwise {
namespace {

TEST(KeepRule, RoundsToPages) {
  static_assert(ceil_div(0, 16) == 0 && ceil_div(1, 16) == 1 && ceil_div(16, 16) == 1);
  static_assert(round_up(0, 16) == 0 && round_up(1, 16) == 16 && round_up(17, 16) == 32);
  constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();
  static_assert(ceil_div(kMost, 16) == kMost / 16 + 1);
}

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
