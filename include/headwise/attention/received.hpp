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

#include "headwise/core/check.hpp"
#include "headwise/core/row_view.hpp"
#include "headwise/simd/math.hpp"
#include "headwise/simd/simd.hpp"

namespace headwise::inline v0 {

/// What becomes of the weights that several queries give a key.
enum class Received : std::uint8_t {
  kSum,  ///< added (SnapKV, H2O)
  kMax,  ///< the largest one (KVzip)
};

namespace detail {

/// Logits of queries over 64 keys at a time: the keys as [dim][64] floats, so that one load serves
/// 64 keys of a dimension and no sum is horizontal.
template <class Isa>
class KeyBlock {
  using O = simd::Ops<Isa>;

 public:
  static constexpr int kKeys = 64;

  explicit KeyBlock(int dim) : dim_(dim), tile_(static_cast<std::size_t>(dim) * kKeys, 0.0F) {}

  /// Takes keys [first, first + kKeys), or those that there are.
  void load(const RowView& keys, std::int64_t first) {
    count_ = static_cast<int>(std::min<std::int64_t>(kKeys, keys.count - first));
    for (int t = 0; t < count_; ++t) {
      const float* key = keys.row(first + t);
      float* to = tile_.data() + t;
      for (int d = 0; d < dim_; ++d) to[static_cast<std::ptrdiff_t>(d) * kKeys] = key[d];
    }
  }
  int count() const { return count_; }

  /// `logits[t] = scale * query . key t` for all kKeys; those beyond count() mean nothing.
  void logits(const float* query, float scale, float* logits) const {
    constexpr int kVectors = kKeys / O::kWidth;
    typename O::V sums[kVectors];
    for (int i = 0; i < kVectors; ++i) sums[i] = O::zero();
    const float* tile = tile_.data();
    for (int d = 0; d < dim_; ++d, tile += kKeys) {
      const auto q = O::broadcast(query[d]);
      for (int i = 0; i < kVectors; ++i) {
        sums[i] = O::fma(q, O::load(tile + i * O::kWidth), sums[i]);
      }
    }
    const auto scales = O::broadcast(scale);
    for (int i = 0; i < kVectors; ++i) {
      O::store(logits + i * O::kWidth, O::mul(sums[i], scales));
    }
  }

  /// `weights[t] = exp(logits[t] - max)` for all kKeys.
  static void weights(const float* logits, float max, float* weights) {
    const auto maxima = O::broadcast(max);
    for (int t = 0; t < kKeys; t += O::kWidth) {
      O::store(weights + t, simd::exp<Isa>(O::sub(O::load(logits + t), maxima)));
    }
  }

 private:
  int dim_;
  int count_ = 0;
  std::vector<float> tile_;  // [dim][kKeys]
};

}  // namespace detail

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
  if (queries.dim != keys.dim) {
    fail<ConfigError>("queries of width ", queries.dim, " over keys of width ", keys.dim);
  }
  if (std::ssize(visible) != queries.count || std::ssize(received) != keys.count) {
    fail<ConfigError>(visible.size(), " counts of visible keys for ", queries.count,
                      " queries, sums of ", received.size(), " for ", keys.count, " keys");
  }
  std::int64_t most = 0;
  for (const std::int64_t count : visible) {
    if (count < 0 || count > keys.count) {
      fail<ConfigError>("a query sees ", count, " of ", keys.count, " keys");
    }
    most = std::max(most, count);
  }
  constexpr int kKeys = detail::KeyBlock<Isa>::kKeys;
  constexpr float kLowest = -3.0e38F;  // below every finite logit; no infinity for -ffast-math
  const auto rows = static_cast<std::size_t>(queries.count);
  std::vector<float> maxima(rows, kLowest);
  std::vector<float> sums(rows, 0.0F);
  detail::KeyBlock<Isa> block(keys.dim);
  alignas(64) float logits[kKeys];
  alignas(64) float weights[kKeys];
  const auto for_each_block = [&](auto&& fn) {
    for (std::int64_t first = 0; first < most; first += kKeys) {
      block.load(keys, first);
      for (std::size_t i = 0; i < rows; ++i) {
        const auto count =
            static_cast<int>(std::min<std::int64_t>(block.count(), visible[i] - first));
        if (count <= 0) continue;
        block.logits(queries.row(static_cast<std::int64_t>(i)), scale, logits);
        fn(i, first, count);
      }
    }
  };
  for_each_block([&](std::size_t i, std::int64_t, int count) {
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
  for_each_block([&](std::size_t i, std::int64_t first, int count) {
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
