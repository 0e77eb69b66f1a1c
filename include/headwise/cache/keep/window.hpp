// SPDX-License-Identifier: MIT
/// @file window.hpp
/// A streaming head: a ring of a constant few pages.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>

#include "headwise/cache/keep/keep_rule.hpp"
#include "headwise/core/phase.hpp"
#include "headwise/core/rounding.hpp"
#include "headwise/heads/budget.hpp"

namespace headwise::inline v0 {

/// How a cache keeps KeepWindow; KeepRule says what each member answers.
///
/// The ring has sink and recent tokens and the slack that rollback needs: `rows = round_up(sink +
/// recent + max_rollback, page_tokens)`, never more than the context, which then never wraps. The
/// slack is stored and never seen. A chunk that would overwrite rows that may still be read (by its
/// own queries, after a drop, or after a permitted rollback) fills a second ring, the other bank of
/// the head's table, and commit switches over.
struct WindowRule {
  using Budget = KeepWindow;
  static constexpr bool kSelects = false;
  static constexpr bool kKeepsEverything = false;
  /// Which bank holds the committed rows.
  struct State {
    std::uint8_t bank = 0;  ///< 0 or 1
    friend constexpr bool operator==(State, State) = default;
  };

  std::int64_t page_tokens = 0;
  std::int64_t max_rollback = 0;
  std::int64_t max_context = 0;
  std::int64_t sink = 0;
  std::int64_t recent = 0;         ///< of decode, at most the context in whole pages
  std::int64_t prompt_recent = 0;  ///< of prompt chunks, likewise
  std::int64_t rows = 0;           ///< of a ring, whole pages
  bool chunk_causal = false;       ///< a prompt chunk's queries see what its first one sees

  static constexpr WindowRule make(const KeepWindow& keep, const KeepLimits& limits) {
    const std::int64_t context_rows = round_up(limits.max_context, limits.page_tokens);
    WindowRule rule;
    rule.page_tokens = limits.page_tokens;
    rule.max_rollback = limits.max_rollback;
    rule.max_context = limits.max_context;
    rule.sink = std::min(keep.window.sink, context_rows);
    rule.recent = std::min(keep.window.recent, context_rows);
    rule.prompt_recent = std::min(keep.prompt_window().recent, context_rows);
    // Three terms of at most 2^40 each (CacheGeometry checks): no sum overflows.
    const std::int64_t wanted = rule.sink + rule.most_recent() + limits.max_rollback;
    rule.rows = std::min(round_up(wanted, limits.page_tokens), context_rows);
    rule.chunk_causal = limits.prefill == PrefillMode::kChunkCausal;
    return rule;
  }

  static constexpr KeepWindow class_budget(const KeepWindow& budget) { return budget; }

  /// The second bank comes where a ring can be full.
  constexpr std::int64_t table_entries(std::int64_t pages) const {
    return pages < pages_per_bank() ? pages : 2 * pages_per_bank();
  }
  constexpr std::array<EntryRange, 2> held(State state, std::int64_t length, std::int64_t) const {
    return {{{first_entry(state.bank), end_entry(length, state.bank)}, {}}};
  }
  constexpr KeepChanges<State> changes(State state, const StepLengths& step) const {
    const int bank = state.bank;
    if (in_place(step))
      return {{end_entry(step.length, bank), end_entry(step.next, bank)}, {}, state};
    return {{first_entry(1 - bank), end_entry(step.next, 1 - bank)},
            {first_entry(bank), end_entry(step.length, bank)},
            {static_cast<std::uint8_t>(1 - bank)}};
  }
  constexpr EntryRange rolled_back(State state, std::int64_t from, std::int64_t to) const {
    return {end_entry(to, state.bank), end_entry(from, state.bank)};
  }
  /// Every row of a ring is overwritten sooner or later.
  constexpr std::int64_t frozen(State state, std::int64_t) const { return first_entry(state.bank); }
  /// A chunk of up to the slack's tokens never needs a second ring.
  constexpr std::int64_t peak_entries(std::int64_t max_chunk) const {
    const bool may_switch =
        max_context > rows && max_chunk > turn() - max_rollback - most_recent() + 1;
    return pages_per_bank() * (may_switch ? 2 : 1);
  }
  constexpr std::int64_t most_rows() const {
    return std::min(max_context, sink + most_recent() - 1);
  }

  /// Until the window of the lowest length in reach is full nothing is overwritten, also by a step
  /// that was dropped.
  constexpr std::int64_t lowest_kept(State, std::int64_t high_water) const {
    const std::int64_t lowest = high_water - max_rollback;
    return lowest - (most_recent() - 1) <= sink ? 0 : lowest;
  }
  constexpr std::int64_t fork_entries() const { return pages_per_bank(); }
  constexpr std::int64_t released_entries() const { return 0; }

  constexpr std::int64_t slots_written(State, std::int64_t length) const {
    return std::min(length, rows);
  }
  constexpr std::uint64_t to_word(State state) const { return state.bank; }
  /// Nobody has come to the second bank without a full ring.
  constexpr std::optional<State> from_word(std::uint64_t word, std::int64_t high_water) const {
    if (word > (high_water > rows ? 1U : 0U)) return std::nullopt;
    return State{static_cast<std::uint8_t>(word)};
  }

  constexpr StoredRuns runs(State state, std::int64_t length, Phase phase) const {
    const Pos first{std::max(sink, length - (recent_of(phase) - 1))};
    const auto [older, newer] = slots(state).runs(first, Pos{length});
    return {{{{Slot{0}, Pos{0}, std::min(sink, length)}, older, newer}}};
  }
  constexpr FoldedRows folded(State, std::int64_t) const { return {}; }
  constexpr Window window(Phase phase) const {
    if (chunk_causal && phase == Phase::kPrompt) return Window::everything();
    return {sink, recent_of(phase)};
  }

  constexpr SlotMap slots(State state) const { return {first_entry(state.bank), sink, turn()}; }
  constexpr SlotMap append_slots(State state, const StepLengths& step) const {
    return slots(changes(state, step).next);
  }

  constexpr std::int64_t compensation_rows() const { return 0; }
  template <class Fn>
  constexpr void for_each_fold(State, const StepLengths&, Fn&&) const {}

  /// Whether the step's rows overwrite nothing that anybody may still ask for.
  constexpr bool in_place(const StepLengths& step) const {
    const std::int64_t lowest_length = std::max<std::int64_t>(0, step.high_water - max_rollback);
    return step.length == 0 || step.next <= rows ||
           step.next - turn() <= std::max(sink, lowest_length - (most_recent() - 1));
  }
  /// Newest tokens that a query of this phase sees, its own included.
  constexpr std::int64_t recent_of(Phase phase) const {
    return phase == Phase::kPrompt ? prompt_recent : recent;
  }
  /// What either phase may ask for.
  constexpr std::int64_t most_recent() const { return std::max(recent, prompt_recent); }
  /// Slots that positions behind the sinks share.
  constexpr std::int64_t turn() const { return rows - sink; }
  /// Pages of one ring.
  constexpr std::int64_t pages_per_bank() const { return rows / page_tokens; }

  friend constexpr bool operator==(const WindowRule&, const WindowRule&) = default;

 private:
  constexpr std::int64_t first_entry(int bank) const { return bank * pages_per_bank(); }
  constexpr std::int64_t end_entry(std::int64_t length, int bank) const {
    return first_entry(bank) + ceil_div(std::min(length, rows), page_tokens);
  }
};
static_assert(KeepRule<WindowRule>);

}  // namespace headwise::inline v0
