// SPDX-License-Identifier: MIT
/// @file everything.hpp
/// A retrieval head: page after page, slot == pos.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>

#include "headwise/cache/keep/keep_rule.hpp"
#include "headwise/cache/keep/page_by_page.hpp"
#include "headwise/core/phase.hpp"
#include "headwise/heads/budget.hpp"

namespace headwise::inline v0 {

/// How a cache keeps KeepEverything; KeepRule says what each member answers.
struct EverythingRule : PageByPage {
  using Budget = KeepEverything;
  static constexpr bool kSelects = false;
  static constexpr bool kKeepsEverything = true;
  /// Everything follows from the length.
  struct State {
    friend constexpr bool operator==(State, State) = default;
  };

  static constexpr EverythingRule make(const KeepEverything&, const KeepLimits& limits) {
    return {{limits.page_tokens, limits.max_context, limits.max_rollback}};
  }

  static constexpr KeepEverything class_budget(const KeepEverything& budget) { return budget; }

  constexpr std::array<EntryRange, 2> held(State, std::int64_t length, std::int64_t) const {
    return {{{0, pages_of(length)}, {}}};
  }
  constexpr KeepChanges<State> changes(State, const StepLengths& step) const {
    return {{pages_of(step.length), pages_of(step.next)}, {}, {}};
  }
  constexpr EntryRange rolled_back(State, std::int64_t from, std::int64_t to) const {
    return {pages_of(to), pages_of(from)};
  }
  /// Appends and rollbacks reach down to high_water - max_rollback.
  constexpr std::int64_t frozen(State, std::int64_t high_water) const {
    return std::max<std::int64_t>(0, high_water - max_rollback) / page_tokens;
  }
  constexpr std::int64_t peak_entries(std::int64_t) const { return pages_of(max_context); }
  constexpr std::int64_t most_rows() const { return max_context; }
  constexpr std::int64_t lowest_kept(State, std::int64_t) const { return 0; }
  constexpr std::int64_t released_entries() const { return 0; }

  constexpr std::int64_t slots_written(State, std::int64_t length) const { return length; }
  constexpr std::uint64_t to_word(State) const { return 0; }
  constexpr std::optional<State> from_word(std::uint64_t word, std::int64_t) const {
    return word == 0 ? std::optional<State>(State{}) : std::nullopt;
  }

  constexpr StoredRuns runs(State, std::int64_t length, Phase) const {
    return {{{{Slot{0}, Pos{0}, length}}}};
  }
  constexpr FoldedRows folded(State, std::int64_t) const { return {}; }
  constexpr Window window(Phase) const { return Window::everything(); }

  constexpr SlotMap slots(State) const { return {}; }
  constexpr SlotMap append_slots(State, const StepLengths&) const { return {}; }

  constexpr std::int64_t compensation_rows() const { return 0; }
  template <class Fn>
  constexpr void for_each_fold(State, const StepLengths&, Fn&&) const {}

  friend constexpr bool operator==(const EverythingRule&, const EverythingRule&) = default;
};
static_assert(KeepRule<EverythingRule>);

}  // namespace headwise::inline v0
