// SPDX-License-Identifier: MIT
/// @file head_store.hpp
/// How each kind of budget lays a head's rows into pages: one store a kind, the same questions.
///
/// A store holds neither rows nor state: everything follows from the sequence's length and its high
/// water (the longest length ever committed), so a step that is dropped has nothing to undo.
/// Page-table entries are counted per head; a store with two banks uses one of them at a time.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <variant>

#include "headwise/cache/options.hpp"
#include "headwise/cache/ring.hpp"
#include "headwise/core/check.hpp"
#include "headwise/core/kv_view.hpp"
#include "headwise/core/position.hpp"
#include "headwise/core/window.hpp"
#include "headwise/heads/budget.hpp"

namespace headwise::inline v0 {

/// Entries [first, last) of one head's page table.
struct EntryRange {
  std::int64_t first = 0;  ///< the first entry
  std::int64_t last = 0;   ///< one after the last; at or below first: nothing
  /// Entries, 0 where last lies below first.
  constexpr std::int64_t count() const { return std::max<std::int64_t>(0, last - first); }
  friend constexpr bool operator==(EntryRange, EntryRange) = default;
};

/// A sequence before a step (`length`, `high_water`) and after it (`next`).
struct StepLengths {
  std::int64_t length = 0;      ///< tokens committed before the step
  std::int64_t high_water = 0;  ///< the longest length ever committed
  std::int64_t next = 0;        ///< tokens once the step is committed
  /// High water once the step is committed.
  constexpr std::int64_t next_high_water() const { return std::max(high_water, next); }
};

/// What one step does to a head's page table.
struct PageChanges {
  EntryRange take;          ///< filled by begin; given back when the step is dropped
  EntryRange release;       ///< given back by commit
  bool flips_bank = false;  ///< commit makes the other bank the valid one
};

/// Runs of a head's stored rows, oldest first.
struct StoredRuns {
  std::array<KvRun, 3> runs{};  ///< unused ones have count 0
  std::int64_t folded = 0;      ///< tokens that a compensation row stands for

  /// Rows in all runs.
  constexpr std::int64_t num_rows() const { return runs[0].count + runs[1].count + runs[2].count; }
};

/// A retrieval head: page after page, slot == pos.
struct RetrievalStore {
  std::int64_t page_tokens = 0;  ///< CacheOptions::page_tokens
  std::int64_t max_context = 0;  ///< CacheOptions::max_context

  /// Entries of one head's page table, all banks together.
  constexpr std::int64_t table_entries() const { return ceil_div(max_context, page_tokens); }
  /// Rows of sums that one head needs, all banks together.
  constexpr std::int64_t compensation_rows() const { return 0; }

  /// Entries that hold a page between steps, at most two ranges, given the sequence's length, high
  /// water and valid bank.
  constexpr std::array<EntryRange, 2> held(std::int64_t length, std::int64_t, int) const {
    return {{{0, ceil_div(length, page_tokens)}, {}}};
  }
  /// What a step takes, releases and flips.
  constexpr PageChanges changes(const StepLengths& step, int) const {
    return {{ceil_div(step.length, page_tokens), ceil_div(step.next, page_tokens)}, {}, false};
  }
  /// Entries that a rollback from length `from` to `to` gives back.
  constexpr EntryRange rolled_back(std::int64_t from, std::int64_t to, int) const {
    return {ceil_div(to, page_tokens), ceil_div(from, page_tokens)};
  }
  /// Stored rows that some query of a step starting at `length` may see.
  constexpr StoredRuns runs(std::int64_t length) const {
    return {{{{Slot{0}, Pos{0}, length}}}, 0};
  }
};

/// A streaming head: a ring of a constant few pages, sink and recent tokens and the slack that
/// rollback needs. A chunk that would overwrite rows that may still be read (by its own queries,
/// after a drop, or after a permitted rollback) fills a second ring, and commit switches over.
struct StreamingStore {
  std::int64_t page_tokens = 0;   ///< CacheOptions::page_tokens
  std::int64_t max_rollback = 0;  ///< CacheOptions::max_rollback
  std::int64_t recent = 0;        ///< the window's, at most the context in whole pages
  Ring ring;                      ///< of each bank

