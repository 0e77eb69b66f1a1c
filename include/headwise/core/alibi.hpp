// SPDX-License-Identifier: MIT
/// @file alibi.hpp
/// The slopes of ALiBi for a number of heads.
#pragma once

#include <bit>
#include <cmath>
#include <vector>

#include "headwise/core/bits.hpp"
#include "headwise/core/check.hpp"
#include "headwise/core/checked.hpp"
#include "headwise/core/shape.hpp"

namespace headwise::inline v0 {

/// SoftmaxOptions::alibi_slopes as the paper has them (Press et al., arXiv:2108.12409, section 3,
/// and its code for numbers that are no power of two): 2^(-max_bias h / n) for the h-th of n heads,
/// n a power of two. Of another number the first ones are those of the power below it, the rest
/// every second one of twice that power, from the first on.
/// @param max_bias  8 in the paper; models may have another (MPT's alibi_bias_max), > 0 and finite
/// @throws ConfigError for either out of range.
inline std::vector<float> alibi_slopes(int num_qo_heads, float max_bias = 8.0F) {
  detail::checked_range(num_qo_heads, 1, kMaxHeads, "num_qo_heads");
  if (!is_finite(max_bias) || max_bias <= 0.0F) {
    fail<ConfigError>("max_bias must be finite and above 0, got ", max_bias);
  }
  const auto heads = static_cast<unsigned>(num_qo_heads);
  const unsigned power = std::bit_floor(heads);
  std::vector<float> slopes;
  for (unsigned h = 0; h < heads; ++h) {
    const double steps = h < power ? h + 1.0 : (h - power) + 0.5;
    slopes.push_back(static_cast<float>(std::exp2(-static_cast<double>(max_bias) * steps / power)));
  }
  return slopes;
}

}  // namespace headwise::inline v0
