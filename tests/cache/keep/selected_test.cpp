// SPDX-License-Identifier: MIT
#include "headwise/cache/keep/selected.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <optional>

#include "support/errors.hpp"

namespace headwise {
namespace {

constexpr std::int64_t kRowsAPage = 16;

SelectedRule rule_of(std::int64_t rollback) {
  return SelectedRule::make(
      {}, {.page_tokens = kRowsAPage, .max_context = 400, .max_rollback = rollback});
}

TEST(SelectedRule, HoldsEveryPageUntilItIsSelectedFrom) {
  const SelectedRule rule = rule_of(7);
  for (std::int64_t length = 0; length <= 100; ++length) {
    EXPECT_EQ(rule.held({}, length, length + 3)[0], (EntryRange{0, (length + 15) / 16}));
    EXPECT_EQ(rule.runs({}, length, Phase::kDecode).num_rows(), length);
  }
}

TEST(SelectedRule, HoldsItsClosedFormAfterEverySelection) {
  const SelectedRule rule = rule_of(7);
  for (std::int64_t n = 1; n <= 70; ++n) {
    for (std::int64_t count = 0; count <= n; ++count) {
      const auto state = rule.after_selection(n, rule.first_after(n, count));
      for (std::int64_t length = n; length <= n + 40; ++length) {
        const auto held = rule.held(state, length, length);
        // ceil(length / page) - floor((n - count) / page), and at most a page more than the rows.
        const std::int64_t pages = (length + 15) / 16 - (n - count) / 16;
        ASSERT_EQ(held[0].count() + held[1].count(), pages);
        ASSERT_LE(pages, (count + length - n + 15) / 16 + 1);
        ASSERT_EQ(rule.runs(state, length, Phase::kPrompt).num_rows(), count + length - n);
        ASSERT_EQ(rule.runs(state, length, Phase::kDecode).runs[0].first_slot.value, n - count);
      }
    }
  }
}

TEST(SelectedRule, AllHeadsCrossPagesAtOnceWhateverEachKept) {
  const SelectedRule rule = rule_of(0);
  for (std::int64_t count = 0; count <= 50; ++count) {
    const auto state = rule.after_selection(50, rule.first_after(50, count));
    for (std::int64_t length = 50; length < 120; ++length) {
      const auto changes = rule.changes(state, {length, length, length + 1});
      ASSERT_EQ(changes.take.count(), length % kRowsAPage == 0 ? 1 : 0);
      ASSERT_EQ(changes.release.count(), 0);
      ASSERT_EQ(changes.next, state);
    }
  }
}

TEST(SelectedRule, SharesWhatLiesBehindTheSelectionToo) {
  for (const std::int64_t rollback : {0, 7, 40}) {
    const SelectedRule rule = rule_of(rollback);
    EXPECT_EQ(rule.frozen({}, 64), std::max<std::int64_t>(0, 64 - rollback) / kRowsAPage);
    // Nothing is rolled back behind 60: its page is the first that anybody may write to.
    const auto state = rule.after_selection(60, 30);
    EXPECT_EQ(rule.frozen(state, 60), 60 / kRowsAPage);
    EXPECT_EQ(rule.frozen(state, 64), std::max<std::int64_t>(60, 64 - rollback) / kRowsAPage);
  }
}

TEST(SelectedRule, NotesThePositionsOfRowsBehindTheSelectionOnly) {
  const SelectedRule rule = rule_of(0);
  EXPECT_TRUE(rule.position_is_slot({}, 0));
  const auto state = rule.after_selection(60, 30);
  EXPECT_FALSE(rule.position_is_slot(state, 59));
  EXPECT_TRUE(rule.position_is_slot(state, 60));
  EXPECT_EQ(rule.of_head(state, 45), (SelectedRule::State{60, 45}));
}

TEST(SelectedRule, ForksBeginNoLowerThanTheSelection) {
  const SelectedRule rule = rule_of(7);
  EXPECT_EQ(rule.lowest_kept({}, 64), 0);
  EXPECT_EQ(rule.lowest_kept(rule.after_selection(60, 30), 64), 60);
  EXPECT_EQ(rule.lowest_kept(rule.after_selection(60, 60), 200), 60);
}

TEST(SelectedRule, LeavesToFormerForksAllThatASequenceEverHeld) {
  const SelectedRule rule = rule_of(7);
  // A selection that keeps nothing, at the longest context, gives all back.
  const auto state = rule.after_selection(400, rule.first_after(400, 0));
  const std::int64_t released =
      rule.held({}, 400, 400)[0].count() - rule.held(state, 400, 400)[0].count();
  EXPECT_EQ(released, 25);
  EXPECT_EQ(rule.released_entries(), released);
}

TEST(SelectedRule, IsOneWordThatComesBack) {
  const SelectedRule rule = rule_of(7);
  for (const std::int64_t selected : {0, 1, 60, 255, 400}) {
    for (const std::int64_t first : {std::int64_t{0}, selected / 2, selected}) {
      const auto state = rule.after_selection(selected, first);
      EXPECT_EQ(rule.from_word(rule.to_word(state), selected), state);
      EXPECT_EQ(rule.from_word(rule.to_word(state), 400), state);
      if (selected > 0) {
        EXPECT_EQ(rule.from_word(rule.to_word(state), selected - 1), std::nullopt);
      }
    }
  }
  EXPECT_EQ(rule.to_word({}), 0U);
  // The first row behind the selection, and numbers below 0.
  EXPECT_EQ(rule.from_word(rule.to_word({60, 61}), 400), std::nullopt);
  EXPECT_EQ(rule.from_word(rule.to_word({60, -1}), 400), std::nullopt);
  EXPECT_EQ(rule.from_word(rule.to_word({-1, -1}), 400), std::nullopt);
  EXPECT_EQ(rule.from_word(~std::uint64_t{0}, 400), std::nullopt);
}

TEST(SelectedRule, RefusesContextsWhosePositionsDoNotFit) {
  const KeepLimits limits{.page_tokens = 16, .max_context = std::int64_t{1} << 31};
  EXPECT_EQ(testing::message_of<ConfigError>([&] { (void)SelectedRule::make({}, limits); }),
            "selected heads have a max_context of at most 2147483647, got 2147483648");
}

}  // namespace
}  // namespace headwise
