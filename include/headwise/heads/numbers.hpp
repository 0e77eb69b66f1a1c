// SPDX-License-Identifier: MIT
/// @file numbers.hpp
/// Arithmetic that neither a consumer's -ffast-math nor its rounding mode may change.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace headwise::inline v0 {

/// Neither NaN nor infinite. std::isfinite is always true under -ffast-math; the bits are not.
constexpr bool is_finite(double x) {
  constexpr std::uint64_t kExponent = 0x7FF0000000000000U;
  return (std::bit_cast<std::uint64_t>(x) & kExponent) != kExponent;
}

/// Nearest integer, halves to even (Python's and NumPy's round).
inline double round_half_even(double x) {
  const double below = std::floor(x);
  const double rest = x - below;
  const bool up = rest > 0.5 || (rest == 0.5 && std::fmod(below, 2.0) != 0.0);
  return up ? below + 1.0 : below;
}

}  // namespace headwise::inline v0
