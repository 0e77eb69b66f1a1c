// SPDX-License-Identifier: MIT
/// @file window_from.hpp
/// A head that streams from a length on: page after page, of which those that the window has left
/// are freed.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>

#include "headwise/cache/keep/keep_rule.hpp"
#include "headwise/cache/keep/page_by_page.hpp"
#include "headwise/core/phase.hpp"
#include "headwise/core/rounding.hpp"
#include "headwise/heads/budget.hpp"

namespace headwise::inline v0 {

/// How a cache keeps KeepWindowFrom; KeepRule says what each member answers.
///
/// slot == pos, as on a retrieval head. Once no permitted rollback reaches a length below `from`,
/// the pages between the sinks and the window of the lowest length in reach are released, oldest
/// first. Nothing moves when a head begins to stream, so that a step costs what it always does; the
/// table has an entry for each page of the context, which a ring does without.
struct WindowFromRule : PageByPage {
  using Budget = KeepWindowFrom;
  static constexpr bool kSelects = false;
  static constexpr bool kKeepsEverything = false;
  /// Everything follows from the lengths.
  struct State {
    friend constexpr bool operator==(State, State) = default;
  };

  std::int64_t from = 0;
  std::int64_t sink = 0;
  std::int64_t recent = 0;         ///< of decode, at most the context in whole pages
  std::int64_t prompt_recent = 0;  ///< of prompt chunks, likewise
  bool chunk_causal = false;       ///< a prompt chunk's queries see what its first one sees

  static constexpr WindowFromRule make(const KeepWindowFrom& budget, const KeepLimits& limits) {
    const std::int64_t context_rows = round_up(limits.max_context, limits.page_tokens);
    WindowFromRule rule;
    rule.page_tokens = limits.page_tokens;
    rule.max_context = limits.max_context;
    rule.max_rollback = limits.max_rollback;
    rule.from = std::min(budget.from, context_rows);
    rule.sink = std::min(budget.keep.window.sink, context_rows);
    rule.recent = std::min(budget.keep.window.recent, context_rows);
    rule.prompt_recent = std::min(budget.keep.prompt_window().recent, context_rows);
    rule.chunk_causal = limits.prefill == PrefillMode::kChunkCausal;
    return rule;
  }

  static constexpr KeepWindowFrom class_budget(const KeepWindowFrom& budget) { return budget; }

  constexpr std::array<EntryRange, 2> held(State, std::int64_t length,
                                           std::int64_t high_water) const {
    const std::int64_t end = pages_of(length);
    const std::int64_t sinks = std::min(sink_pages(), end);
    return {{{0, sinks}, {std::max(sinks, settled_entry(high_water)), end}}};
  }
  constexpr KeepChanges<State> changes(State, const StepLengths& step) const {
    return {{pages_of(step.length), pages_of(step.next)},
            {settled_entry(step.high_water), settled_entry(step.next_high_water())},
            {}};
  }
  constexpr EntryRange rolled_back(State, std::int64_t longer, std::int64_t to) const {
    return {pages_of(to), pages_of(longer)};
  }
  /// Appends and rollbacks reach down to high_water - max_rollback.
  constexpr std::int64_t frozen(State, std::int64_t high_water) const {
    return lowest_length(high_water) / page_tokens;
  }
  /// A step that begins when nothing was released yet, or one that begins later: with the sinks,
  /// the window, what rollback may reach, the chunk and a ragged end.
  constexpr std::int64_t peak_entries(std::int64_t max_chunk) const {
    const std::int64_t everything = from - 1 + max_rollback + max_chunk;
    const std::int64_t streaming = most_recent() - 1 + max_rollback + max_chunk;
    const std::int64_t peak =
        std::max(pages_of(everything), sink_pages() + pages_of(streaming - 1) + 1);
    return std::min(peak, pages_of(max_context));
  }
  /// The most is seen just before the head streams.
  constexpr std::int64_t most_rows() const {
    return std::min(max_context, std::max(from - 1, sink + most_recent() - 1));
  }

  /// Until a page is released nothing is gone.
  constexpr std::int64_t lowest_kept(State, std::int64_t high_water) const {
    return settled_entry(high_water) == sink_pages() ? 0 : high_water - max_rollback;
  }
  constexpr std::int64_t released_entries() const {
    return settled_entry(max_context) - sink_pages();
  }

  constexpr std::int64_t slots_written(State, std::int64_t length) const { return length; }
  constexpr std::uint64_t to_word(State) const { return 0; }
  constexpr std::optional<State> from_word(std::uint64_t word, std::int64_t) const {
    return word == 0 ? std::optional<State>(State{}) : std::nullopt;
  }

  constexpr StoredRuns runs(State, std::int64_t length, Phase phase) const {
    if (length < from) return {{{{Slot{0}, Pos{0}, length}}}};
    const std::int64_t first = std::max(sink, length - (recent_of(phase) - 1));
    return {{{{Slot{0}, Pos{0}, std::min(sink, length)},
              {Slot{first}, Pos{first}, std::max<std::int64_t>(0, length - first)}}}};
  }
  constexpr FoldedRows folded(State, std::int64_t) const { return {}; }
  constexpr Window window(Phase phase) const {
    if (chunk_causal && phase == Phase::kPrompt) return Window::everything();
    return {sink, recent_of(phase), from};
  }

  constexpr SlotMap slots(State) const { return {}; }
  constexpr SlotMap append_slots(State, const StepLengths&) const { return {}; }

  constexpr std::int64_t compensation_rows() const { return 0; }
  template <class Fn>
  constexpr void for_each_fold(State, const StepLengths&, Fn&&) const {}

  friend constexpr bool operator==(const WindowFromRule&, const WindowFromRule&) = default;

 private:
  /// Pages that hold the sinks; never released.
  constexpr std::int64_t sink_pages() const { return pages_of(sink); }
  /// Newest tokens that a query of this phase sees, its own included.
  constexpr std::int64_t recent_of(Phase phase) const {
    return phase == Phase::kPrompt ? prompt_recent : recent;
  }
  /// What either phase may ask for.
  constexpr std::int64_t most_recent() const { return std::max(recent, prompt_recent); }
  /// Where the next query may be, at the lowest.
  constexpr std::int64_t lowest_length(std::int64_t high_water) const {
    return std::max<std::int64_t>(0, high_water - max_rollback);
  }
  /// First entry behind the sinks that is still held.
  constexpr std::int64_t settled_entry(std::int64_t high_water) const {
    const std::int64_t lowest = lowest_length(high_water);
    const std::int64_t first = std::max<std::int64_t>(0, lowest - (most_recent() - 1));
    return lowest < from ? sink_pages() : std::max(sink_pages(), first / page_tokens);
  }
};
static_assert(KeepRule<WindowFromRule>);

}  // namespace headwise::inline v0
