// SPDX-License-Identifier: MIT
/// @file knorm.hpp
/// Knorm: keys of a small norm attract attention.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>

#include "headwise/core/row_view.hpp"
#include "headwise/heads/token_scores.hpp"

/// Devoto et al., A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression,
/// arXiv:2406.11430. The score is -||k||: keys alone, nothing is protected, final at birth. The
/// paper leaves its first two layers whole. Raw norms of heads are not comparable.
namespace headwise::inline v0::knorm {

/// Appends one KV head to `scores`.
/// @param stored  positions of the keys, ascending
inline void add_head(const RowView& keys, std::span<const std::int32_t> stored,
                     TokenScores& scores) {
  const auto out = scores.add_head(stored);
  for (std::size_t j = 0; j < out.size(); ++j) {
    const float* key = keys.row(static_cast<std::int64_t>(j));
    double sum = 0.0;
    for (int d = 0; d < keys.dim; ++d) sum += static_cast<double>(key[d]) * key[d];
    out[j] = static_cast<float>(-std::sqrt(sum));
  }
}

}  // namespace headwise::inline v0::knorm
