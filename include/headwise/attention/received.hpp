// SPDX-License-Identifier: MIT
/// @file received.hpp
/// The attention that each key receives from some queries: what most token scorers begin with.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "headwise/attention/logit_blocks.hpp"
#include "headwise/core/check.hpp"
#include "headwise/core/row_view.hpp"
#include "headwise/simd/simd.hpp"

namespace headwise::inline v0 {

/// What becomes of the weights that several queries give a key.
enum class Received : std::uint8_t {
  kSum,  ///< added (SnapKV, H2O)
  kMax,  ///< the largest one (KVzip)
};

/// Adds to `received[j]`, or raises it to, the softmax weight that each query gives key `j`.
///
/// Query `i` sees keys [0, visible[i]): causality, where the last keys are the queries' own tokens.
/// Two passes over QK: one for each row's maximum and sum, one for its weights; in fp32.
/// @param queries  rows after RoPE, as many as `visible`
/// @param keys  stored rows of their KV head, in the order of their positions
/// @param scale  of the logits; usually 1 / sqrt(dim)
/// @param received  [keys.count]
/// @throws ConfigError for widths or counts that differ, or a `visible` outside [0, keys.count].
/// Cost: 4 dim flop and two exponentials a query and key; memory of one block of 64 keys.
template <class Isa = simd::BestIsa>
void received_attention(const RowView& queries, std::span<const std::int64_t> visible,
                        const RowView& keys, float scale, Received how, std::span<float> received) {
  if (std::ssize(received) != keys.count) {
    fail<ConfigError>("sums of ", received.size(), " for ", keys.count, " keys");
  }
  constexpr float kLowest = -3.0e38F;  // below every finite logit; no infinity for -ffast-math
  const auto rows = static_cast<std::size_t>(queries.count);
  std::vector<float> maxima(rows, kLowest);
  std::vector<float> sums(rows, 0.0F);
  alignas(64) float weights[std::size_t{detail::KeyBlock<Isa>::kKeys}];
  const auto for_each_block = [&](auto&& fn) {
    for_each_logits<Isa>(queries, visible, keys, scale,
                         [&](std::int64_t i, std::int64_t first, const float* logits, int count) {
                           fn(static_cast<std::size_t>(i), first, logits, count);
                         });
  };
  for_each_block([&](std::size_t i, std::int64_t, const float* logits, int count) {
    const float max = *std::max_element(logits, logits + count);
    if (max > maxima[i]) {
      sums[i] *= std::exp(maxima[i] - max);
      maxima[i] = max;
    }
    detail::KeyBlock<Isa>::weights(logits, maxima[i], weights);
    float sum = 0.0F;
    for (int t = 0; t < count; ++t) sum += weights[t];
    sums[i] += sum;
  });
  for_each_block([&](std::size_t i, std::int64_t first, const float* logits, int count) {
    detail::KeyBlock<Isa>::weights(logits, maxima[i], weights);
    if (!(sums[i] > 0.0F)) return;  // no key that counts
    const float share = 1.0F / sums[i];
    float* to = received.data() + first;
    if (how == Received::kSum) {
      for (int t = 0; t < count; ++t) to[t] += weights[t] * share;
    } else {
      for (int t = 0; t < count; ++t) to[t] = std::max(to[t], weights[t] * share);
    }
  });
}

}  // namespace headwise::inline v0
