// SPDX-License-Identifier: MIT
/// @file selected.hpp
/// A head whose rows a selection chooses: kept rows packed together, and an append-only tail.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <optional>

#include "headwise/cache/keep/keep_rule.hpp"
#include "headwise/cache/keep/page_by_page.hpp"
#include "headwise/core/check.hpp"
#include "headwise/core/phase.hpp"
#include "headwise/heads/budget.hpp"

namespace headwise::inline v0 {

/// How a cache keeps KeepSelected; KeepRule says what each member answers.
///
/// A retrieval head's pages, of which the first ones are gone. A selection at length `n` that keeps
/// `count` rows moves them, in ascending order, into slots [n - count, n); tokens from `n` on lie
/// in slot == pos, as ever. So the heads of a class, whatever each of them kept, cross the same
/// pages at the same lengths, and a step costs nothing for each head. Up to one page more than the
/// rows need is held: ceil(length / page) - floor((n - count) / page).
///
/// All kept keys are older than every later query, so that kernels take a row's slot for its
/// position.
struct SelectedRule : PageByPage {
  using Budget = KeepSelected;
  static constexpr bool kSelects = true;
  static constexpr bool kKeepsEverything = false;
  /// What the last selection left, of a class's longest head or of one head.
  struct State {
    std::int32_t selected = 0;  ///< length at the last selection; 0: there was none
    std::int32_t first = 0;     ///< slot of the first row
    friend constexpr bool operator==(State, State) = default;
  };

  /// @throws ConfigError for contexts whose positions do not fit 32 bits.
  static SelectedRule make(const KeepSelected&, const KeepLimits& limits) {
    constexpr std::int64_t kLongest = std::numeric_limits<std::int32_t>::max();
    if (limits.max_context > kLongest) {
      fail<ConfigError>("selected heads have a max_context of at most ", kLongest, ", got ",
                        limits.max_context);
    }
    return {{limits.page_tokens, limits.max_context, limits.max_rollback}};
  }

  /// Heads are one class, whatever is forecast of each.
  static constexpr KeepSelected class_budget(const KeepSelected&) { return {}; }
  static constexpr std::int64_t forecast(const KeepSelected& budget) { return budget.tokens; }

  constexpr std::array<EntryRange, 2> held(State state, std::int64_t length, std::int64_t) const {
    return {{{state.first / page_tokens, pages_of(length)}, {}}};
  }
  constexpr KeepChanges<State> changes(State state, const StepLengths& step) const {
    return {{pages_of(step.length), pages_of(step.next)}, {}, state};
  }
  constexpr EntryRange rolled_back(State, std::int64_t from, std::int64_t to) const {
    return {pages_of(to), pages_of(from)};
  }
  /// Neither appends nor rollbacks reach below the last selection.
  constexpr std::int64_t frozen(State state, std::int64_t high_water) const {
    return std::max<std::int64_t>(state.selected, high_water - max_rollback) / page_tokens;
  }
  /// Until it is selected from, a prompt is held as a whole.
  constexpr std::int64_t peak_entries(std::int64_t) const { return pages_of(max_context); }
  constexpr std::int64_t most_rows() const { return max_context; }
  /// Nothing is rolled back behind a selection, and no fork begins there.
  constexpr std::int64_t lowest_kept(State state, std::int64_t) const { return state.selected; }
  /// A selection leaves to the forks made before all that it drops or moves.
  constexpr std::int64_t released_entries() const { return pages_of(max_context); }

  constexpr std::int64_t slots_written(State, std::int64_t length) const { return length; }
  constexpr std::uint64_t to_word(State state) const {
    return std::uint64_t{static_cast<std::uint32_t>(state.selected)} |
           std::uint64_t{static_cast<std::uint32_t>(state.first)} << 32;
  }
  constexpr std::optional<State> from_word(std::uint64_t word, std::int64_t high_water) const {
    const State state{static_cast<std::int32_t>(word & 0xFFFFFFFFU),
                      static_cast<std::int32_t>(word >> 32)};
    if (state.first < 0 || state.selected < state.first || state.selected > high_water) {
      return std::nullopt;
    }
    return state;
  }

  constexpr StoredRuns runs(State state, std::int64_t length, Phase) const {
    return {{{{Slot{state.first}, Pos{state.first}, length - state.first}}}};
  }
  constexpr FoldedRows folded(State, std::int64_t) const { return {}; }
  constexpr Window window(Phase) const { return Window::everything(); }

  constexpr SlotMap slots(State) const { return {}; }
  constexpr SlotMap append_slots(State, const StepLengths&) const { return {}; }

  constexpr std::int64_t compensation_rows() const { return 0; }
  template <class Fn>
  constexpr void for_each_fold(State, const StepLengths&, Fn&&) const {}

  constexpr State of_head(State state, std::int64_t first) const {
    return {state.selected, static_cast<std::int32_t>(first)};
  }
  constexpr State after_selection(std::int64_t length, std::int64_t first) const {
    return {static_cast<std::int32_t>(length), static_cast<std::int32_t>(first)};
  }
  constexpr std::int64_t first_after(std::int64_t length, std::int64_t count) const {
    return length - count;
  }
  constexpr bool position_is_slot(State state, std::int64_t slot) const {
    return slot >= state.selected;
  }

  friend constexpr bool operator==(const SelectedRule&, const SelectedRule&) = default;
};
static_assert(SelectsRows<SelectedRule>);

}  // namespace headwise::inline v0
