// SPDX-License-Identifier: MIT
/// @file growing_window.hpp
/// RazorAttention's head: a window that grows with the context, and one row for all the others.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>

#include "headwise/cache/keep/keep_rule.hpp"
#include "headwise/cache/keep/page_by_page.hpp"
#include "headwise/core/check.hpp"
#include "headwise/core/phase.hpp"
#include "headwise/core/rounding.hpp"
#include "headwise/heads/budget.hpp"

namespace headwise::inline v0 {

/// How a cache keeps KeepGrowingWindow; KeepRule says what each member answers.
///
/// A retrieval head's pages, of which those behind the sinks are folded into a compensation row and
/// released, oldest first. fold(n) = page_floor(n - max(S0, n / C)) depends on n alone. A page is
/// released once no permitted rollback can reach a length that still sees its rows; up to one page
/// more than the paper's buffer stays visible. Folding adds a *new* row of sums: nothing is ever
/// subtracted. Rows lie in two banks of `versions()`, so that a dropped step leaves the old ones.
struct GrowingWindowRule : PageByPage {
  using Budget = KeepGrowingWindow;
  static constexpr bool kSelects = false;
  static constexpr bool kKeepsEverything = false;
  /// Which bank holds the committed compensation rows.
  struct State {
    std::uint8_t bank = 0;  ///< 0 or 1
    friend constexpr bool operator==(State, State) = default;
  };

  KeepGrowingWindow budget;

  /// @throws ConfigError in windowed prefill, which would need rows that are folded already, or
  ///   where rollback could reach behind the buffer.
  static GrowingWindowRule make(const KeepGrowingWindow& budget, const KeepLimits& limits) {
    if (limits.prefill == PrefillMode::kWindowed) {
      fail<ConfigError>(
          "a growing window (RazorAttention) prefills chunk_causal only: set "
          "CacheOptions::prefill to kChunkCausal");
    }
    if (budget.min_recent < limits.max_rollback) {
      fail<ConfigError>("min_recent of a growing window (", budget.min_recent,
                        ") must be at least max_rollback (", limits.max_rollback, ")");
    }
    KeepGrowingWindow kept = budget;  // more than the context is as good as the context
    kept.sink = std::min(kept.sink, limits.max_context);
    kept.min_recent = std::min(kept.min_recent, limits.max_context);
    return {{limits.page_tokens, limits.max_context, limits.max_rollback}, kept};
  }

  static constexpr KeepGrowingWindow class_budget(const KeepGrowingWindow& budget) {
    return budget;
  }

  constexpr std::array<EntryRange, 2> held(State, std::int64_t length,
                                           std::int64_t high_water) const {
    const std::int64_t end = pages_of(length);
    const std::int64_t sinks = std::min(sink_pages(), end);
    return {{{0, sinks}, {std::max(sinks, settled_entry(high_water)), end}}};
  }
  constexpr KeepChanges<State> changes(State state, const StepLengths& step) const {
    const std::int64_t next = step.next_high_water();
    const bool flips =
        fold(step.high_water) != fold(next) || settled_fold(step.high_water) != settled_fold(next);
    return {{pages_of(step.length), pages_of(step.next)},
            {settled_entry(step.high_water), settled_entry(next)},
            {static_cast<std::uint8_t>(flips ? 1 - state.bank : state.bank)}};
  }
  constexpr EntryRange rolled_back(State, std::int64_t from, std::int64_t to) const {
    return {pages_of(to), pages_of(from)};
  }
  /// Appends and rollbacks reach down to high_water - max_rollback.
  constexpr std::int64_t frozen(State, std::int64_t high_water) const {
    return std::max<std::int64_t>(0, high_water - max_rollback) / page_tokens;
  }
  /// Behind the sinks lie the buffer (that of the chunk's start), what rollback may reach, the
  /// chunk, and two ragged ends.
  constexpr std::int64_t peak_entries(std::int64_t max_chunk) const {
    const std::int64_t start = std::max<std::int64_t>(0, max_context - max_chunk);
    const std::int64_t tokens = budget.recent(start) + max_rollback + max_chunk;
    return std::min(pages_of(max_context), sink_pages() + pages_of(tokens) + 2);
  }
  /// It forgets page by page: a shorter sequence may see nearly a page more.
  constexpr std::int64_t most_rows() const {
    return std::min(max_context, runs({}, max_context, Phase::kDecode).num_rows() + page_tokens);
  }

