// SPDX-License-Identifier: MIT
/// @file expected_attention.hpp
/// Expected Attention: what queries that are yet to come will look at, were they like those before.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "headwise/attention/query_moments.hpp"
#include "headwise/attention/rope.hpp"
#include "headwise/core/bits.hpp"
#include "headwise/core/check.hpp"
#include "headwise/core/checked.hpp"
#include "headwise/core/row_view.hpp"
#include "headwise/heads/token_scores.hpp"

/// Devoto et al., Expected Attention: KV Cache Compression by Estimating Attention from Future
/// Queries Distribution, arXiv:2510.00636. Queries before RoPE are taken for Gaussian with the mean
/// and covariance seen so far (or in a calibration); turned to the mean of the next `future`
/// positions they give each key an expected exp(q.k), and, times its value's norm, a score.
///
/// Here the sums run over all queries and the future begins at the sequence's true length (the
/// published code, while decoding, skips the first queries of each buffer and begins at the
/// buffer's). Sinks stay; nothing recent is protected. Comparable between heads of a layer.
namespace headwise::inline v0::expected_attention {

using Pairs = RopePairs;   ///< see RopePairs
using headwise::v0::Rope;  ///< see Rope

/// The published knobs.
struct Policy {
  std::int64_t sink = 4;       ///< first tokens, which stay; their queries are left out
  std::int64_t future = 512;   ///< positions ahead; >= 1
  double epsilon = 0.0;        ///< added before the values' norms; 0.01 under AdaKV in kvpress
  bool use_covariance = true;  ///< else the mean alone
  bool use_values = true;      ///< times ||v||
  Rope rope = {};              ///< the model's

  /// What stays whatever its score.
  constexpr Protection protection() const { return {sink, 0}; }
};

namespace detail {

/// The mean rotation over positions [first, first + count): one cosine and one sine a pair.
inline std::vector<std::pair<double, double>> mean_rotation(const Rope& rope, int dim,
                                                            std::int64_t first,
                                                            std::int64_t count) {
  std::vector<std::pair<double, double>> turns;
  for (int i = 0; i < dim / 2; ++i) {
    const double frequency = rope.frequency(i, dim);
    double cosines = 0.0;
    double sines = 0.0;
    for (std::int64_t p = first; p < first + count; ++p) {
      cosines += std::cos(frequency * static_cast<double>(p));
      sines += std::sin(frequency * static_cast<double>(p));
    }
    turns.emplace_back(cosines / static_cast<double>(count), sines / static_cast<double>(count));
  }
  return turns;
}

/// `x <- R x` for a vector whose elements lie `stride` apart.
inline void turn(const Rope& rope, const std::vector<std::pair<double, double>>& turns, double* x,
                 std::size_t stride) {
  const int dim = 2 * static_cast<int>(turns.size());
  for (int i = 0; i < dim / 2; ++i) {
    const auto [cosine, sine] = turns[static_cast<std::size_t>(i)];
    const auto [a, b] = rope.pair(i, dim);
    const double first = x[a * stride];
    const double second = x[b * stride];
    x[a * stride] = first * cosine - second * sine;
    x[b * stride] = second * cosine + first * sine;
  }
}

}  // namespace detail

/// Appends one KV head to `scores`.
/// @param moments  [group_size] of its query heads, before RoPE, from position `sink` on
/// @param keys,values  stored rows; keys after RoPE
/// @param stored  their positions, ascending
/// @throws ConfigError for sizes that differ, an odd width, a rope that is not of it, a future
/// below
///   1 or an epsilon that is negative or not finite.
/// Cost: group x dim^2 multiply-adds a key, with the covariance.
inline void add_head(const Policy& policy, std::span<const QueryMoments> moments,
                     const RowView& keys, const RowView& values,
                     std::span<const std::int32_t> stored, TokenScores& scores) {
  headwise::detail::checked_range(policy.future, 1, kMaxTokens, "future");
  if (!is_finite(policy.epsilon) || policy.epsilon < 0.0) {
    fail<ConfigError>("epsilon must be finite and >= 0, got ", policy.epsilon);
  }
  policy.rope.check(keys.dim);
  if (keys.count != values.count || keys.count != std::ssize(stored)) {
    fail<ConfigError>(keys.count, " keys, ", values.count, " values and ", stored.size(),
                      " positions");
  }
  const auto dim = static_cast<std::size_t>(keys.dim);
  const auto turns = detail::mean_rotation(policy.rope, keys.dim, scores.length(), policy.future);
  const auto out = scores.add_head(stored);
  std::vector<double> logits(out.size());
  std::vector<double> mean_weights(out.size(), 0.0);
  const auto is_sink = [&](std::size_t j) { return stored[j] < policy.sink; };
  for (const QueryMoments& head : moments) {
    if (head.dim() != keys.dim) {
      fail<ConfigError>("moments of width ", head.dim(), " over keys of width ", keys.dim);
    }
    std::vector<double> mean = head.mean();
    detail::turn(policy.rope, turns, mean.data(), 1);
    std::vector<double> covariance;
    if (policy.use_covariance) {  // R C R^T: rows, then columns
      covariance = head.covariance();
      for (std::size_t c = 0; c < dim; ++c) {
        detail::turn(policy.rope, turns, covariance.data() + c, dim);
      }
      for (std::size_t r = 0; r < dim; ++r) {
        detail::turn(policy.rope, turns, covariance.data() + r * dim, 1);
      }
    }
    double largest = -1.0e300;
    for (std::size_t j = 0; j < out.size(); ++j) {
      const float* key = keys.row(static_cast<std::int64_t>(j));
      double dot = 0.0;
      double spread = 0.0;
      for (std::size_t a = 0; a < dim; ++a) {
        const auto x = static_cast<double>(key[a]);
        dot += mean[a] * x;
        if (!policy.use_covariance) continue;
        const double* row = covariance.data() + a * dim;
        double product = 0.0;
        for (std::size_t b = 0; b < dim; ++b) product += row[b] * static_cast<double>(key[b]);
        spread += x * product;
      }
      const auto d = static_cast<double>(dim);
      logits[j] = dot / std::sqrt(d) + spread / (2.0 * d);
      if (!is_sink(j) && logits[j] > largest) largest = logits[j];
    }
    double total = 0.0;
    for (std::size_t j = 0; j < out.size(); ++j) {
      if (!is_sink(j)) total += logits[j] = std::exp(logits[j] - largest);
    }
    for (std::size_t j = 0; j < out.size(); ++j) {
      if (!is_sink(j)) mean_weights[j] += logits[j] / total / static_cast<double>(moments.size());
    }
  }
  for (std::size_t j = 0; j < out.size(); ++j) {
    double norm = 1.0;
    if (policy.use_values) {
      const float* value = values.row(static_cast<std::int64_t>(j));
      double squares = 0.0;
      for (int d = 0; d < values.dim; ++d) {
        squares += static_cast<double>(value[d]) * static_cast<double>(value[d]);
      }
      norm = std::sqrt(squares);
    }
    if (!is_sink(j)) out[j] = static_cast<float>((mean_weights[j] + policy.epsilon) * norm);
  }
}

}  // namespace headwise::inline v0::expected_attention
