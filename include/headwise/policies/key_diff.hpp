// SPDX-License-Identifier: MIT
/// @file key_diff.hpp
/// KeyDiff: keys unlike the others stay.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "headwise/core/bits.hpp"
#include "headwise/core/row_view.hpp"
#include "headwise/heads/token_scores.hpp"

/// Park et al., KeyDiff: Key Similarity-Based KV Cache Eviction, arXiv:2504.15364. The score is
/// minus the cosine of a key and the mean of all stored keys' directions: keys alone, in [-1, 1],
/// comparable between heads. The mean moves when tokens leave, so that cuts block by block (the
/// paper's streaming prefill) keep other tokens than one cut. A key of zeros has no direction and
/// scores 0; one with an infinity or a NaN is no part of the mean.
namespace headwise::inline v0::key_diff {

/// Appends one KV head to `scores`.
/// @param stored  positions of the keys, ascending
/// Cost: 4 dim flop a key.
inline void add_head(const RowView& keys, std::span<const std::int32_t> stored,
                     TokenScores& scores) {
  const auto out = scores.add_head(stored);
  std::vector<double> anchor(static_cast<std::size_t>(keys.dim), 0.0);
  std::vector<double> norms(out.size());
  for (std::size_t j = 0; j < out.size(); ++j) {
    const float* key = keys.row(static_cast<std::int64_t>(j));
    double sum = 0.0;
    for (int d = 0; d < keys.dim; ++d) sum += static_cast<double>(key[d]) * key[d];
    if (!is_finite(sum)) out[j] = opaque_float(0x7FC00000U);  // counts as -infinity
    norms[j] = is_finite(sum) ? std::sqrt(sum) : 0.0;
    if (!(norms[j] > 0.0)) continue;
    for (int d = 0; d < keys.dim; ++d) anchor[static_cast<std::size_t>(d)] += key[d] / norms[j];
  }
  double length = 0.0;
  for (const double x : anchor) length += x * x;
  length = std::sqrt(length);
  for (std::size_t j = 0; j < out.size(); ++j) {
    if (!(norms[j] > 0.0) || !(length > 0.0)) continue;
    const float* key = keys.row(static_cast<std::int64_t>(j));
    double dot = 0.0;
    for (int d = 0; d < keys.dim; ++d) dot += anchor[static_cast<std::size_t>(d)] * key[d];
    out[j] = static_cast<float>(-dot / (norms[j] * length));
  }
}

}  // namespace headwise::inline v0::key_diff
