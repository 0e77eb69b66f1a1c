// SPDX-License-Identifier: MIT
/// @file compress_kv.hpp
/// CompressKV: layers share a budget by how much compressing each of them costs.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <span>
#include <vector>

#include "headwise/core/bits.hpp"
#include "headwise/core/check.hpp"
#include "headwise/core/checked.hpp"
#include "headwise/heads/numbers.hpp"

/// Lin et al., CompressKV: Semantic Retrieval Heads Know What Tokens are Not Important Before
/// Generation, arXiv:2508.02401. Three parts: query heads chosen offline, tokens selected by those
/// heads' window attention (snap_kv's scores over these queries, one set for the layer), and this
/// allocator over layers. Importance is the relative error of a layer's output when it keeps 32
/// tokens, summed over a calibration and normalised to 1.
namespace headwise::inline v0::compress_kv {

/// The published bounds.
struct Policy {
  std::int64_t least = 32;        ///< tokens of a layer, or the mean where that is less
  std::int64_t most_of_mean = 3;  ///< a layer has at most so many times the mean

  /// Tokens of each layer's KV heads: `least` and a part of the rest by importance, halves to even,
  /// clipped; then one more (or less) a layer in passes, the most (least) important first, until
  /// the sum is mean x layers exactly. Ties: the lower layer.
  /// @param importance  [layers], >= 0; their sum is the whole
  /// @throws ConfigError for no layers, an importance that is negative or not finite, a sum of 0,
  /// or
  ///   a negative mean.
  std::vector<std::int64_t> counts(std::span<const double> importance, std::int64_t mean) const {
    if (importance.empty()) fail<ConfigError>("importances of at least 1 layer are needed, got 0");
    detail::checked_range(mean, 0, kMaxTokens, "mean tokens");
    detail::checked_range(least, 0, kMaxTokens, "least tokens");
    detail::checked_range(most_of_mean, 1, 1 << 20, "most_of_mean");
    const std::int64_t low = std::min(least, mean);
    const std::int64_t high = most_of_mean * mean;
    const std::int64_t layers = std::ssize(importance);
    const std::int64_t total = detail::checked_mul(mean, layers, "tokens");
    double whole = 0.0;
    for (std::size_t l = 0; l < importance.size(); ++l) {
      if (!is_finite(importance[l]) || importance[l] < 0.0) {
        fail<ConfigError>("layer ", l, ": an importance must be finite and >= 0, got ",
                          importance[l]);
      }
      whole += importance[l];
    }
    if (!is_finite(whole) || whole <= 0.0) {
      fail<ConfigError>("importances must add up to a finite number above 0, got ", whole);
    }
    std::vector<std::int64_t> counts;
    std::int64_t sum = 0;
    for (const double share : importance) {
      const double part =
          round_half_even(share / whole * static_cast<double>(total - low * layers));
      const double most = static_cast<double>(high - low);
      counts.push_back(low + static_cast<std::int64_t>(std::min(part, most)));
      sum += counts.back();
    }
    std::vector<std::size_t> order(importance.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    const bool lacks = sum < total;
    std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
      if (importance[a] == importance[b]) return a < b;
      return (importance[a] > importance[b]) == lacks;
    });
    for (bool moved = true; sum != total && moved;) {
      moved = false;
      for (const std::size_t l : order) {
        if (sum == total) break;
        if (lacks ? counts[l] >= high : counts[l] <= low) continue;
        counts[l] += lacks ? 1 : -1;
        sum += lacks ? 1 : -1;
        moved = true;
      }
    }
    return counts;
  }
};

}  // namespace headwise::inline v0::compress_kv
