// SPDX-License-Identifier: MIT
/// @file int4_rows.hpp
/// Int4Rows: half a byte an element and a scale for 32 of them, K and V each with their own.
#pragma once

#include <algorithm>
#include <cstdint>

#include "headwise/cache/rows/scaled_rows.hpp"
#include "headwise/core/dtype.hpp"

namespace headwise::inline v0 {

namespace detail {

/// -8 to 7: the end that reaches farther is given to the side that does, by the scale's sign.
struct Int4 {
  using KElement = Int4Steps;
  using VElement = Int4Columns;
  static constexpr std::int32_t kLeast = -8;
  static constexpr std::int32_t kMost = 7;

  static bf16 scale_of(float low, float high) {
    const bool flipped = high > low;
    const float far = flipped ? high : low;
    const float near = flipped ? low : high;
    // Half a step beyond either end rounds to it.
    const std::uint16_t bits = scale_bits(std::max(far / 8.5F, near / 7.5F), 0x7DFF);
    return {static_cast<std::uint16_t>(bits | (flipped ? 0x8000U : 0U))};
  }
};

}  // namespace detail

/// An element is round(x / scale) * scale, an integer from -8 to 7 times the scale of its 32
/// neighbours, whose sign gives the wider end to the side that reaches farther. |scale| is
/// max(far / 8.5, near / 7.5), rounded up to bf16, where far and near are the largest magnitudes of
/// that side and of the other: an element is off by at most |scale| / 2, that is by (max |x|) / 15
/// and 1 in 128 of it; beyond 3e38 by twice that. A group whose elements are all below 2^-100 is
/// stored as zeros; one with an infinity or a NaN reads as NaN throughout.
///
/// There is no zero point: after the sign it would take a tenth more bytes for as large a step.
///
/// A row of 128 takes 72 bytes of K and as many of V, 0.28 of f16's.
struct Int4Rows : detail::ScaledRows<detail::Int4> {
  static constexpr const char* name() { return "int4"; }
};

}  // namespace headwise::inline v0
