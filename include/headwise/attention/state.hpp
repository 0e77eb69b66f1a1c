// SPDX-License-Identifier: MIT
/// @file state.hpp
/// SoftmaxState: attention over some of the rows, mergeable with attention over the others.
#pragma once

#include <cmath>
#include <limits>

#include "headwise/core/config.hpp"
#include "headwise/simd/isa.hpp"

namespace headwise::inline v0 {

/// A score below every score. Finite, so that differences of scores are never NaN, under
/// -ffast-math or not.
inline constexpr float kNoScore = std::numeric_limits<float>::lowest();

/// One query row's attention over a set of rows with scores s: not yet divided by the sum.
///
/// Sets merge in any order and any grouping; everything cut (splits of a long head, sinks and ring,
/// a compensation row, partial results from elsewhere) comes together here.
struct SoftmaxState {
  float max = kNoScore;  ///< the largest score
  float sum = 0.0F;      ///< sum of exp(s - max); 0 exactly where the set is empty
  float* out = nullptr;  ///< [v_dim] sum of exp(s - max) * v; zeros where the set is empty

  /// Whether no row was seen.
  bool empty() const { return sum == 0.0F; }

  /// Logarithm of the sum of exp(s); kNoScore where the set is empty.
  float lse() const { return empty() ? kNoScore : max + std::log(sum); }
};

/// Adds the rows of `from` to `into`. An empty side is recognised by its sum, so no arithmetic is
/// done on the scores of nothing.
/// @param v_dim  a multiple of 16.
template <class Isa>
void merge(SoftmaxState& into, const SoftmaxState& from, int v_dim) noexcept {
  using O = simd::Ops<Isa>;
  if (from.empty()) return;
  const bool rises = into.empty() || from.max > into.max;
  const float max = rises ? from.max : into.max;
  const float keep = into.empty() ? 0.0F : std::exp(into.max - max);
  const float add = std::exp(from.max - max);
  into.max = max;
  into.sum = into.sum * keep + from.sum * add;
  for (int d = 0; d < v_dim; d += O::kWidth) {
    const auto kept = O::mul(O::load(into.out + d), O::broadcast(keep));
    O::store(into.out + d, O::fma(O::load(from.out + d), O::broadcast(add), kept));
  }
}

/// Writes the attention output of `state`: out / sum, or zeros where nothing was seen.
/// @param to  [v_dim], v_dim a multiple of 16; may be state.out itself.
template <class Isa>
void write_output(const SoftmaxState& state, float* to, int v_dim) noexcept {
  using O = simd::Ops<Isa>;
  const auto factor = O::broadcast(state.empty() ? 0.0F : 1.0F / state.sum);
  for (int d = 0; d < v_dim; d += O::kWidth) {
    O::store(to + d, O::mul(O::load(state.out + d), factor));
  }
}

}  // namespace headwise::inline v0
