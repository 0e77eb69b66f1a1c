// SPDX-License-Identifier: MIT
#include "headwise/cache/keep/window.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <set>
#include <vector>

#include "support/sight.hpp"

namespace headwise {
namespace {

KeepLimits window_limits(std::int64_t context, std::int64_t rollback,
                         PrefillMode prefill = PrefillMode::kWindowed) {
  return {.page_tokens = 16,
          .max_context = context,
          .max_rollback = rollback,
          .max_chunk = context,
          .prefill = prefill};
}

WindowRule rule_of(const KeepWindow& keep, const KeepLimits& limits) {
  return WindowRule::make(keep, limits);
}

/// Windows around a page of 16, some of them wider or narrower while a prompt is read.
std::vector<KeepWindow> windows() {
  return {{{0, 1}},     {{4, 12}},     {{16, 16}},    {{17, 30}},   {{0, 1}, 9},
          {{4, 12}, 5}, {{4, 12}, 13}, {{4, 12}, 40}, {{17, 30}, 1}};
}

struct WindowCase {
  KeepWindow keep;
  KeepLimits limits;
};
std::vector<WindowCase> window_cases() {
  std::vector<WindowCase> cases;
  for (const std::int64_t rollback : {0, 1, 7, 16, 40}) {
    for (const PrefillMode prefill : {PrefillMode::kWindowed, PrefillMode::kChunkCausal}) {
      for (const KeepWindow& keep : windows()) {
        cases.push_back({keep, window_limits(400, rollback, prefill)});
      }
    }
  }
  return cases;
}

TEST(WindowRule, RowsAreSinkRecentAndRollbackInWholePages) {
  EXPECT_EQ(rule_of({{16, 64}}, window_limits(1000, 0)).rows, 80);
  EXPECT_EQ(rule_of({{16, 64}}, window_limits(1000, 1)).rows, 96);
  EXPECT_EQ(rule_of({{4, 12}}, window_limits(1000, 0)).rows, 16);
  EXPECT_EQ(rule_of({{4, 13}}, window_limits(1000, 0)).rows, 32);
  EXPECT_EQ(rule_of({{0, 1}}, window_limits(1000, 15)).rows, 16);
  // Both prefill modes need the same rows.
  EXPECT_EQ(rule_of({{4, 12}}, window_limits(1000, 0, PrefillMode::kChunkCausal)).rows, 16);
}

TEST(WindowRule, TheRingHoldsTheWiderOfPromptAndDecode) {
  EXPECT_EQ(rule_of({{4, 12}, 28}, window_limits(1000, 0)).rows, 32);
  EXPECT_EQ(rule_of({{4, 28}, 12}, window_limits(1000, 0)).rows, 32);
  EXPECT_EQ(rule_of({{4, 28}, 0}, window_limits(1000, 0)).rows, 32);  // 0: the same
}

TEST(WindowRule, EachPhaseSeesItsOwnWindow) {
  for (const WindowCase& rule_case : window_cases()) {
    const WindowRule rule = rule_of(rule_case.keep, rule_case.limits);
    const PrefillMode prefill = rule_case.limits.prefill;
    for (const Phase phase : {Phase::kPrompt, Phase::kDecode}) {
      for (std::int64_t length = 0; length <= 150; ++length) {
        const auto how = [&](std::int64_t query, std::int64_t key) {
          return test::sight(rule_case.keep, prefill, 16, phase, length, query, key) !=
                 test::Sight::kNot;
        };
        std::vector<std::int64_t> seen;
        for (const KvRun& run : rule.runs({1}, length, phase).runs) {
          for (std::int64_t i = 0; i < run.count; ++i) seen.push_back(run.first_pos.value + i);
        }
        std::vector<std::int64_t> expected;
        for (std::int64_t key = 0; key < length; ++key) {
          if (how(length, key)) expected.push_back(key);
        }
        ASSERT_EQ(seen, expected) << length;
        for (std::int64_t query = length; query < length + 20; ++query) {
          for (const std::int64_t key : seen) {
            ASSERT_EQ(rule.window(phase).sees(Pos{query}, Pos{key}), how(query, key));
          }
          for (std::int64_t own = length; own <= query; ++own) {
            ASSERT_EQ(rule.window(phase).sees(Pos{query}, Pos{own}), how(query, own));
          }
        }
      }
    }
  }
}

TEST(WindowRule, NeverHoldsMoreThanTheContext) {
  for (const KeepWindow keep :
       {KeepWindow{{4, 4000}}, KeepWindow{{4000, 4}}, KeepWindow{{50, 60}},
        KeepWindow{Window::everything()}, KeepWindow{{4, 4}, Window::kUnbounded}}) {
    const WindowRule rule = rule_of(keep, window_limits(100, 8));
    EXPECT_EQ(rule.rows, 112);
    EXPECT_EQ(rule.peak_entries(100), 7);
    for (std::int64_t length = 0; length <= 100; ++length) {
      ASSERT_TRUE(rule.in_place({0, 0, length}));
      ASSERT_TRUE(rule.in_place({length, length, 100}));
      ASSERT_EQ(rule.held({}, length, length)[0], (EntryRange{0, (length + 15) / 16}));
      ASSERT_EQ(rule.slots({}).slot(Pos{length}), Slot{length});
    }
  }
}

TEST(WindowRule, WritesInPlaceOnlyOverRowsThatNobodyMayAskFor) {
  for (const WindowCase& rule_case : window_cases()) {
    const WindowRule rule = rule_of(rule_case.keep, rule_case.limits);
    const std::int64_t rollback = rule_case.limits.max_rollback;
    const SlotMap slots = rule.slots({});
    // A step at `lowest` still sees this far back; its drop must leave no trace either.
    const std::int64_t back =
        std::max(rule_case.keep.window.recent, rule_case.keep.prompt_recent) - 1;
    for (std::int64_t high_water = 0; high_water <= 130; ++high_water) {
      const std::int64_t lowest = std::max<std::int64_t>(0, high_water - rollback);
      for (std::int64_t length = lowest; length <= high_water; ++length) {
        std::int64_t next = length;  // the longest step in place writes most
        for (std::int64_t n = length; n <= length + 90; ++n) {
          if (rule.in_place({length, high_water, n})) next = n;
        }
        std::vector<bool> written(static_cast<std::size_t>(rule.rows));
        for (std::int64_t pos = length; pos < next; ++pos) {
          written[static_cast<std::size_t>(slots.slot(Pos{pos}).value)] = true;
        }
        for (std::int64_t pos = 0; pos < length; ++pos) {
          if (pos >= rule.sink && pos < lowest - back) continue;  // out of everybody's reach
          ASSERT_FALSE(written[static_cast<std::size_t>(slots.slot(Pos{pos}).value)])
              << "sink " << rule.sink << ", recent " << rule.recent << "/" << rule.prompt_recent
              << ", rollback " << rollback << ": " << length << " of " << high_water << " to "
              << next << " overwrites " << pos;
        }
      }
    }
  }
}

TEST(WindowRule, DecodeNeverNeedsASecondRing) {
  for (const WindowCase& rule_case : window_cases()) {
    const WindowRule rule = rule_of(rule_case.keep, rule_case.limits);
    for (std::int64_t high_water = 0; high_water < 300; ++high_water) {
      const std::int64_t lowest =
          std::max<std::int64_t>(0, high_water - rule_case.limits.max_rollback);
      for (std::int64_t length = lowest; length <= high_water; ++length) {
        ASSERT_TRUE(rule.in_place({length, high_water, length + 1}));
      }
    }
    EXPECT_EQ(rule.peak_entries(1), rule.pages_per_bank());
  }
}

TEST(WindowRule, AChunkNeedsASecondRingFromOneTokenMoreThanTheSlack) {
  // 16 + 64 + 8 of 96 rows: 8 rows of slack beyond what rollback needs, and the token just seen.
  const WindowRule rule = rule_of({{16, 64}}, window_limits(1000, 8));
  EXPECT_EQ(rule.peak_entries(9), 6);
  EXPECT_EQ(rule.peak_entries(10), 12);
  EXPECT_TRUE(rule.in_place({500, 500, 509}));
  EXPECT_FALSE(rule.in_place({500, 500, 510}));
  // Rolled back: the high water counts, for a rollback may go on from there.
  EXPECT_TRUE(rule.in_place({500 - 8, 500, 509}));
  EXPECT_FALSE(rule.in_place({500 - 8, 500, 510}));
  // A first chunk has nothing to overwrite, and a step that only fills the ring neither.
  EXPECT_TRUE(rule.in_place({0, 0, 1000}));
  EXPECT_TRUE(rule.in_place({10, 10, 96}));
}

TEST(WindowRule, AStepThatSwitchesRingsWritesTheOtherBankAndGivesItsOwnBack) {
  const WindowRule rule = rule_of({{4, 12}}, window_limits(1000, 0));
  for (const std::uint8_t bank : {std::uint8_t{0}, std::uint8_t{1}}) {
    const std::int64_t here = bank;
    const std::int64_t there = 1 - bank;
    const StepLengths step{100, 100, 150};
    const auto changes = rule.changes({bank}, step);
    EXPECT_EQ(changes.take, (EntryRange{there, there + 1}));
    EXPECT_EQ(changes.release, (EntryRange{here, here + 1}));
    EXPECT_EQ(changes.next.bank, there);
    EXPECT_EQ(rule.slots({bank}).first_entry, here);
    EXPECT_EQ(rule.append_slots({bank}, step).first_entry, there);
  }
}

TEST(WindowRule, NoPageOfARingIsEverShared) {
  for (const WindowCase& rule_case : window_cases()) {
    const WindowRule rule = rule_of(rule_case.keep, rule_case.limits);
    for (const std::uint8_t bank : {std::uint8_t{0}, std::uint8_t{1}}) {
      for (std::int64_t length = 0; length <= 200; length += 7) {
        EXPECT_LE(rule.frozen({bank}, length), rule.held({bank}, length, length)[0].first);
      }
    }
  }
}

TEST(WindowRule, TablesDoNotGrowWithTheContext) {
  const WindowRule rule = rule_of({{16, 64}}, window_limits(std::int64_t{1} << 40, 8));
  EXPECT_EQ(rule.table_entries(3), 3);
  EXPECT_EQ(rule.table_entries(5), 5);
  EXPECT_EQ(rule.table_entries(6), 12);  // two banks
  EXPECT_EQ(rule.table_entries(std::int64_t{1} << 36), 12);
}

TEST(WindowRule, CountsBeyond32Bits) {
  const std::int64_t far = std::int64_t{1} << 39;
  const WindowRule rule = rule_of({{16, 64}}, window_limits(2 * far, 8));
  EXPECT_EQ(rule.rows, 96);
  EXPECT_TRUE(rule.in_place({far, far, far + 1}));
  EXPECT_FALSE(rule.in_place({far, far, far + 40}));
  const StoredRuns runs = rule.runs({}, far, Phase::kDecode);
  EXPECT_EQ(runs.num_rows(), 16 + 63);
  EXPECT_EQ(runs.runs[1].first_pos, Pos{far - 63});
}

TEST(WindowRule, HasAWindowForPromptsAndOneForDecode) {
  // LServe: 128 sinks, 8192 newest tokens while a prompt is read, 256 in decode. The ring has the
  // wider one's: ceil((128 + 8192 + 8) / 64) pages.
  const WindowRule rule = WindowRule::make(
      {{128, 256}, 8192},
      {.page_tokens = 64, .max_context = 131072, .max_rollback = 8, .max_chunk = 131072});
  EXPECT_EQ(rule.window(Phase::kPrompt), (Window{128, 8192}));
  EXPECT_EQ(rule.window(Phase::kDecode), (Window{128, 256}));
  EXPECT_EQ(rule.runs({}, 100000, Phase::kPrompt).num_rows(), 128 + 8191);
  EXPECT_EQ(rule.runs({}, 100000, Phase::kDecode).num_rows(), 128 + 255);
  EXPECT_EQ(rule.held({}, 100000, 100000)[0].count(), 131);
}

}  // namespace
}  // namespace headwise
