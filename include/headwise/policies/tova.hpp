// SPDX-License-Identifier: MIT
/// @file tova.hpp
/// TOVA: what the newest query looks at least goes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "headwise/attention/observed_queries.hpp"
#include "headwise/core/row_view.hpp"
#include "headwise/heads/token_scores.hpp"
#include "headwise/simd/simd.hpp"

/// Oren et al., Transformers are Multi-State RNNs, arXiv:2401.06104. The weights of the newest
/// query alone, averaged over all query heads of the layer: one set of tokens for all KV heads. No
/// state. Here the newest token stays; in the released code it competes with its own weight and may
/// be dropped in its own step (`newest_competes`).
namespace headwise::inline v0::tova {

/// The method's one choice.
struct Policy {
  bool newest_competes = false;  ///< as the released code
  /// What stays whatever its score.
  constexpr Protection protection() const { return {0, newest_competes ? 0 : 1}; }
};

/// Adds the weights of the last query of each query head of one KV head's group to `sums`: call it
/// for all KV heads of a layer, which store the same tokens, and divide by their query heads; or
/// for one KV head, whose tokens are then chosen by its own group.
/// @param queries  of the newest token alone (QueryWindow of 1)
/// @param stored  positions of the keys, ascending
/// @param sums  [keys.count]
/// @throws ConfigError for sizes that differ.
template <class Isa = simd::BestIsa>
void add_weights(const ObservedQueries& queries, const RowView& keys,
                 std::span<const std::int32_t> stored, std::span<float> sums) {
  for (int g = 0; g < queries.group_size; ++g) {
    received_attention<Isa>(queries, g, keys, stored, Received::kSum, sums);
  }
}

/// Appends the KV heads of a layer to `scores`, all with the layer's mean.
/// @param queries,keys  [num_kv_heads]
/// @param stored  positions of the keys of all these heads
/// @throws ConfigError for sizes that differ.
template <class Isa = simd::BestIsa>
void add_layer(std::span<const ObservedQueries> queries, std::span<const RowView> keys,
               std::span<const std::int32_t> stored, TokenScores& scores) {
  std::vector<float> sums(stored.size(), 0.0F);
  int num_heads = 0;
  for (std::size_t h = 0; h < queries.size(); ++h) {
    add_weights<Isa>(queries[h], keys[h], stored, sums);
    num_heads += queries[h].group_size;
  }
  for (std::size_t h = 0; h < queries.size(); ++h) {
    const auto out = scores.add_head(stored);
    for (std::size_t j = 0; j < out.size(); ++j) out[j] = sums[j] / static_cast<float>(num_heads);
  }
}

}  // namespace headwise::inline v0::tova