  /// Until a page is released nothing is gone.
  constexpr std::int64_t lowest_kept(State, std::int64_t high_water) const {
    return settled_fold(high_water) == 0 ? 0 : high_water - max_rollback;
  }
  constexpr std::int64_t released_entries() const {
    return std::max<std::int64_t>(0, settled_entry(max_context) - sink_pages());
  }

  constexpr std::int64_t slots_written(State, std::int64_t length) const { return length; }
  constexpr std::uint64_t to_word(State state) const { return state.bank; }
  constexpr std::optional<State> from_word(std::uint64_t word, std::int64_t) const {
    if (word > 1) return std::nullopt;
    return State{static_cast<std::uint8_t>(word)};
  }

  constexpr StoredRuns runs(State, std::int64_t length, Phase) const {
    const std::int64_t end = fold(length);
    if (end == 0) return {{{{Slot{0}, Pos{0}, length}}}};
    return {{{{Slot{0}, Pos{0}, budget.sink}, {Slot{end}, Pos{end}, length - end}}}};
  }
  constexpr FoldedRows folded(State state, std::int64_t length) const {
    const std::int64_t end = fold(length);
    return end == 0 ? FoldedRows{} : FoldedRows{row_of(state.bank, end), end - budget.sink};
  }
  constexpr Window window(Phase) const { return Window::everything(); }

  constexpr SlotMap slots(State) const { return {}; }
  constexpr SlotMap append_slots(State, const StepLengths&) const { return {}; }

  constexpr std::int64_t compensation_rows() const { return 2 * versions(); }
  /// Fills the other bank with every row that a length in reach after commit may ask for: known
  /// ones are carried over, each new one is the one before it plus the rows of one page.
  template <class Fn>
  constexpr void for_each_fold(State state, const StepLengths& step, Fn&& fn) const {
    const int to_bank = changes(state, step).next.bank;
    if (to_bank == state.bank) return;
    const std::int64_t known = fold(step.high_water);
    const std::int64_t last = fold(step.next_high_water());
    std::int64_t done = std::min(known, settled_fold(step.next_high_water()));
    if (done != 0)
      fn(FoldMove{row_of(state.bank, done), row_of(to_bank, done), 0, 0, 0, done - budget.sink});
    while (done < last) {
      const std::int64_t next = next_fold(done);
      FoldMove move{{}, row_of(to_bank, next), 0, 0, 0, next - budget.sink};
      if (next <= known) {
        move.from = row_of(state.bank, next);
      } else {
        const std::int64_t first = done == 0 ? budget.sink : done;
        if (done != 0) move.from = row_of(to_bank, done);
        move.entry = first / page_tokens;
        move.first_row = first % page_tokens;
        move.end_row = page_tokens;
      }
      fn(move);
      done = next;
    }
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

  friend constexpr bool operator==(const GrowingWindowRule&, const GrowingWindowRule&) = default;

 private:
  /// Pages that hold the sinks; never released.
  constexpr std::int64_t sink_pages() const { return pages_of(budget.sink); }
  /// First entry behind the sinks that is still held.
  constexpr std::int64_t settled_entry(std::int64_t high_water) const {
    return std::max(sink_pages(), settled_fold(high_water) / page_tokens);
  }
  /// The fold after `fold`: one page more, the first one just behind the sinks.
  constexpr std::int64_t next_fold(std::int64_t fold) const {
    return (std::max(fold, budget.sink) / page_tokens + 1) * page_tokens;
  }
  /// Folds that differ within reach of a rollback: rows of one bank.
  constexpr std::int64_t versions() const { return ceil_div(max_rollback, page_tokens) + 1; }
  constexpr std::int64_t row_of(int bank, std::int64_t fold) const {
    return bank * versions() + fold / page_tokens % versions();
  }
};
static_assert(KeepRule<GrowingWindowRule>);

}  // namespace headwise::inline v0
