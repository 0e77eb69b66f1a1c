// SPDX-License-Identifier: MIT
/// @file pyramid_kv.hpp
/// PyramidKV: lower layers keep more tokens than upper ones.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "headwise/core/check.hpp"
#include "headwise/core/checked.hpp"
#include "headwise/core/shape.hpp"
#include "headwise/heads/numbers.hpp"

/// Cai et al., PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling,
/// arXiv:2406.02069. An allocator over layers; inside a layer SnapKV selects. Three codes disagree:
/// here are kvpress' rule, whose counts add up, and the integers of KVCache-Factory. Both are made
/// anew for each prompt's length (two of the codes go on with the first prompt's).
namespace headwise::inline v0::pyramid_kv {

/// Tokens of each KV head, by layer.
struct Policy {
  std::int64_t beta = 20;  ///< the last layer's part of the mean is 1/beta; > 1

  /// From layer 0 down a straight line whose mean is `mean`, the window included, as kvpress has
  /// it. The same count in every layer where the line would leave [window, length], which it does
  /// for a mean below beta x window unless the length cuts it off; one layer keeps the mean.
  /// @param length  tokens of the sequence
  /// @param window  last tokens that stay (SnapKV's)
  /// @throws ConfigError for what is out of range.
  std::vector<std::int64_t> counts(int num_layers, std::int64_t length, std::int64_t mean,
                                   std::int64_t window) const {
    check(num_layers, length, mean, window);
    const auto b = static_cast<double>(std::min(mean, length));
    const auto n = static_cast<double>(length);
    const auto w = static_cast<double>(window);
    double low = b / static_cast<double>(beta);
    double high = 2.0 * b - low;
    if (high >= n - w) {
      high = n - w;
      low = 2.0 * b - high;
    }
    const bool is_line = num_layers > 1 && n >= high && high >= low && low >= w;
    std::vector<std::int64_t> counts;
    for (int l = 0; l < num_layers; ++l) {
      const double line = high - l * (high - low) / (num_layers - 1);
      counts.push_back(static_cast<std::int64_t>(round_half_even(is_line ? line : b)));
    }
    return counts;
  }

  /// The integers of KVCache-Factory: whole steps from layer to layer, which spend a few tokens
  /// more than the mean; a length below 2 (mean - window) is not shaped.
  /// @throws ConfigError for what is out of range, or a mean below the window.
  std::vector<std::int64_t> integer_counts(int num_layers, std::int64_t length, std::int64_t mean,
                                           std::int64_t window) const {
    check(num_layers, length, mean, window);
    const std::int64_t b = mean - window;
    if (b < 0) fail<ConfigError>("mean must be at least the window ", window, ", got ", mean);
    std::int64_t low = b / beta;
    std::int64_t high = 2 * b - low;
    if (high >= length - window) {
      high = length - window;
      low = 2 * b - high;
    }
    const bool is_flat = num_layers == 1 || length < 2 * b;
    const std::int64_t step = is_flat ? 0 : (high - low) / (num_layers - 1);
    std::vector<std::int64_t> counts;
    for (int l = 0; l < num_layers; ++l) {
      counts.push_back(
          std::clamp(is_flat ? mean : high - l * step + window, std::int64_t{0}, length));
    }
    return counts;
  }

 private:
  void check(int num_layers, std::int64_t length, std::int64_t mean, std::int64_t window) const {
    detail::checked_range(num_layers, 1, kMaxLayers, "num_layers");
    detail::checked_range(length, 0, kMaxTokens, "length");
    detail::checked_range(mean, 0, kMaxTokens, "mean tokens");
    detail::checked_range(window, 0, kMaxTokens, "window");
    detail::checked_range(beta, 2, kMaxTokens, "beta");
  }
};

}  // namespace headwise::inline v0::pyramid_kv