  /// rows = round_up(sink + recent + max_rollback, page_tokens); never more than the context, which
  /// then never wraps.
  static constexpr StreamingStore make(const Window& window, const CacheOptions& options) {
    StreamingStore store{options.page_tokens, options.max_rollback, window.recent, {}};
    const std::int64_t context_rows = round_up(options.max_context, options.page_tokens);
    const std::int64_t sink = std::min(window.sink, context_rows);
    const std::int64_t recent = std::min(window.recent, context_rows);
    store.recent = recent;
    const std::int64_t wanted = sink + recent + options.max_rollback;
    store.ring = {sink, std::min(round_up(wanted, options.page_tokens), context_rows)};
    return store;
  }

  /// Recent tokens that a step's first query may see besides itself.
  constexpr std::int64_t past() const { return recent - 1; }
  /// Pages of one ring.
  constexpr std::int64_t pages_per_bank() const { return ring.rows / page_tokens; }
  /// @copydoc RetrievalStore::table_entries
  constexpr std::int64_t table_entries() const { return 2 * pages_per_bank(); }
  /// @copydoc RetrievalStore::compensation_rows
  constexpr std::int64_t compensation_rows() const { return 0; }

  /// Whether the step's rows overwrite nothing that anybody may still ask for.
  constexpr bool in_place(const StepLengths& step) const {
    const std::int64_t lowest_length = std::max<std::int64_t>(0, step.high_water - max_rollback);
    return step.length == 0 || step.next <= ring.rows ||
           step.next - ring.turn() <= std::max(ring.sink, lowest_length - past());
  }

  /// @copydoc RetrievalStore::held
  constexpr std::array<EntryRange, 2> held(std::int64_t length, std::int64_t, int bank) const {
    return {{{first_entry(bank), end_entry(length, bank)}, {}}};
  }
  /// @copydoc RetrievalStore::changes
  constexpr PageChanges changes(const StepLengths& step, int bank) const {
    if (in_place(step)) {
      return {{end_entry(step.length, bank), end_entry(step.next, bank)}, {}, false};
    }
    return {{first_entry(1 - bank), end_entry(step.next, 1 - bank)},
            {first_entry(bank), end_entry(step.length, bank)},
            true};
  }
  /// @copydoc RetrievalStore::rolled_back
  constexpr EntryRange rolled_back(std::int64_t from, std::int64_t to, int bank) const {
    return {end_entry(to, bank), end_entry(from, bank)};
  }

  /// Stored rows that some query of a step starting at `length` may see: the sinks and the recent
  /// ones before it; the slack rows of rollback never.
  constexpr StoredRuns runs(std::int64_t length) const {
    const Pos first{std::max(ring.sink, length - past())};
    const auto [older, newer] = ring.runs(first, Pos{length});
    return {{{{Slot{0}, Pos{0}, std::min(ring.sink, length)}, older, newer}}, 0};
  }

  /// The bank's first entry.
  constexpr std::int64_t first_entry(int bank) const { return bank * pages_per_bank(); }
  /// One after the bank's last entry that holds a page at `length`.
  constexpr std::int64_t end_entry(std::int64_t length, int bank) const {
    return first_entry(bank) + ceil_div(std::min(length, ring.rows), page_tokens);
  }
};

/// A head with a growing window (RazorAttention): a retrieval head's pages, of which those behind
/// the sinks are folded into a compensation row and released, oldest first.
///
/// fold(n) = page_floor(n - max(S0, n / C)) depends on n alone. A page is released once no
/// permitted rollback can reach a length that still sees its rows; up to one page more than the
/// paper's buffer stays visible. Folding adds a *new* row of sums: nothing is ever subtracted.
struct FoldingStore {
  std::int64_t page_tokens = 0;   ///< CacheOptions::page_tokens
  std::int64_t max_context = 0;   ///< CacheOptions::max_context
  std::int64_t max_rollback = 0;  ///< CacheOptions::max_rollback
  KeepGrowingWindow budget;       ///< the window's sizes

  /// @throws ConfigError where rollback could reach behind the buffer.
  static FoldingStore make(const KeepGrowingWindow& budget, const CacheOptions& options) {
    if (budget.min_recent < options.max_rollback) {
      fail<ConfigError>("min_recent of a growing window (", budget.min_recent,
                        ") must be at least max_rollback (", options.max_rollback, ")");
    }
    KeepGrowingWindow kept = budget;  // more than the context is as good as the context
    kept.sink = std::min(kept.sink, options.max_context);
    kept.min_recent = std::min(kept.min_recent, options.max_context);
    return {options.page_tokens, options.max_context, options.max_rollback, kept};
  }

