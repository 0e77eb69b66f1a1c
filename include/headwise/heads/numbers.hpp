// SPDX-License-Identifier: MIT
/// @file numbers.hpp
/// Rounding that neither a consumer's -ffast-math nor its rounding mode may change.
#pragma once

#include <cmath>

namespace headwise::inline v0 {

/// Nearest integer, halves to even (Python's and NumPy's round).
inline double round_half_even(double x) {
  const double below = std::floor(x);
  const double rest = x - below;
  const bool up = rest > 0.5 || (rest == 0.5 && std::fmod(below, 2.0) != 0.0);
  return up ? below + 1.0 : below;
}

}  // namespace headwise::inline v0
