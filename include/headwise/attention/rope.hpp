// SPDX-License-Identifier: MIT
/// @file rope.hpp
/// Rope: a model's rotary embedding, for scorers that reason about queries before it.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>

#include "headwise/core/bits.hpp"
#include "headwise/core/check.hpp"

namespace headwise::inline v0 {

/// Which elements of a row RoPE turns together.
enum class RopePairs : std::uint8_t {
  kHalves,      ///< element i with i + dim / 2 (Llama in HuggingFace's layout)
  kNeighbours,  ///< element 2i with 2i + 1
};

/// A model's rotary embedding.
struct Rope {
  double theta = 10000.0;                ///< base; > 0
  RopePairs pairs = RopePairs::kHalves;  ///< see RopePairs
  /// [dim / 2] radians that each pair turns a position, borrowed: for models that scale theirs
  /// (Llama 3.1, YaRN). Empty: theta's.
  std::span<const double> frequencies = {};

  /// Elements of pair `i` in a row of `dim`.
  std::pair<std::size_t, std::size_t> pair(int i, int dim) const {
    const auto at = static_cast<std::size_t>(i);
    return pairs == RopePairs::kHalves ? std::pair{at, at + static_cast<std::size_t>(dim) / 2}
                                       : std::pair{2 * at, 2 * at + 1};
  }
  /// Radians that pair `i` turns a position.
  double frequency(int i, int dim) const {
    return frequencies.empty() ? std::pow(theta, -2.0 * i / dim)
                               : frequencies[static_cast<std::size_t>(i)];
  }
  /// Undoes the turn of a query at `position`, in place: for engines that have them after RoPE
  /// only.
  void turn_back(float* row, int dim, std::int64_t position) const {
    for (int i = 0; i < dim / 2; ++i) {
      const double angle = frequency(i, dim) * static_cast<double>(position);
      const auto [a, b] = pair(i, dim);
      const auto x = static_cast<double>(row[a]);
      const auto y = static_cast<double>(row[b]);
      row[a] = static_cast<float>(x * std::cos(angle) + y * std::sin(angle));
      row[b] = static_cast<float>(y * std::cos(angle) - x * std::sin(angle));
    }
  }
  /// @throws ConfigError for an odd width, a theta that is not finite and above 0, or frequencies
  ///   of another width or not finite.
  void check(int dim) const {
    if (dim % 2 != 0) fail<ConfigError>("RoPE turns an even width, got ", dim);
    if (!is_finite(theta) || theta <= 0.0) {
      fail<ConfigError>("theta must be finite and above 0, got ", theta);
    }
    if (!frequencies.empty() && frequencies.size() != static_cast<std::size_t>(dim) / 2) {
      fail<ConfigError>(frequencies.size(), " frequencies for a width of ", dim);
    }
    for (const double frequency : frequencies) {
      if (!is_finite(frequency)) fail<ConfigError>("a frequency must be finite, got ", frequency);
    }
  }
};

}  // namespace headwise::inline v0
