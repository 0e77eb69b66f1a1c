// SPDX-License-Identifier: MIT
#include "headwise/cache/keep/everything.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>

#include "support/boundary_lengths.hpp"

namespace headwise {
namespace {

EverythingRule rule_of(std::int64_t context, std::int64_t rollback) {
  return EverythingRule::make(
      {}, {.page_tokens = 64, .max_context = context, .max_rollback = rollback});
}

TEST(EverythingRule, HoldsEveryPageUpToItsLength) {
  const EverythingRule rule = rule_of(std::int64_t{1} << 40, 8);
  for (const std::int64_t length : test::boundary_lengths(4, 60, 64, 64)) {
    EXPECT_EQ(rule.held({}, length, length + 5)[0], (EntryRange{0, (length + 63) / 64}));
    EXPECT_EQ(rule.held({}, length, length + 5)[1].count(), 0);
    EXPECT_EQ(rule.runs({}, length, Phase::kDecode).num_rows(), length);
    EXPECT_EQ(rule.runs({}, length, Phase::kPrompt).num_rows(), length);
  }
}

TEST(EverythingRule, EveryQuerySeesEverythingBeforeIt) {
  const EverythingRule rule = rule_of(1000, 8);
  for (const Phase phase : {Phase::kPrompt, Phase::kDecode}) {
    EXPECT_EQ(rule.window(phase), Window::everything());
  }
  EXPECT_EQ(rule.folded({}, 1000).count, 0);
  EXPECT_EQ(rule.compensation_rows(), 0);
}

TEST(EverythingRule, SharesEveryFullPageThatNoRollbackReachesAndNoOther) {
  for (const std::int64_t rollback : {0, 1, 63, 64, 65, 200}) {
    const EverythingRule rule = rule_of(1000, rollback);
    for (std::int64_t high_water = 0; high_water <= 600; ++high_water) {
      const std::int64_t lowest = std::max<std::int64_t>(0, high_water - rollback);
      const std::int64_t frozen = rule.frozen({}, high_water);
      EXPECT_LE(frozen * 64, lowest);       // the next row after any rollback lies behind them
      EXPECT_GT(frozen * 64 + 64, lowest);  // and the page behind them may get it
    }
  }
}

TEST(EverythingRule, CountsBeyond32Bits) {
  const std::int64_t far = std::int64_t{1} << 39;
  const EverythingRule rule = rule_of(2 * far, 8);
  EXPECT_EQ(rule.changes({}, {far, far, far + 1}).take, (EntryRange{far / 64, far / 64 + 1}));
  EXPECT_EQ(rule.changes({}, {far, far, far + 1}).release.count(), 0);
  EXPECT_EQ(rule.rolled_back({}, far + 1, far), (EntryRange{far / 64, far / 64 + 1}));
  EXPECT_EQ(rule.frozen({}, far), far / 64 - 1);
  EXPECT_EQ(rule.peak_entries(1), 2 * far / 64);
}

}  // namespace
}  // namespace headwise
