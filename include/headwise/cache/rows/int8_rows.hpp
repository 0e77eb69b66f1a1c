// SPDX-License-Identifier: MIT
/// @file int8_rows.hpp
/// Int8Rows: a byte an element and a scale a row, K and V each with its own.
#pragma once

#include <algorithm>
#include <cstdint>

#include "headwise/cache/rows/scaled_rows.hpp"
#include "headwise/core/dtype.hpp"

namespace headwise::inline v0 {

namespace detail {

/// -127 to 127.
struct Int8 {
  using KElement = std::int8_t;
  using VElement = std::int8_t;
  static constexpr std::int32_t kLeast = -127;
  static constexpr std::int32_t kMost = 127;

  static bf16 scale_of(float low, float high) {
    return {scale_bits(std::max(low, high) / 127.0F, 0x7C01)};
  }
};

}  // namespace detail

/// An element is round(x / scale) * scale, scale = max |x| / 127 over its row, rounded up to bf16:
/// off by at most scale / 2, that is by max |x| / 254 and 1 in 128 of it; by twice that where max
/// |x| is beyond 3.4e38. A row whose elements are all below 2^-100 is stored as zeros; one with an
/// infinity or a NaN reads as NaN throughout.
///
/// A row of 128 takes 130 bytes of K and as many of V, 0.51 of f16's.
struct Int8Rows : detail::ScaledRows<detail::Int8> {
  static constexpr const char* name() { return "int8"; }
};

}  // namespace headwise::inline v0
