// SPDX-License-Identifier: MIT
/// @file logit_blocks.hpp
/// for_each_logits(): what queries give keys before the softmax, a block of keys at a time.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "headwise/core/check.hpp"
#include "headwise/core/row_view.hpp"
#include "headwise/simd/math.hpp"
#include "headwise/simd/simd.hpp"

namespace headwise::inline v0 {

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
    typename O::V sums[std::size_t{kVectors}];
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

/// Calls `visit(row, first, logits, count)` for every query and every block of keys that it sees:
/// logits[t] is scale * (query `row` . key `first + t`) for t in [0, count). Blocks begin at
/// multiples of kKeys whatever the queries are, so that a query's logits are the same bits however
/// a prompt is cut. Ascending in `first`; `logits` has room for kKeys, aligned.
/// @param queries  rows after RoPE, as many as `visible`
/// @param visible  query `i` sees keys [0, visible[i]): causality
/// @param keys  rows of their KV head, in the order of their positions
/// @param scale  usually 1 / sqrt(dim)
/// @throws ConfigError for widths or counts that differ, or a `visible` outside [0, keys.count];
///   nothing was visited.
/// Cost: 2 dim flop a query and key, the keys once for all queries; memory of one block.
template <class Isa = simd::BestIsa, class Visit>
void for_each_logits(const RowView& queries, std::span<const std::int64_t> visible,
                     const RowView& keys, float scale, Visit visit) {
  if (queries.dim != keys.dim) {
    fail<ConfigError>("queries of width ", queries.dim, " over keys of width ", keys.dim);
  }
  if (std::ssize(visible) != queries.count) {
    fail<ConfigError>(visible.size(), " counts of visible keys for ", queries.count, " queries");
  }
  std::int64_t most = 0;
  for (const std::int64_t count : visible) {
    if (count < 0 || count > keys.count) {
      fail<ConfigError>("a query sees ", count, " of ", keys.count, " keys");
    }
    most = std::max(most, count);
  }
  constexpr int kKeys = detail::KeyBlock<Isa>::kKeys;
  detail::KeyBlock<Isa> block(keys.dim);
  alignas(64) float logits[std::size_t{kKeys}];
  for (std::int64_t first = 0; first < most; first += kKeys) {
    block.load(keys, first);
    for (std::int64_t i = 0; i < queries.count; ++i) {
      const auto count = static_cast<int>(
          std::min<std::int64_t>(block.count(), visible[static_cast<std::size_t>(i)] - first));
      if (count <= 0) continue;
      block.logits(queries.row(i), scale, logits);
      visit(i, first, static_cast<const float*>(logits), count);
    }
  }
}

}  // namespace headwise::inline v0
