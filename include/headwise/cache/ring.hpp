// SPDX-License-Identifier: MIT
/// @file ring.hpp
/// Ring arithmetic of a streaming head: which slot a position has, and which rows may be seen.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#include "headwise/core/kv_view.hpp"
#include "headwise/core/position.hpp"

namespace headwise::inline v0 {

/// a / b rounded up, for a >= 0 and b > 0.
constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
/// The least multiple of b that is no less than a, for a >= 0 and b > 0.
constexpr std::int64_t round_up(std::int64_t a, std::int64_t b) { return ceil_div(a, b) * b; }

/// `rows` slots: the first `sink` positions stay in place, all later ones share the rest in turn.
struct Ring {
  std::int64_t sink = 0;  ///< first positions, which keep their slots
  std::int64_t rows = 0;  ///< > sink

  /// Slots that are shared in turn.
  constexpr std::int64_t turn() const { return rows - sink; }

  /// The one place where a position becomes a slot of a streaming head.
  constexpr Slot slot(Pos pos) const {
    return {pos.value < sink ? pos.value : sink + (pos.value - sink) % turn()};
  }

  /// The oldest position beyond the sinks that still has its row once `length` tokens are written.
  constexpr Pos oldest_kept(std::int64_t length) const { return {std::max(sink, length - turn())}; }

  /// Positions [first, last), all kept and none a sink, as at most two runs of slots.
  constexpr std::array<KvRun, 2> runs(Pos first, Pos last) const {
    if (first >= last) return {};
    const Slot start = slot(first);
    const std::int64_t until_wrap = std::min(last - first, rows - start.value);
    return {{{start, first, until_wrap},
             {Slot{sink}, first + until_wrap, (last - first) - until_wrap}}};
  }
};

}  // namespace headwise::inline v0
