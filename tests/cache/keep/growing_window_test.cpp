// SPDX-License-Identifier: MIT
#include "headwise/cache/keep/growing_window.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <map>
#include <random>
#include <set>
#include <vector>

namespace headwise {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

KeepLimits growing_limits(std::int64_t context, std::int64_t rollback,
                          std::int64_t page_tokens = 16) {
  return {.page_tokens = page_tokens,
          .max_context = context,
          .max_rollback = rollback,
          .max_chunk = context,
          .prefill = PrefillMode::kChunkCausal};
}

TEST(GrowingWindowRule, FoldsThePublishedNumbersInWholePages) {
  // RazorAttention: N0 = 4, S0 = 4000, C = 5. N -> dropped tokens, before rounding to pages.
  const struct {
    std::int64_t length;
    std::int64_t dropped;
  } published[] = {{4000, 0}, {8192, 4188}, {20000, 15996}, {100000, 79996}};
  for (const int page_tokens : {16, 64}) {
    const auto rule = GrowingWindowRule::make({}, growing_limits(131072, 8, page_tokens));
    for (const auto& [length, dropped] : published) {
      const std::int64_t folded = rule.folded({}, length).count;
      EXPECT_LE(folded, dropped) << length;
      EXPECT_GT(folded, dropped - page_tokens) << length;
      EXPECT_EQ(folded + rule.runs({}, length, Phase::kDecode).num_rows(), length);
    }
    EXPECT_EQ(rule.folded({}, 20000).count, 15996);  // page boundaries for both page sizes
    EXPECT_EQ(rule.folded({}, 100000).count, 79996);
  }
}

TEST(GrowingWindowRule, FoldsNothingBeforeTheBufferIsFull) {
  const auto rule = GrowingWindowRule::make({}, growing_limits(131072, 0));
  for (std::int64_t length = 0; length <= 4004; ++length) {
    ASSERT_EQ(rule.folded({}, length).count, 0) << length;
    ASSERT_EQ(rule.runs({}, length, Phase::kDecode).num_rows(), length);
  }
}

TEST(GrowingWindowRule, FoldNeverGoesBackAndStaysWithinAPageOfThePaper) {
  for (const KeepGrowingWindow budget :
       {KeepGrowingWindow{4, 50, 5}, KeepGrowingWindow{0, 16, 2}, KeepGrowingWindow{33, 20, 3},
        KeepGrowingWindow{4, 9, 1}}) {
    const auto rule = GrowingWindowRule::make(budget, growing_limits(4000, 0));
    std::int64_t last = 0;
    for (std::int64_t length = 0; length <= 3000; ++length) {
      const std::int64_t folded = rule.folded({}, length).count;
      ASSERT_GE(folded, last);
      ASSERT_LE(folded, budget.dropped(length));
      ASSERT_GT(folded + 16, budget.dropped(length)) << length;
      last = folded;
    }
  }
}

/// A head's compensation rows as sets of the positions that they stand for, step by step.
class FoldedRowsOf {
 public:
  using Positions = std::set<std::int64_t>;

  explicit FoldedRowsOf(const GrowingWindowRule& rule) : rule_(rule) {}

  void grow_to(std::int64_t next) {
    const StepLengths step{length_, high_water_, next};
    const auto changes = rule_.changes(state_, step);
    std::map<std::int64_t, Positions> rows = rows_;
    rule_.for_each_fold(state_, step, [&](const FoldMove& move) {
      ASSERT_GE(move.to, 0);
      ASSERT_LT(move.to, rule_.compensation_rows());
      Positions sum;
      if (move.from) {
        ASSERT_TRUE(rows.contains(*move.from)) << "begins with a row that was never made";
        sum = rows[*move.from];
      }
      for (std::int64_t row = move.first_row; row < move.end_row; ++row) {
        ASSERT_TRUE(sum.insert(move.entry * 16 + row).second) << "a row was added twice";
      }
      ASSERT_EQ(static_cast<std::int64_t>(sum.size()), move.count);
      rows[move.to] = sum;
    });
    // A drop of this step must find the committed rows as they were.
    check(rows, state_, length_, high_water_);
    rows_ = rows;
    state_ = changes.next;
    length_ = next;
    high_water_ = std::max(high_water_, next);
    check(rows_, state_, length_, high_water_);
  }
  void roll_back_to(std::int64_t length) {
    length_ = length;
    check(rows_, state_, length_, high_water_);
  }
  std::int64_t length() const { return length_; }
  std::int64_t high_water() const { return high_water_; }

