// SPDX-License-Identifier: MIT
/// @file q_filter.hpp
/// Q-Filters: one direction a head says which keys its queries like.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "headwise/core/check.hpp"
#include "headwise/core/row_view.hpp"
#include "headwise/heads/token_scores.hpp"

/// Godey et al., Q-Filters: Leveraging QK Geometry for Efficient KV Cache Compression,
/// arXiv:2503.02812. The score is minus the product of a key with the head's filter, the principal
/// direction of a sample of its queries, which comes from a file. Keys alone at run time, nothing
/// protected, final at birth. Not comparable between heads.
namespace headwise::inline v0::q_filter {

/// Appends one KV head to `scores`.
/// @param filter  [k_dim] of this head
/// @param stored  positions of the keys, ascending
/// @throws ConfigError for a filter of another width.
inline void add_head(std::span<const float> filter, const RowView& keys,
                     std::span<const std::int32_t> stored, TokenScores& scores) {
  if (std::ssize(filter) != keys.dim) {
    fail<ConfigError>("a filter of width ", filter.size(), " over keys of width ", keys.dim);
  }
  const auto out = scores.add_head(stored);
  for (std::size_t j = 0; j < out.size(); ++j) {
    const float* key = keys.row(static_cast<std::int64_t>(j));
    double sum = 0.0;
    for (std::size_t d = 0; d < filter.size(); ++d) {
      sum += static_cast<double>(filter[d]) * static_cast<double>(key[d]);
    }
    out[j] = static_cast<float>(-sum);
  }
}

}  // namespace headwise::inline v0::q_filter
