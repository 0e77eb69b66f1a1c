// SPDX-License-Identifier: MIT
/// @file class_state.cuh
/// From what a keep rule says of a sequence to what kernels read: the same for every rule.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>

#include "headwise/cache/cuda/step_state.cuh"
#include "headwise/cache/keep/keep_rule.hpp"
#include "headwise/core/check.hpp"
#include "headwise/core/phase.hpp"
#include "headwise/core/slot_map.hpp"
#include "headwise/core/window.hpp"

namespace headwise::inline v0::cuda {

namespace detail {

inline std::int32_t narrow(std::int64_t x) {
  return static_cast<std::int32_t>(
      std::clamp<std::int64_t>(x, 0, std::numeric_limits<std::int32_t>::max()));
}

/// The slots that the token at `length` sees, itself included: what touches is one run. Sinks and
/// ring do more often than not, and the token's own row continues one of them.
inline void set_slots(const StoredRuns& past, Slot own, ClassState& state) {
  std::array<std::array<std::int64_t, 2>, 4> runs{};
  std::size_t count = 0;
  for (const KvRun& run : past.runs) {
    if (run.count > 0) runs[count++] = {run.first_slot.value, run.first_slot.value + run.count};
  }
  runs[count++] = {own.value, own.value + 1};
  std::sort(runs.begin(), runs.begin() + static_cast<std::ptrdiff_t>(count));
  std::size_t used = 0;
  for (std::size_t i = 0; i < count; ++i) {
    if (used > 0 && state.slot_end[used - 1] == runs[i][0]) {
      state.slot_end[used - 1] = narrow(runs[i][1]);
      continue;
    }
    HEADWISE_ASSERT(used < 2, "a decode token sees at most two runs of slots");
    state.slot_begin[used] = narrow(runs[i][0]);
    state.slot_end[used++] = narrow(runs[i][1]);
  }
}

}  // namespace detail

/// What one class of heads has stored of one sequence, as a step finds it; the class's tables are
/// the caller's to fill in.
/// @param rule, kept  a keep rule and what it remembers of the sequence.
template <class Rule>
ClassState class_state(const Rule& rule, const typename Rule::State& kept,
                       const StepLengths& lengths, Phase phase) {
  using detail::narrow;
  const StoredRuns past = rule.runs(kept, lengths.length, phase);
  const SlotMap from = rule.slots(kept);
  const SlotMap to = rule.append_slots(kept, lengths);
  const Window window = rule.window(phase);
  HEADWISE_ASSERT(past.runs[0].first_slot.value == 0 && past.runs[0].first_pos.value == 0,
                  "the first run begins a sequence");
  HEADWISE_ASSERT(past.runs[2].count == 0 || past.runs[2].first_pos.value ==
                                                 past.runs[1].first_pos.value + past.runs[1].count,
                  "the newer run continues the older one");
  ClassState state;
  state.read_entry = narrow(from.first_entry);
  state.append_entry = narrow(to.first_entry);
  state.sink_slots = narrow(to.sink);
  state.turn = narrow(to.turn);
  state.first_count = narrow(past.runs[0].count);
  state.older_pos = narrow(past.runs[1].first_pos.value);
  state.older_slot = narrow(past.runs[1].first_slot.value);
  state.older_count = narrow(past.runs[1].count);
  state.newer_slot = narrow(past.runs[2].first_slot.value);
  state.newer_count = narrow(past.runs[2].count);
  state.sink = narrow(window.bounded() ? window.sink : 0);
  state.recent =
      narrow(window.bounded() ? window.recent : std::numeric_limits<std::int64_t>::max());
  if (lengths.next == lengths.length + 1) {
    // One token stays where its past is: its rows need no second ring.
    HEADWISE_ASSERT(from.first_entry == to.first_entry, "a decode token moves no rows");
    detail::set_slots(past, to.slot(Pos{lengths.length}), state);
  }
  return state;
}

/// Most rows that a head of this rule stores in a step: on a second ring every slot, once.
template <class Rule>
std::int64_t most_rows_stored(const Rule& rule, const typename Rule::State& kept,
                              const StepLengths& lengths) {
  const std::int64_t tokens = lengths.next - lengths.length;
  const SlotMap to = rule.append_slots(kept, lengths);
  const bool moves = rule.slots(kept).first_entry != to.first_entry;
  return tokens > 0 && moves ? std::max(tokens, to.sink + to.turn) : tokens;
}

}  // namespace headwise::inline v0::cuda
