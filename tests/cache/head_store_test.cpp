// SPDX-License-Identifier: MIT
#include "headwise/cache/head_store.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <set>
#include <variant>
#include <vector>

#include "support/boundary_lengths.hpp"

namespace headwise {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::ThrowsMessage;
using Entries = std::set<std::int64_t>;

CacheOptions options_of(std::int64_t context, std::int64_t rollback,
                        PrefillMode prefill = PrefillMode::kWindowed) {
  CacheOptions options;
  options.page_tokens = 16;
  options.max_context = context;
  options.max_rollback = rollback;
  options.prefill = prefill;
  return options;
}

/// Stores of every kind with small windows, so that all boundaries come early.
struct StoreCase {
  HeadBudget budget;
  CacheOptions options;
};
std::vector<StoreCase> store_cases() {
  std::vector<StoreCase> cases;
  for (const std::int64_t rollback : {0, 1, 7, 16, 40}) {
    for (const PrefillMode prefill : {PrefillMode::kWindowed, PrefillMode::kChunkCausal}) {
      const CacheOptions options = options_of(400, rollback, prefill);
      cases.push_back({KeepEverything{}, options});
      for (const Window window : {Window{0, 1}, Window{4, 12}, Window{16, 16}, Window{17, 30}}) {
        cases.push_back({KeepWindow{window}, options});
      }
      if (prefill == PrefillMode::kWindowed) continue;
      for (const std::int64_t sink : {0, 4, 16, 20}) {
        cases.push_back({KeepGrowingWindow{sink, 40, 3}, options});
      }
    }
  }
  return cases;
}

Entries entries(const std::array<EntryRange, 2>& ranges) {
  Entries out;
  for (const EntryRange& range : ranges) {
    for (std::int64_t i = range.first; i < range.last; ++i) {
      EXPECT_TRUE(out.insert(i).second) << "held twice: " << i;
    }
  }
  return out;
}
Entries entries(const EntryRange& range) { return entries(std::array<EntryRange, 2>{range, {}}); }

TEST(HeadStore, ChangesLeadFromWhatIsHeldToWhatIsHeld) {
  for (const StoreCase& store_case : store_cases()) {
    const HeadBudget& budget = store_case.budget;
    const CacheOptions& options = store_case.options;
    std::visit(
        [&](const auto& store) {
          for (std::int64_t length = 0; length <= 120; length += 3) {
            for (std::int64_t ahead = 0; ahead <= options.max_rollback; ahead += 5) {
              for (const std::int64_t tokens : {0, 1, 2, 15, 16, 17, 60, 200}) {
                for (const int bank : {0, 1}) {
                  const StepLengths step{length, length + ahead, length + tokens};
                  const PageChanges changes = store.changes(step, bank);
                  Entries held = entries(store.held(step.length, step.high_water, bank));
                  for (const std::int64_t i : entries(changes.take)) {
                    ASSERT_TRUE(held.insert(i).second) << "taken though held: " << i;
                  }
                  for (const std::int64_t i : entries(changes.release)) {
                    ASSERT_EQ(held.erase(i), 1U) << "released though not held: " << i;
                  }
                  const int after = changes.flips_bank ? 1 - bank : bank;
                  ASSERT_EQ(held, entries(store.held(step.next, step.next_high_water(), after)))
                      << length << " of " << step.high_water << " to " << step.next;
                  if (!held.empty()) {
                    ASSERT_GE(*held.begin(), 0);
                    ASSERT_LT(*held.rbegin(), store.table_entries());
                  }
                }
              }
            }
          }
        },
        make_store(budget, options));
  }
}

TEST(HeadStore, RollbackGivesBackExactlyWhatIsNoLongerHeld) {
  for (const StoreCase& store_case : store_cases()) {
    const HeadBudget& budget = store_case.budget;
    const CacheOptions& options = store_case.options;
    std::visit(
        [&](const auto& store) {
          for (std::int64_t high_water = 0; high_water <= 150; ++high_water) {
            const std::int64_t lowest =
                std::max<std::int64_t>(0, high_water - options.max_rollback);
            for (std::int64_t from = lowest; from <= high_water; from += 3) {
              for (std::int64_t to = lowest; to <= from; to += 3) {
                Entries held = entries(store.held(from, high_water, 1));
                for (const std::int64_t i : entries(store.rolled_back(from, to, 1))) {
                  ASSERT_EQ(held.erase(i), 1U);
                }
                ASSERT_EQ(held, entries(store.held(to, high_water, 1)));
              }
            }
          }
        },
        make_store(budget, options));
  }
}

TEST(HeadStore, HoldsThePageOfEveryRowThatAnyPermittedLengthMaySee) {
  for (const StoreCase& store_case : store_cases()) {
    const HeadBudget& budget = store_case.budget;
    const CacheOptions& options = store_case.options;
    std::visit(
        [&](const auto& store) {
          for (std::int64_t high_water = 0; high_water <= 300; ++high_water) {
            const std::int64_t lowest =
                std::max<std::int64_t>(0, high_water - options.max_rollback);
            for (std::int64_t length = lowest; length <= high_water; ++length) {
              const Entries held = entries(store.held(length, high_water, 0));
              for (const KvRun& run : store.runs(length).runs) {
                if (run.count <= 0) continue;
                for (std::int64_t i = run.first_slot.value / 16;
                     i <= (run.first_slot.value + run.count - 1) / 16; ++i) {
                  ASSERT_TRUE(held.contains(i)) << "length " << length << " of " << high_water;
                }
              }
            }
          }
        },
        make_store(budget, options));
  }
}

TEST(HeadStore, RunsAreOldestFirstAndEndAtTheLength) {
  for (const StoreCase& store_case : store_cases()) {
    const HeadBudget& budget = store_case.budget;
    const CacheOptions& options = store_case.options;
    std::visit(
        [&](const auto& store) {
          for (std::int64_t length = 0; length <= 200; ++length) {
            const StoredRuns stored = store.runs(length);
            std::int64_t next = 0;
            std::int64_t rows = 0;
            for (const KvRun& run : stored.runs) {
              if (run.count == 0) continue;
              ASSERT_GE(run.first_pos.value, next);
              next = run.first_pos.value + run.count;
              rows += run.count;
            }
            ASSERT_LE(next, length);
            ASSERT_EQ(stored.num_rows(), rows);
            ASSERT_LE(rows + stored.folded, length);
          }
        },
        make_store(budget, options));
  }
}

// Streaming --------------------------------------------------------------------------------------

StreamingStore streaming(const Window& window, const CacheOptions& options) {
  return StreamingStore::make(window, options);
}

TEST(StreamingStore, RowsAreSinkRecentAndRollbackInWholePages) {
  EXPECT_EQ(streaming({16, 64}, options_of(1000, 0)).ring.rows, 80);
  EXPECT_EQ(streaming({16, 64}, options_of(1000, 1)).ring.rows, 96);
  EXPECT_EQ(streaming({4, 12}, options_of(1000, 0)).ring.rows, 16);
  EXPECT_EQ(streaming({4, 13}, options_of(1000, 0)).ring.rows, 32);
  EXPECT_EQ(streaming({0, 1}, options_of(1000, 15)).ring.rows, 16);
  // Both prefill modes need the same rows.
  EXPECT_EQ(streaming({4, 12}, options_of(1000, 0, PrefillMode::kChunkCausal)).ring.rows, 16);
}

TEST(StreamingStore, NeverHoldsMoreThanTheContext) {
  for (const Window window :
       {Window{4, 4000}, Window{4000, 4}, Window{50, 60}, Window::everything()}) {
    const StreamingStore store = streaming(window, options_of(100, 8));
    EXPECT_EQ(store.ring.rows, 112);
    for (std::int64_t length = 0; length <= 100; ++length) {
      ASSERT_TRUE(store.in_place({0, 0, length}));
      ASSERT_TRUE(store.in_place({length, length, 100}));
      ASSERT_EQ(entries(store.held(length, length, 0)).size(),
                static_cast<std::size_t>((length + 15) / 16));
    }
  }
}

TEST(StreamingStore, WritesInPlaceOnlyOverRowsThatNobodyMayAskFor) {
  for (const StoreCase& store_case : store_cases()) {
    const HeadBudget& budget = store_case.budget;
    const CacheOptions& options = store_case.options;
    if (!std::holds_alternative<KeepWindow>(budget)) continue;
    const Window window = std::get<KeepWindow>(budget).window;
    const StreamingStore store = streaming(window, options);
    // A step at `lowest` still sees this far back; its drop must leave no trace either.
    const std::int64_t back = window.recent - 1;
    for (std::int64_t high_water = 0; high_water <= 130; ++high_water) {
      const std::int64_t lowest = std::max<std::int64_t>(0, high_water - options.max_rollback);
      for (std::int64_t length = lowest; length <= high_water; ++length) {
        std::int64_t next = length;  // the longest step in place writes most
        for (std::int64_t n = length; n <= length + 90; ++n) {
          if (store.in_place({length, high_water, n})) next = n;
        }
        std::vector<bool> written(static_cast<std::size_t>(store.ring.rows));
        for (std::int64_t pos = length; pos < next; ++pos) {
          written[static_cast<std::size_t>(store.ring.slot(Pos{pos}).value)] = true;
        }
        for (std::int64_t pos = 0; pos < length; ++pos) {
          if (pos >= window.sink && pos < lowest - back) continue;  // out of everybody's reach
          ASSERT_FALSE(written[static_cast<std::size_t>(store.ring.slot(Pos{pos}).value)])
              << "sink " << window.sink << ", recent " << window.recent << ", rollback "
              << options.max_rollback << ": " << length << " of " << high_water << " to " << next
              << " overwrites " << pos;
        }
      }
    }
  }
}

TEST(StreamingStore, DecodeNeverNeedsASecondRing) {
  for (const StoreCase& store_case : store_cases()) {
    const HeadBudget& budget = store_case.budget;
    const CacheOptions& options = store_case.options;
    if (!std::holds_alternative<KeepWindow>(budget)) continue;
    const StreamingStore store = streaming(std::get<KeepWindow>(budget).window, options);
    for (std::int64_t high_water = 0; high_water < 300; ++high_water) {
      const std::int64_t lowest = std::max<std::int64_t>(0, high_water - options.max_rollback);
      for (std::int64_t length = lowest; length <= high_water; ++length) {
        ASSERT_TRUE(store.in_place({length, high_water, length + 1}));
      }
    }
  }
}

TEST(StreamingStore, CountsBeyond32Bits) {
  const std::int64_t far = std::int64_t{1} << 40;
  CacheOptions options = options_of(2 * far, 8);
  const StreamingStore store = streaming({16, 64}, options);
  EXPECT_EQ(store.ring.rows, 96);
  EXPECT_TRUE(store.in_place({far, far, far + 1}));
  EXPECT_FALSE(store.in_place({far, far, far + 40}));
  const StoredRuns runs = store.runs(far);
  EXPECT_EQ(runs.num_rows(), 16 + 63);
  EXPECT_EQ(runs.runs[1].first_pos, Pos{far - 63});
}

// Folding ----------------------------------------------------------------------------------------

TEST(FoldingStore, FoldsThePublishedNumbersInWholePages) {
  // RazorAttention: N0 = 4, S0 = 4000, C = 5. N -> dropped tokens, before rounding to pages.
  const struct {
    std::int64_t length;
    std::int64_t dropped;
  } published[] = {{4000, 0}, {8192, 4188}, {20000, 15996}, {100000, 79996}};
  for (const int page_tokens : {16, 64}) {
    CacheOptions options = options_of(131072, 8, PrefillMode::kChunkCausal);
    options.page_tokens = page_tokens;
    const FoldingStore store = FoldingStore::make({}, options);
    for (const auto& [length, dropped] : published) {
      const std::int64_t folded = store.runs(length).folded;
      EXPECT_LE(folded, dropped) << length;
      EXPECT_GT(folded, dropped - page_tokens) << length;
      EXPECT_EQ(folded + store.runs(length).num_rows(), length);
    }
    EXPECT_EQ(store.runs(20000).folded, 15996);  // page boundaries for both page sizes
    EXPECT_EQ(store.runs(100000).folded, 79996);
  }
}

TEST(FoldingStore, FoldsNothingBeforeTheBufferIsFull) {
  CacheOptions options = options_of(131072, 0, PrefillMode::kChunkCausal);
  const FoldingStore store = FoldingStore::make({}, options);
  for (std::int64_t length = 0; length <= 4004; ++length) {
    ASSERT_EQ(store.runs(length).folded, 0) << length;
    ASSERT_EQ(store.runs(length).num_rows(), length);
  }
}

TEST(FoldingStore, FoldNeverGoesBackAndStaysWithinAPageOfThePaper) {
  for (const KeepGrowingWindow budget :
       {KeepGrowingWindow{4, 50, 5}, KeepGrowingWindow{0, 16, 2}, KeepGrowingWindow{33, 20, 3},
        KeepGrowingWindow{4, 9, 1}}) {
    const FoldingStore store =
        FoldingStore::make(budget, options_of(4000, 0, PrefillMode::kChunkCausal));
    std::int64_t last = 0;
    for (std::int64_t length = 0; length <= 3000; ++length) {
      const std::int64_t dropped = std::max<std::int64_t>(
          0, length - std::max(budget.min_recent, length / budget.divisor) - budget.sink);
      const std::int64_t folded = store.runs(length).folded;
      ASSERT_GE(folded, last);
      ASSERT_LE(folded, dropped);
      ASSERT_GT(folded + 16, dropped) << length;
      last = folded;
    }
  }
}

TEST(FoldingStore, RowsOfSumsInReachNeverShareAPlace) {
  for (const std::int64_t rollback : {0, 1, 15, 16, 17, 33, 40}) {
    const FoldingStore store =
        FoldingStore::make({4, 40, 3}, options_of(3000, rollback, PrefillMode::kChunkCausal));
    EXPECT_EQ(store.compensation_rows(), 2 * store.versions());
    for (std::int64_t high_water = 0; high_water <= 2000; ++high_water) {
      std::set<std::int64_t> folds;
      std::set<std::int64_t> places;
      for (std::int64_t back = 0; back <= std::min(rollback, high_water); ++back) {
        const std::int64_t fold = store.fold(high_water - back);
        if (fold == 0) continue;
        folds.insert(fold);
        places.insert(store.version_index(fold));
      }
      ASSERT_EQ(folds.size(), places.size()) << high_water;
      for (const std::int64_t place : places) ASSERT_LT(place, store.versions());
    }
  }
}

TEST(FoldingStore, NextFoldIsOnePageOn) {
  const CacheOptions options = options_of(3000, 0, PrefillMode::kChunkCausal);
  const auto next = [&](std::int64_t sink, std::int64_t fold) {
    return FoldingStore::make({sink, 40, 3}, options).next_fold(fold);
  };
  EXPECT_EQ(next(4, 0), 16);
  EXPECT_EQ(next(0, 0), 16);
  EXPECT_EQ(next(16, 0), 32);
  EXPECT_EQ(next(20, 0), 32);
  EXPECT_EQ(next(4, 48), 64);
}

TEST(FoldingStore, RefusesRollbackBehindItsBuffer) {
  EXPECT_THAT(
      [] {
        FoldingStore::make({4, 40, 5}, options_of(3000, 41));
      },
      ThrowsMessage<ConfigError>(AllOf(HasSubstr("40"), HasSubstr("41"))));
  EXPECT_NO_THROW(FoldingStore::make({4, 40, 5}, options_of(3000, 40)));
}

TEST(RetrievalStore, HoldsEveryPageUpToItsLength) {
  const RetrievalStore store{64, std::int64_t{1} << 40};
  for (const std::int64_t length : test::boundary_lengths(4, 60, 64, 64)) {
    EXPECT_EQ(entries(store.held(length, length + 5, 0)).size(),
              static_cast<std::size_t>((length + 63) / 64));
    EXPECT_EQ(store.runs(length).num_rows(), length);
  }
}

TEST(RetrievalStore, CountsBeyond32Bits) {
  const std::int64_t far = std::int64_t{1} << 39;
  const RetrievalStore store{64, 2 * far};
  EXPECT_EQ(store.changes({far, far, far + 1}, 0).take, (EntryRange{far / 64, far / 64 + 1}));
  EXPECT_EQ(store.changes({far, far, far + 1}, 0).take.count(), 1);
  EXPECT_EQ(store.rolled_back(far + 1, far, 0), (EntryRange{far / 64, far / 64 + 1}));
}

}  // namespace
}  // namespace headwise
