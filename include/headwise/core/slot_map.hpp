// SPDX-License-Identifier: MIT
/// @file slot_map.hpp
/// SlotMap: which slot a position's row lies in, whatever rule keeps it; the same on host and
/// device.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#include "headwise/core/config.hpp"
#include "headwise/core/kv_view.hpp"
#include "headwise/core/position.hpp"

namespace headwise::inline v0 {

/// The first `sink` positions keep their slots, all later ones share `turn` slots behind them in
/// turn. Where nothing is ever overwritten `turn` is 0, and slot == pos.
struct SlotMap {
  std::int64_t first_entry = 0;  ///< page-table entry of slot 0
  std::int64_t sink = 0;         ///< first positions, which keep their slots
  std::int64_t turn = 0;         ///< slots that the others share; 0: every position has its own

  /// The one place where a position becomes a slot.
  HEADWISE_HOST_DEVICE constexpr Slot slot(Pos pos) const {
    if (turn == 0 || pos.value < sink) return {pos.value};
    return {sink + (pos.value - sink) % turn};
  }

  /// Whether the row of `pos` is still there once `length` tokens are written.
  HEADWISE_HOST_DEVICE constexpr bool keeps(Pos pos, std::int64_t length) const {
    return turn == 0 || pos.value < sink || pos.value >= length - turn;
  }

  /// Whether the rows of `count` positions from `first` on lie one behind the other, while kept.
  HEADWISE_HOST_DEVICE constexpr bool in_a_row(Pos first, std::int64_t count) const {
    if (turn == 0 || first.value + count <= sink) return true;
    return first.value >= sink && (first.value - sink) % turn + count <= turn;
  }

  /// Positions [first, last), all kept and none a sink, as at most two runs of slots: the older
  /// one, and what wrapped around.
  constexpr std::array<KvRun, 2> runs(Pos first, Pos last) const {
    if (first >= last) return {};
    const Slot start = slot(first);
    const std::int64_t until_wrap =
        turn == 0 ? last - first : std::min(last - first, sink + turn - start.value);
    return {{{start, first, until_wrap},
             {Slot{sink}, first + until_wrap, (last - first) - until_wrap}}};
  }

  friend constexpr bool operator==(const SlotMap&, const SlotMap&) = default;
};

}  // namespace headwise::inline v0
