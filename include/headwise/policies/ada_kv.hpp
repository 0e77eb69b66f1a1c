// SPDX-License-Identifier: MIT
/// @file ada_kv.hpp
/// AdaKV: the heads of a layer share its budget by their scores.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "headwise/core/bits.hpp"
#include "headwise/core/check.hpp"
#include "headwise/core/checked.hpp"
#include "headwise/heads/numbers.hpp"
#include "headwise/heads/token_counts.hpp"
#include "headwise/heads/token_scores.hpp"

/// Feng et al., Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation,
/// arXiv:2407.11550. An allocator over any scorer whose scores are comparable between the heads of
/// a layer: heads whose attention is spread get more tokens, and each keeps a safeguard.
///
///     auto counts = ada_kv::Policy{}.counts(scores, protection, 1024);
namespace headwise::inline v0::ada_kv {

/// The allocation of kvpress, which spends the budget exactly.
struct Policy {
  double floor = 0.2;  ///< share of the mean count that every head keeps of its own best tokens

  /// Tokens of each head of a layer; their sum is heads x mean (fewer where less is stored).
  /// @param mean  tokens a head, protected ones included
  /// @throws ConfigError for a floor outside [0, 1], or a negative mean.
  KeepCounts counts(const TokenScores& layer, const Protection& protection,
                    std::int64_t mean) const {
    if (!is_finite(floor) || floor < 0.0 || floor > 1.0) {
      fail<ConfigError>("floor must be in [0, 1], got ", floor);
    }
    detail::checked_range(mean, 0, kMaxTokens, "tokens to keep");
    const std::int64_t total = detail::checked_mul(mean, layer.num_heads(), "tokens to keep");
    const auto safe = static_cast<std::int64_t>(floor * static_cast<double>(mean));
    return shared_counts(layer, protection, total, safe);
  }
};

/// The allocation of the released code and its descendants, which rounds each head by itself and so
/// misses the total by a few tokens: round_half_even(count (1 - floor) + trunc(floor b)), where
/// count is how many of the layer's heads x b best tokens are the head's.
struct ReleasedPolicy {
  double floor = 0.2;  ///< 0.2 in the paper, 0.5 in the released example
  bool normalize =
      false;  ///< weigh a head's scores with the share that its b best have of their sum

  /// Tokens of each head of a layer, protected ones included.
  /// @param mean  tokens a head, protected ones included; b is what it leaves for the others
  /// @throws ConfigError for a floor outside [0, 1], or a mean below the protected tokens.
  KeepCounts counts(const TokenScores& layer, const Protection& protection,
                    std::int64_t mean) const {
    if (!is_finite(floor) || floor < 0.0 || floor > 1.0) {
      fail<ConfigError>("floor must be in [0, 1], got ", floor);
    }
    TokenScores weighed(layer.length());
    std::vector<std::int64_t> forced;
    std::int64_t total = 0;
    for (std::int64_t h = 0; h < layer.num_heads(); ++h) {
      forced.push_back(layer.num_protected(h, protection));
      if (mean < forced.back()) {
        fail<ConfigError>("KV head ", h, ": ", mean, " tokens are to be kept, but ", forced.back(),
                          " are protected");
      }
      total += mean;
      const double weight = normalize ? top_share(layer, protection, h, mean) : 1.0;
      const auto from = layer.scores(h);
      const auto to = weighed.add_head(layer.positions(h));
      for (std::size_t j = 0; j < to.size(); ++j) {
        to[j] = static_cast<float>(static_cast<double>(from[j]) * weight);
      }
    }
    KeepCounts counts = shared_counts(weighed, protection, total);
    for (std::size_t h = 0; h < counts.size(); ++h) {
      const auto b = static_cast<double>(mean - forced[h]);
      const double share = static_cast<double>(counts[h] - forced[h]) * (1.0 - floor);
      counts[h] =
          forced[h] + static_cast<std::int64_t>(round_half_even(share + std::trunc(floor * b)));
      counts[h] = std::min(counts[h], layer.num_tokens(static_cast<std::int64_t>(h)));
    }
    return counts;
  }

 private:
  static double top_share(const TokenScores& layer, const Protection& protection, std::int64_t h,
                          std::int64_t mean) {
    const auto scores = layer.scores(h);
    const auto positions = layer.positions(h);
    double all = 0.0;
    double top = 0.0;
    std::int64_t rank = 0;
    for (const std::int32_t token : layer.order(h, protection)) {
      const auto j = static_cast<std::size_t>(token);
      const bool best = rank++ < mean;
      if (protection.covers(positions[j], layer.length()) || !is_finite(scores[j])) continue;
      all += static_cast<double>(scores[j]);
      if (best) top += static_cast<double>(scores[j]);
    }
    return all > 0.0 ? top / all : 1.0;
  }
};

}  // namespace headwise::inline v0::ada_kv
