// SPDX-License-Identifier: MIT
#include "headwise/cache/keep/window_from.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>

#include "support/boundary_lengths.hpp"

namespace headwise {
namespace {

constexpr std::int64_t kPageRows = 16;

WindowFromRule rule_of(const KeepWindowFrom& budget, std::int64_t context, std::int64_t rollback,
                       PrefillMode prefill = PrefillMode::kWindowed) {
  return WindowFromRule::make(budget, {.page_tokens = kPageRows,
                                       .max_context = context,
                                       .max_rollback = rollback,
                                       .max_chunk = context,
                                       .prefill = prefill});
}

std::int64_t pages_held(const WindowFromRule& rule, std::int64_t length, std::int64_t high_water) {
  const auto held = rule.held({}, length, high_water);
  return held[0].count() + held[1].count();
}

TEST(WindowFromRule, HoldsEverythingUntilNoRollbackReachesBehindFrom) {
  for (const std::int64_t rollback : {0, 1, 15, 16, 40}) {
    const WindowFromRule rule = rule_of({{{4, 12}}, 100}, 1000, rollback);
    for (std::int64_t length = 0; length < 100 + rollback; ++length) {
      EXPECT_EQ(pages_held(rule, length, length), (length + 15) / 16) << length;
    }
    EXPECT_LT(pages_held(rule, 100 + rollback, 100 + rollback), (100 + rollback + 15) / 16);
  }
}

TEST(WindowFromRule, HoldsSinksAndAWindowAfterwards) {
  // Pages: one of sinks, and those of positions [length - rollback - 11, length).
  for (const std::int64_t rollback : {0, 1, 15, 16, 40}) {
    const WindowFromRule rule = rule_of({{{4, 12}}, 100}, 1000, rollback);
    for (std::int64_t length = 100 + rollback; length <= 1000; ++length) {
      const std::int64_t first = (length - rollback - 11) / kPageRows;
      EXPECT_EQ(pages_held(rule, length, length), 1 + (length + 15) / kPageRows - first) << length;
    }
  }
}

TEST(WindowFromRule, RollbackBringsBackWhatAShorterContextSaw) {
  const WindowFromRule rule = rule_of({{{4, 12}}, 100}, 1000, 8);
  EXPECT_EQ(rule.runs({}, 99, Phase::kDecode).num_rows(), 99);  // reached from 107
  EXPECT_EQ(rule.held({}, 99, 107)[1].first, 1);
  EXPECT_EQ(rule.runs({}, 100, Phase::kDecode).num_rows(), 4 + 11);
}

TEST(WindowFromRule, SeesEverythingBelowFromAndTheWindowFromThereOn) {
  const WindowFromRule rule = rule_of({{{4, 12}, 30}, 100}, 1000, 8);
  for (const auto& [phase, recent] : {std::pair{Phase::kPrompt, 30}, {Phase::kDecode, 12}}) {
    const Window window = rule.window(phase);
    EXPECT_TRUE(window.sees(Pos{99}, Pos{5}));
    EXPECT_FALSE(window.sees(Pos{100}, Pos{100 - recent}));
    EXPECT_TRUE(window.sees(Pos{100}, Pos{101 - recent}));
    EXPECT_TRUE(window.sees(Pos{100}, Pos{3}));
    EXPECT_EQ(rule.runs({}, 99, phase).num_rows(), 99);
    EXPECT_EQ(rule.runs({}, 100, phase).num_rows(), 4 + recent - 1);
  }
}

TEST(WindowFromRule, ChunkCausalPromptsSeeWhatTheirFirstQuerySees) {
  const WindowFromRule rule = rule_of({{{4, 12}}, 100}, 1000, 0, PrefillMode::kChunkCausal);
  EXPECT_EQ(rule.window(Phase::kPrompt), Window::everything());
  EXPECT_EQ(rule.window(Phase::kDecode), (Window{4, 12, 100}));
}

TEST(WindowFromRule, PeaksJustBeforeItStreamsWhereThatIsLate) {
  // 16384 tokens before the head streams (RTP-LLM), then 128 + 256.
  const WindowFromRule rule = rule_of({{{128, 256}}, 16384}, 131072, 8);
  EXPECT_EQ(rule.peak_entries(1), (16383 + 8 + 1 + 15) / 16);
  EXPECT_EQ(pages_held(rule, 131072, 131072), 128 / 16 + (255 + 8 + 15) / 16);
  EXPECT_EQ(rule.most_rows(), 16383);
}

TEST(WindowFromRule, EndlessNumbersAreAsGoodAsTheContext) {
  const WindowFromRule rule =
      rule_of({{{kMaxTokens, Window::kUnbounded}, kMaxTokens}, kMaxTokens}, 1000, 8);
  EXPECT_EQ(pages_held(rule, 1000, 1000), 63);
  EXPECT_EQ(rule.peak_entries(1000), 63);
  EXPECT_EQ(rule.most_rows(), 1000);
  EXPECT_EQ(rule.runs({}, 1000, Phase::kDecode).num_rows(), 1000);
}

}  // namespace
}  // namespace headwise
