// SPDX-License-Identifier: MIT
/// @file keep_rule.hpp
/// What every kind of budget answers: one rule a kind, the same questions.
#pragma once

#include <algorithm>
#include <array>
#include <concepts>
#include <cstdint>
#include <optional>
#include <type_traits>

#include "headwise/core/kv_view.hpp"
#include "headwise/core/phase.hpp"
#include "headwise/core/slot_map.hpp"
#include "headwise/core/window.hpp"

namespace headwise::inline v0 {

/// What a rule needs to know of the cache that it keeps rows in; CacheOptions says what they mean.
struct KeepLimits {
  std::int64_t page_tokens = 0;
  std::int64_t max_context = 0;
  std::int64_t max_rollback = 0;
  std::int64_t max_chunk = 0;  ///< in [1, max_context]
  PrefillMode prefill = PrefillMode::kWindowed;
};

/// Entries [first, last) of one head's page table.
struct EntryRange {
  std::int64_t first = 0;
  std::int64_t last = 0;  ///< at or below first: nothing
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

/// What one step does to a head.
template <class State>
struct KeepChanges {
  EntryRange take;     ///< filled by begin; given back when the step is dropped
  EntryRange release;  ///< given back by commit
  State next{};        ///< the sequence's state once the step is committed
};

/// The stored rows that some query of a step may see, oldest first.
struct StoredRuns {
  std::array<KvRun, 3> runs{};  ///< unused ones have count 0
  /// Rows in all runs.
  constexpr std::int64_t num_rows() const { return runs[0].count + runs[1].count + runs[2].count; }
};

/// The compensation row that goes with stored rows.
struct FoldedRows {
  std::int64_t row = 0;    ///< which of the head's compensation rows it is
  std::int64_t count = 0;  ///< tokens that it stands for; 0: there is none
};

/// One compensation row that a step makes: another one, and perhaps the rows of one page more.
struct FoldMove {
  std::optional<std::int64_t> from;  ///< row to begin with; none: zero
  std::int64_t to = 0;               ///< row that is made
  std::int64_t entry = 0;            ///< table entry of the page to add
  std::int64_t first_row = 0;        ///< rows [first_row, end_row) of it; none: a mere copy
  std::int64_t end_row = 0;          ///< see above
  std::int64_t count = 0;            ///< tokens that the new row stands for
};

/// A kind of budget in a cache: everything that depends on it, in one type of one file.
///
/// A rule is a few numbers; what it remembers of a sequence is its State, one for each sequence and
/// class of heads, of which a default one belongs to an empty sequence. Everything else follows
/// from the sequence's lengths, so that a dropped step has nothing to undo: commit replaces the
/// state, rollback leaves it, fork copies it.
///
/// - `make(budget, limits)`: the rule; throws ConfigError where the two do not go together.
/// - `table_entries(pages)`: entries of one head's table for a sequence of at most that many pages
///   of tokens; never decreasing.
/// - `held(state, length, high_water)`: entries with a page between steps, at most two ranges.
/// - `changes(state, lengths)`: what one step takes, releases and remembers.
/// - `rolled_back(state, from, to)`: entries that a rollback between these lengths gives back.
/// - `frozen(state, high_water)`: held pages of entries below this one are out of reach of every
///   append and permitted rollback, so that a fork may share them.
/// - `peak_entries(max_chunk)`: most entries with a page while a step of so many tokens is open.
/// - `most_rows()`: most stored rows in `runs`, at any length and phase.
/// - `lowest_kept(state, high_water)`: the lowest length whose rows are all there still; rollback
///   goes no lower, and a fork at a length below `high_water - max_rollback` begins no lower.
/// - `fork_entries()`: most held entries that a fork does not share.
/// - `released_entries()`: most entries that a sequence gives back, as it grows, without having
///   taken others for the same rows: a fork may hold them still.
/// - `slots_written(state, length)`: slots of held pages below this one have been written; no query
///   and no rollback asks for others.
/// - `to_word(state)`, `from_word(word, high_water)`: the state in a snapshot, and back; nothing
///   where no sequence of this high water can have it.
/// - `runs(state, length, phase)`, `folded(state, length)`: what the first query of a step sees.
/// - `window(phase)`: what each query of a step may see of that, Window::everything() if all.
/// - `slots(state)`, `append_slots(state, lengths)`: where rows lie, and where a step's rows go; if
///   the two begin at different entries, the held pages are carried over first.
/// - `compensation_rows()`, `for_each_fold(state, lengths, fn)`: compensation rows of one head, and
///   the FoldMoves of a step, in order.
/// - `class_budget(budget)`: what of a budget its class of heads is known by; heads that it makes
///   equal have equal rules.
/// - `kKeepsEverything`: whether every row stays, so that each query sees all before it.
/// - `kSelects`: whether a selection may drop any rows of any of its heads; if so, see SelectsRows.
template <class R>
concept KeepRule = std::is_trivially_copyable_v<typename R::State> &&
    std::is_default_constructible_v<typename R::State> && std::equality_comparable<R> &&
    requires(const R rule, const typename R::Budget& budget, const KeepLimits& limits,
             const typename R::State& state, const StepLengths& lengths, std::int64_t tokens,
             Phase phase, void (*fold)(const FoldMove&)) {
  { R::make(budget, limits) } -> std::same_as<R>;
  { rule.table_entries(tokens) } -> std::same_as<std::int64_t>;
  { rule.held(state, tokens, tokens) } -> std::same_as<std::array<EntryRange, 2>>;
  { rule.changes(state, lengths) } -> std::same_as<KeepChanges<typename R::State>>;
  { rule.rolled_back(state, tokens, tokens) } -> std::same_as<EntryRange>;
  { rule.frozen(state, tokens) } -> std::same_as<std::int64_t>;
  { rule.peak_entries(tokens) } -> std::same_as<std::int64_t>;
  { rule.most_rows() } -> std::same_as<std::int64_t>;
  { rule.lowest_kept(state, tokens) } -> std::same_as<std::int64_t>;
  { rule.fork_entries() } -> std::same_as<std::int64_t>;
  { rule.released_entries() } -> std::same_as<std::int64_t>;
  { rule.slots_written(state, tokens) } -> std::same_as<std::int64_t>;
  { rule.to_word(state) } -> std::same_as<std::uint64_t>;
  { rule.from_word(std::uint64_t{}, tokens) } -> std::same_as<std::optional<typename R::State>>;
  { rule.runs(state, tokens, phase) } -> std::same_as<StoredRuns>;
  { rule.folded(state, tokens) } -> std::same_as<FoldedRows>;
  { rule.window(phase) } -> std::same_as<Window>;
  { rule.slots(state) } -> std::same_as<SlotMap>;
  { rule.append_slots(state, lengths) } -> std::same_as<SlotMap>;
  { rule.compensation_rows() } -> std::same_as<std::int64_t>;
  rule.for_each_fold(state, lengths, fold);
  { R::class_budget(budget) } -> std::same_as<typename R::Budget>;
  { R::kKeepsEverything } -> std::convertible_to<bool>;
  { R::kSelects } -> std::convertible_to<bool>;
};

/// A rule of which each head may have lost other rows than its neighbours. What a step changes is
/// the same for all heads of a class; what one head holds and shows is asked of its own state.
///
/// - `State::first`, `State::selected`: the slot of the first row, and the length at the last
///   selection, 0 where there was none.
/// - `forecast(budget)`: rows that selections are to leave of a head; 0: not known, all of them.
/// - `of_head(state, first)`: the state of the head whose first row lies in slot `first`.
/// - `after_selection(length, first)`: the class's state once a selection at this length has left
///   rows from slot `first` on in the head that has most; each head's end at `length`.
/// - `first_after(length, count)`: the slot of the first of `count` rows that a selection leaves.
/// - `position_is_slot(state, slot)`: whether the row in this slot has it for its position; if not,
///   the cache has noted the position.
template <class R>
concept SelectsRows = KeepRule<R> && R::kSelects &&
    requires(const R rule, const typename R::Budget& budget, const typename R::State& state,
             std::int64_t tokens) {
  { state.first } -> std::convertible_to<std::int64_t>;
  { state.selected } -> std::convertible_to<std::int64_t>;
  { R::forecast(budget) } -> std::same_as<std::int64_t>;
  { rule.of_head(state, tokens) } -> std::same_as<typename R::State>;
  { rule.after_selection(tokens, tokens) } -> std::same_as<typename R::State>;
  { rule.first_after(tokens, tokens) } -> std::same_as<std::int64_t>;
  { rule.position_is_slot(state, tokens) } -> std::same_as<bool>;
};

}  // namespace headwise::inline v0
