// SPDX-License-Identifier: MIT
// expect: (static assertion failed|static_assert failed)
// A rule that forgets one member is no rule: nothing falls back to another kind's answer.
#include "headwise/cache/keep/keep.hpp"

using namespace headwise;

/// Everything but what a fork may share.
struct ForgetsForks {
  using Budget = KeepEverything;
  static constexpr bool kSelects = false;
  static constexpr bool kKeepsEverything = true;
  using State = EverythingRule::State;
  static ForgetsForks make(const Budget&, const KeepLimits&) { return {}; }
  static Budget class_budget(const Budget& budget) { return budget; }
  std::int64_t table_entries(std::int64_t pages) const { return pages; }
  std::array<EntryRange, 2> held(State, std::int64_t, std::int64_t) const { return {}; }
  KeepChanges<State> changes(State, const StepLengths&) const { return {}; }
  EntryRange rolled_back(State, std::int64_t, std::int64_t) const { return {}; }
#ifndef WRONG
  std::int64_t frozen(State, std::int64_t) const { return 0; }
#endif
  std::int64_t peak_entries(std::int64_t) const { return 0; }
  std::int64_t most_rows() const { return 0; }
  std::int64_t lowest_kept(State, std::int64_t) const { return 0; }
  std::int64_t fork_entries() const { return 0; }
  std::int64_t released_entries() const { return 0; }
  std::int64_t slots_written(State, std::int64_t) const { return 0; }
  std::uint64_t to_word(State) const { return 0; }
  std::optional<State> from_word(std::uint64_t, std::int64_t) const { return {}; }
  StoredRuns runs(State, std::int64_t, Phase) const { return {}; }
  FoldedRows folded(State, std::int64_t) const { return {}; }
  Window window(Phase) const { return {}; }
  SlotMap slots(State) const { return {}; }
  SlotMap append_slots(State, const StepLengths&) const { return {}; }
  std::int64_t compensation_rows() const { return 0; }
  void for_each_fold(State, const StepLengths&, void (*)(const FoldMove&)) const {}
  friend bool operator==(ForgetsForks, ForgetsForks) = default;
};

static_assert(KeepRule<ForgetsForks>);

int main() {}