 private:
  /// Every length in reach of a rollback has its row: the positions behind the sinks up to its
  /// fold.
  void check(const std::map<std::int64_t, Positions>& rows, GrowingWindowRule::State state,
             std::int64_t length, std::int64_t high_water) const {
    for (std::int64_t at = std::max<std::int64_t>(0, high_water - rule_.max_rollback); at <= length;
         ++at) {
      const FoldedRows folded = rule_.folded(state, at);
      if (folded.count == 0) continue;
      Positions expected;
      for (std::int64_t pos = rule_.budget.sink; pos < rule_.fold(at); ++pos) expected.insert(pos);
      ASSERT_EQ(static_cast<std::int64_t>(expected.size()), folded.count);
      ASSERT_EQ(rows.at(folded.row), expected) << "at " << at << " of " << high_water;
    }
  }

  GrowingWindowRule rule_;
  GrowingWindowRule::State state_;
  std::int64_t length_ = 0;
  std::int64_t high_water_ = 0;
  std::map<std::int64_t, Positions> rows_;
};

TEST(GrowingWindowRule, EveryLengthInReachHasItsCompensationRowOnARandomWalk) {
  std::mt19937 random(11);
  for (const std::int64_t rollback : {0, 1, 15, 16, 17, 33, 40}) {
    for (const KeepGrowingWindow budget :
         {KeepGrowingWindow{4, 40, 3}, KeepGrowingWindow{0, 40, 2}, KeepGrowingWindow{16, 40, 1},
          KeepGrowingWindow{33, 64, 7}}) {
      FoldedRowsOf rows(GrowingWindowRule::make(budget, growing_limits(3000, rollback)));
      while (rows.length() < 600 && !HasFatalFailure()) {
        rows.grow_to(rows.length() +
                     static_cast<std::int64_t>(random() % 3 == 0 ? random() % 150 : random() % 4));
        const std::int64_t lowest = std::max<std::int64_t>(0, rows.high_water() - rollback);
        if (random() % 3 == 0 && lowest < rows.length()) {
          rows.roll_back_to(lowest +
                            static_cast<std::int64_t>(random()) % (rows.length() - lowest));
        }
      }
    }
  }
}

TEST(GrowingWindowRule, AStepThatFoldsNothingMakesNoRow) {
  const auto rule = GrowingWindowRule::make({4, 40, 3}, growing_limits(3000, 0));
  int moves = 0;
  for (std::int64_t length = 0; length < 45; ++length) {
    rule.for_each_fold({}, {length, length, length + 1}, [&](const FoldMove&) { ++moves; });
  }
  EXPECT_EQ(moves, 0);
}

TEST(GrowingWindowRule, SharesNoPageThatAnAppendOrARollbackReaches) {
  for (const std::int64_t rollback : {0, 1, 15, 16, 17, 40}) {
    const auto rule = GrowingWindowRule::make({4, 40, 3}, growing_limits(3000, rollback));
    for (std::int64_t high_water = 0; high_water < 500; ++high_water) {
      const std::int64_t lowest = std::max<std::int64_t>(0, high_water - rollback);
      EXPECT_LE(rule.frozen({}, high_water) * 16, lowest);
      EXPECT_GT(rule.frozen({}, high_water) * 16 + 16, lowest);
    }
  }
}

TEST(GrowingWindowRule, RefusesRollbackBehindItsBuffer) {
  EXPECT_THAT(
      [] {
        GrowingWindowRule::make({4, 40, 5}, growing_limits(3000, 41));
      },
      ThrowsMessage<ConfigError>(AllOf(HasSubstr("40"), HasSubstr("41"))));
  EXPECT_NO_THROW(GrowingWindowRule::make({4, 40, 5}, growing_limits(3000, 40)));
}

TEST(GrowingWindowRule, PrefillsChunkCausalOnly) {
  KeepLimits limits = growing_limits(3000, 0);
  limits.prefill = PrefillMode::kWindowed;
  EXPECT_THAT([&] { GrowingWindowRule::make({}, limits); },
              ThrowsMessage<ConfigError>(HasSubstr("kChunkCausal")));
}

TEST(GrowingWindowRule, EndlessNumbersAreAsGoodAsTheContext) {
  constexpr std::int64_t kEndless = std::numeric_limits<std::int64_t>::max();
  for (const KeepGrowingWindow budget :
       {KeepGrowingWindow{kEndless, kEndless, kEndless}, KeepGrowingWindow{kEndless, 5, 2},
        KeepGrowingWindow{4, kEndless, 1}}) {
    const auto rule = GrowingWindowRule::make(budget, growing_limits(2000, 5));
    const auto held = rule.held({}, 2000, 2000);
    EXPECT_EQ(held[0].count() + held[1].count(), 125);
    EXPECT_EQ(rule.peak_entries(2000), 125);
    EXPECT_EQ(rule.folded({}, 2000).count, 0);
  }
}

}  // namespace
}  // namespace headwise
