// SPDX-License-Identifier: MIT
/// @file select_tokens.hpp
/// Token scores and counts to kept positions: the one cut that all run-time methods end in.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "headwise/core/bits.hpp"
#include "headwise/core/check.hpp"
#include "headwise/heads/kept_positions.hpp"
#include "headwise/heads/token_counts.hpp"
#include "headwise/heads/token_scores.hpp"

namespace headwise::inline v0 {

/// Appends, for each head of `scores`, the positions that it keeps: the protected ones, then those
/// with the highest scores, up to its count; ascending. A count of all stored tokens or more keeps
/// them all. Equal scores: the higher tie score, then the lower position.
/// @param counts  [heads], each at least the head's protected tokens
/// @throws ConfigError for another number of counts, or one below the protected tokens that the
///   head has stored; nothing is appended.
inline void select_tokens(const TokenScores& scores, const Protection& protection,
                          std::span<const std::int64_t> counts, KeptPositions& kept) {
  if (std::ssize(counts) != scores.num_heads()) {
    fail<ConfigError>(counts.size(), " counts for ", scores.num_heads(), " KV heads");
  }
  for (std::int64_t h = 0; h < scores.num_heads(); ++h) {
    const std::int64_t count = counts[static_cast<std::size_t>(h)];
    const std::int64_t forced = scores.num_protected(h, protection);
    if (count < forced) {
      fail<ConfigError>("KV head ", h, ": ", count, " tokens are to be kept, but ", forced,
                        " are protected");
    }
  }
  std::vector<std::int32_t> chosen;
  for (std::int64_t h = 0; h < scores.num_heads(); ++h) {
    const std::int64_t count = counts[static_cast<std::size_t>(h)];
    const auto positions = scores.positions(h);
    if (count >= scores.num_tokens(h)) {
      kept.add_head(positions);
      continue;
    }
    chosen = scores.order(h, protection);
    chosen.resize(static_cast<std::size_t>(count));
    std::sort(chosen.begin(), chosen.end());
    for (std::int32_t& token : chosen) token = positions[static_cast<std::size_t>(token)];
    kept.add_head(chosen);
  }
}
/// The same for these heads alone.
inline KeptPositions select_tokens(const TokenScores& scores, const Protection& protection,
                                   std::span<const std::int64_t> counts) {
  KeptPositions kept;
  select_tokens(scores, protection, counts, kept);
  return kept;
}

/// Appends, for each head, the protected tokens and those that score `threshold` or more: as many
/// as there are (DMS, arXiv:2506.05345, where a token is judged once, when it leaves the `recent`
/// ones: the same, again and again, for scorers that are final at birth). Size is not bounded.
/// @throws ConfigError for a threshold that is not finite.
inline void select_above(const TokenScores& scores, const Protection& protection, float threshold,
                         KeptPositions& kept) {
  if (!is_finite(threshold)) fail<ConfigError>("a threshold must be finite, got ", threshold);
  std::vector<std::int32_t> chosen;
  for (std::int64_t h = 0; h < scores.num_heads(); ++h) {
    chosen.clear();
    for (std::size_t j = 0; j < scores.positions(h).size(); ++j) {
      const std::int32_t position = scores.positions(h)[j];
      const float score = scores.scores(h)[j];
      if (protection.covers(position, scores.length()) ||
          (is_finite(score) && score >= threshold)) {
        chosen.push_back(position);
      }
    }
    kept.add_head(chosen);
  }
}

}  // namespace headwise::inline v0
