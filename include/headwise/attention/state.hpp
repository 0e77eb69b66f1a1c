// SPDX-License-Identifier: MIT
/// @file state.hpp
/// SoftmaxState: attention over some of the rows, mergeable with attention over the others.
#pragma once

#include <cmath>
#include <limits>

#include "headwise/core/bits.hpp"
#include "headwise/core/config.hpp"
#include "headwise/core/dtype.hpp"
#include "headwise/simd/isa.hpp"

namespace headwise::inline v0 {

/// Where the maximum of scores begins: no finite score is below it. Finite, so that differences to
/// it are never NaN, under -ffast-math or not. It hides nothing: what a query does not see has
/// probability 0 by its place, not by its score.
inline constexpr float kNoScore = std::numeric_limits<float>::lowest();

/// One query row's attention over a set of rows with scores s.
///
/// Sets merge in any order and any grouping; everything cut (splits of a long head, sinks and ring,
/// a compensation row, partial results from elsewhere) comes together here. A set without rows and
/// one whose scores are all -inf are the same: empty. A score of +inf or NaN makes sum and out NaN.
struct SoftmaxState {
  float max = kNoScore;  ///< the largest finite score
  float sum = 0.0F;      ///< sum of exp(s - max); 0 exactly where the set is empty
  float* out = nullptr;  ///< [v_dim] sum of exp(s - max) * v, divided by sum: no larger than a V is

  /// Whether no row has a probability. To -ffinite-math-only a NaN may equal 0.
  bool empty() const { return is_zero(sum); }

  /// Logarithm of the sum of exp(s); -infinity where the set is empty.
  float lse() const { return empty() ? opaque_float(0xFF800000U) : max + std::log(sum); }
};

/// Adds the rows of `from` to `into`. An empty side is recognised by its sum, so no arithmetic is
/// done on the scores of nothing, and its `out` is not read.
/// @param v_dim  a multiple of 16.
template <class Isa>
void merge(SoftmaxState& into, const SoftmaxState& from, int v_dim) noexcept {
  using O = simd::Ops<Isa>;
  if (from.empty()) return;
  if (into.empty()) {
    into.max = from.max;
    into.sum = from.sum;
    for (int d = 0; d < v_dim; d += O::kWidth) O::store(into.out + d, O::load(from.out + d));
    return;
  }
  const float max = from.max > into.max ? from.max : into.max;
  const float kept = into.sum * std::exp(into.max - max);
  const float added = from.sum * std::exp(from.max - max);
  into.max = max;
  into.sum = kept + added;
  // Shares of 1, so that outputs as large as floats get do not overflow.
  const auto keep = O::broadcast(kept / into.sum);
  const auto add = O::broadcast(added / into.sum);
  for (int d = 0; d < v_dim; d += O::kWidth) {
    const auto out = O::mul(O::load(into.out + d), keep);
    O::store(into.out + d, O::fma(O::load(from.out + d), add, out));
  }
}

/// Writes the attention output of `state`: its out, or zeros where nothing was seen.
/// @param to  [v_dim] floats, f16 or bf16, v_dim a multiple of 16; may be state.out itself.
template <class Isa, RowElement Out>
void write_output(const SoftmaxState& state, Out* to, int v_dim) noexcept {
  using O = simd::Ops<Isa>;
  const bool empty = state.empty();
  for (int d = 0; d < v_dim; d += O::kWidth) {
    O::store(to + d, empty ? O::zero() : O::load(state.out + d));
  }
}

}  // namespace headwise::inline v0
