// SPDX-License-Identifier: MIT
/// @file count_rule.hpp
/// How many heads stream at a given sparsity: the published counts, to the head.
#pragma once

#include <cmath>
#include <cstddef>
#include <limits>

#include "headwise/core/bits.hpp"
#include "headwise/core/check.hpp"
#include "headwise/heads/numbers.hpp"

namespace headwise::inline v0 {

/// How a sparsity becomes a number of heads.
enum class CountRule {
  kQuantile,  ///< ceil((n - 1) s): below the linear quantile; DuoAttention's and RLKV's code
  kRound,     ///< round(n s), halves to even: kvpress
};

/// Heads out of `num_heads` that stream; never fewer at a higher sparsity.
/// @param sparsity  share of KV heads that stream, in [0, 1]; 0 is none and 1 is all of them.
/// @throws ConfigError for a sparsity outside [0, 1] or NaN.
inline std::size_t num_streaming(std::size_t num_heads, double sparsity,
                                 CountRule rule = CountRule::kQuantile) {
  if (!is_finite(sparsity) || sparsity < 0.0 || sparsity > 1.0) {
    fail<ConfigError>("sparsity must be in [0, 1], got ", sparsity);
  }
  if (num_heads == 0 || sparsity >= 1.0) return num_heads;
  const auto n = static_cast<double>(num_heads);
  if (rule == CountRule::kRound) return static_cast<std::size_t>(round_half_even(n * sparsity));
  // 0.2 is not a double: 255 * 0.2 may land beside 51, and ceil would make that 52. What is within
  // the rounding of s and of the product (an ulp each; 4 to be safe) is meant to be the integer.
  const double x = (n - 1.0) * sparsity;
  const double integer = round_half_even(x);
  const double slack = 4.0 * std::numeric_limits<double>::epsilon() * x;
  return static_cast<std::size_t>(std::abs(x - integer) <= slack ? integer : std::ceil(x));
}

}  // namespace headwise::inline v0
