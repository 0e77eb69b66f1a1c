// SPDX-License-Identifier: MIT
/// @file observed_queries.hpp
/// ObservedQueries: some queries of one KV head's group, as scorers read them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "headwise/attention/received.hpp"
#include "headwise/core/check.hpp"
#include "headwise/core/row_view.hpp"
#include "headwise/core/tensor_view.hpp"
#include "headwise/simd/simd.hpp"

namespace headwise::inline v0 {

/// Queries of all query heads that read one KV head, after RoPE; borrowed. In any order: each has
/// its position.
struct ObservedQueries {
  TensorView<const float> q;                ///< [positions.size(), group_size, dim]
  std::span<const std::int32_t> positions;  ///< of each query's token
  int group_size = 1;                       ///< query heads
  int dim = 0;                              ///< k_dim
  float scale = 0.0F;                       ///< of the logits; usually 1 / sqrt(dim)

  /// Queries of each head.
  std::int64_t count() const { return static_cast<std::int64_t>(positions.size()); }
  /// Those of one query head of the group.
  RowView of(int head_in_group) const {
    return {q.row(0, head_in_group), q.stride_n, count(), dim};
  }
};

/// Adds to `received[j]`, or raises it to, the weight that each query of one query head gives the
/// stored key `j`: received_attention() under causality by positions.
/// @param stored  positions of the keys, ascending
template <class Isa = simd::BestIsa>
void received_attention(const ObservedQueries& queries, int head_in_group, const RowView& keys,
                        std::span<const std::int32_t> stored, Received how,
                        std::span<float> received) {
  if (std::ssize(stored) != keys.count) {
    fail<ConfigError>(stored.size(), " positions for ", keys.count, " keys");
  }
  std::vector<std::int64_t> visible;
  for (const std::int32_t position : queries.positions) {
    visible.push_back(std::ranges::upper_bound(stored, position) - stored.begin());
  }
  received_attention<Isa>(queries.of(head_in_group), visible, keys, queries.scale, how, received);
}

}  // namespace headwise::inline v0
