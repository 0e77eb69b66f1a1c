// SPDX-License-Identifier: MIT
/// @file chunk_kv.hpp
/// ChunkKV: whole chunks of neighbouring tokens stay or go, the same in all heads of a layer.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <tuple>
#include <vector>

#include "headwise/core/bits.hpp"
#include "headwise/core/check.hpp"
#include "headwise/core/checked.hpp"
#include "headwise/heads/kept_positions.hpp"
#include "headwise/heads/token_scores.hpp"

/// Liu et al., ChunkKV: Semantic-Preserving KV Cache Compression for Efficient Long-Context LLM
/// Inference, arXiv:2502.00299. Over any scorer: a chunk is worth the mean, over its tokens, of the
/// sum over the layer's KV heads. A chunk of a page's tokens moves no row within its pages. A chunk
/// with a protected token stays (published: a sentinel score has the same effect).
namespace headwise::inline v0::chunk_kv {

/// The published knob.
struct Policy {
  std::int64_t chunk = 20;  ///< rows; the last chunk may be shorter
};

/// Appends the KV heads of a layer, which store the same tokens: whole chunks, protected ones
/// first, then by value, `num_chunks` of them or as many as are protected.
/// @throws ConfigError for heads that store unlike tokens, a chunk below 1 or a negative number.
inline void select_chunks(const Policy& policy, const TokenScores& layer,
                          const Protection& protection, std::int64_t num_chunks,
                          KeptPositions& kept) {
  detail::checked_range(policy.chunk, 1, kMaxTokens, "chunk");
  detail::checked_range(num_chunks, 0, kMaxTokens, "chunks to keep");
  if (layer.num_heads() == 0) return;
  const auto positions = layer.positions(0);
  for (std::int64_t h = 1; h < layer.num_heads(); ++h) {
    if (!std::ranges::equal(layer.positions(h), positions)) {
      fail<ConfigError>("KV head ", h, " has stored other tokens than head 0: no common chunks");
    }
  }
  struct Chunk {
    double value = 0.0;
    bool counts = true;  // no score of it is infinite or NaN
    bool stays = false;
  };
  const std::int64_t tokens = std::ssize(positions);
  std::vector<Chunk> chunks(static_cast<std::size_t>((tokens + policy.chunk - 1) / policy.chunk));
  for (std::size_t c = 0; c < chunks.size(); ++c) {
    const std::int64_t first = static_cast<std::int64_t>(c) * policy.chunk;
    const std::int64_t last = std::min(first + policy.chunk, tokens);
    for (std::int64_t j = first; j < last; ++j) {
      const auto at = static_cast<std::size_t>(j);
      chunks[c].stays |= protection.covers(positions[at], layer.length());
      for (std::int64_t h = 0; h < layer.num_heads(); ++h) {
        const float score = layer.scores(h)[at];
        chunks[c].counts &= is_finite(score);
        if (is_finite(score)) chunks[c].value += static_cast<double>(score);
      }
    }
    chunks[c].value /= static_cast<double>(last - first);
  }
  std::vector<std::size_t> order(chunks.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
    const auto key = [&](std::size_t c) {
      return std::tuple(!chunks[c].stays, !chunks[c].counts, -chunks[c].value, c);
    };
    return key(a) < key(b);
  });
  const std::int64_t protected_ones = std::ranges::count_if(chunks, &Chunk::stays);
  order.resize(
      std::min(order.size(), static_cast<std::size_t>(std::max(num_chunks, protected_ones))));
  std::sort(order.begin(), order.end());
  std::vector<std::int32_t> chosen;
  for (const std::size_t c : order) {
    const auto first = positions.begin() + static_cast<std::ptrdiff_t>(c) * policy.chunk;
    chosen.insert(chosen.end(), first, std::min(first + policy.chunk, positions.end()));
  }
  for (std::int64_t h = 0; h < layer.num_heads(); ++h) kept.add_head(chosen);
}

}  // namespace headwise::inline v0::chunk_kv
