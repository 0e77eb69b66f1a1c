// SPDX-License-Identifier: MIT
/// @file position.hpp
/// Where a token is in its sequence (Pos) and where its row lies in a head's pages (Slot).
#pragma once

#include <compare>
#include <cstdint>

#include "headwise/core/config.hpp"

namespace headwise::inline v0 {

/// A token's absolute index in its sequence, from 0. Never derived from a count of stored rows.
struct Pos {
  std::int64_t value = 0;  ///< tokens from the sequence's first one
  friend constexpr auto operator<=>(Pos, Pos) = default;
  friend constexpr bool operator==(Pos, Pos) = default;  // nvcc 13 does not derive it
  /// The position `tokens` later; earlier for a negative number.
  friend constexpr Pos operator+(Pos pos, std::int64_t tokens) { return {pos.value + tokens}; }
  /// Tokens from `b` to `a`.
  friend constexpr std::int64_t operator-(Pos a, Pos b) { return a.value - b.value; }
};

/// A row's index in one head's list of pages: page `value / page_tokens`, row `value %
/// page_tokens`.
struct Slot {
  std::int64_t value = 0;  ///< rows from the head's first one
  friend constexpr auto operator<=>(Slot, Slot) = default;
  friend constexpr bool operator==(Slot, Slot) = default;  // nvcc 13 does not derive it
  /// The slot `rows` later.
  friend constexpr Slot operator+(Slot slot, std::int64_t rows) { return {slot.value + rows}; }
};

}  // namespace headwise::inline v0