  /// Positions [sink, fold) are in the compensation row; 0 while nothing is folded.
  constexpr std::int64_t fold(std::int64_t length) const {
    const std::int64_t droppable = length - budget.recent(length);
    const std::int64_t end = droppable <= 0 ? 0 : droppable / page_tokens * page_tokens;
    return end > budget.sink ? end : 0;
  }
  /// The fold at the lowest length that a permitted rollback can reach.
  constexpr std::int64_t settled_fold(std::int64_t high_water) const {
    return fold(std::max<std::int64_t>(0, high_water - max_rollback));
  }

  /// @copydoc RetrievalStore::table_entries
  constexpr std::int64_t table_entries() const { return ceil_div(max_context, page_tokens); }
  /// The fold after `fold`: one page more, the first one just behind the sinks.
  constexpr std::int64_t next_fold(std::int64_t fold) const {
    return (std::max(fold, budget.sink) / page_tokens + 1) * page_tokens;
  }
  /// Folds that differ within reach of a rollback: rows of sums in one bank.
  constexpr std::int64_t versions() const { return ceil_div(max_rollback, page_tokens) + 1; }
  /// Which of a bank's rows of sums belongs to `fold`.
  constexpr std::int64_t version_index(std::int64_t fold) const {
    return fold / page_tokens % versions();
  }
  /// @copydoc RetrievalStore::compensation_rows
  constexpr std::int64_t compensation_rows() const { return 2 * versions(); }

  /// @copydoc RetrievalStore::held
  constexpr std::array<EntryRange, 2> held(std::int64_t length, std::int64_t high_water,
                                           int) const {
    const std::int64_t end = ceil_div(length, page_tokens);
    const std::int64_t sinks = std::min(sink_pages(), end);
    return {{{0, sinks}, {std::max(sinks, settled_entry(high_water)), end}}};
  }
  /// @copydoc RetrievalStore::changes
  constexpr PageChanges changes(const StepLengths& step, int) const {
    const std::int64_t next_high_water = step.next_high_water();
    return {{ceil_div(step.length, page_tokens), ceil_div(step.next, page_tokens)},
            {settled_entry(step.high_water), settled_entry(next_high_water)},
            fold(step.high_water) != fold(next_high_water) ||
                settled_fold(step.high_water) != settled_fold(next_high_water)};
  }
  /// @copydoc RetrievalStore::rolled_back
  constexpr EntryRange rolled_back(std::int64_t from, std::int64_t to, int) const {
    return {ceil_div(to, page_tokens), ceil_div(from, page_tokens)};
  }

  /// @copydoc RetrievalStore::runs
  constexpr StoredRuns runs(std::int64_t length) const {
    const std::int64_t end = fold(length);
    if (end == 0) return {{{{Slot{0}, Pos{0}, length}}}, 0};
    return {{{{Slot{0}, Pos{0}, budget.sink}, {Slot{end}, Pos{end}, length - end}}},
            end - budget.sink};
  }

  /// Pages that hold the sinks; never released.
  constexpr std::int64_t sink_pages() const { return ceil_div(budget.sink, page_tokens); }
  /// First entry behind the sinks that is still held.
  constexpr std::int64_t settled_entry(std::int64_t high_water) const {
    return std::max(sink_pages(), settled_fold(high_water) / page_tokens);
  }
};

/// A store for each kind of HeadBudget.
using HeadStore = std::variant<RetrievalStore, StreamingStore, FoldingStore>;

/// The store for a budget.
/// @throws ConfigError as the store's make().
inline HeadStore make_store(const HeadBudget& budget, const CacheOptions& options) {
  struct Make {
    const CacheOptions& options;
    HeadStore operator()(const KeepEverything&) const {
      return RetrievalStore{options.page_tokens, options.max_context};
    }
    HeadStore operator()(const KeepWindow& keep) const {
      return StreamingStore::make(keep.window, options);
    }
    HeadStore operator()(const KeepGrowingWindow& keep) const {
      return FoldingStore::make(keep, options);
    }
  };
  return std::visit(Make{options}, budget);
}

}  // namespace headwise::inline v0
