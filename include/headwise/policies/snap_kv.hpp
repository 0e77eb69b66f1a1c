// SPDX-License-Identifier: MIT
/// @file snap_kv.hpp
/// SnapKV: what the last queries of the prompt look at is what the answer will need.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "headwise/attention/observed_queries.hpp"
#include "headwise/core/check.hpp"
#include "headwise/core/row_view.hpp"
#include "headwise/heads/token_scores.hpp"
#include "headwise/simd/simd.hpp"

/// Li et al., SnapKV: LLM Knows What You are Looking for Before Generation, arXiv:2404.14469.
/// Once, at the end of the prompt: attention of the last `window` queries over all keys, summed,
/// pooled along the sequence so that neighbours of a hit stay too; the window itself stays whole.
///
///     snap_kv::Policy policy;
///     snap_kv::add_head(policy, queries, keys, positions, scores);     // each KV head of a layer
///     auto kept = select_tokens(scores, policy.protection(), uniform_counts(scores, 2048));
///
/// Scores are comparable between heads of a layer (AdaKV): each query's weights add up to 1.
namespace headwise::inline v0::snap_kv {

/// How neighbours share a score.
enum class Pool : std::uint8_t {
  kAverage,  ///< zeros beyond the ends, always divided by the kernel
  kMax,      ///< makes plateaus: the unpooled score decides in them
};

/// How a KV head's score follows from its query heads'.
enum class Reduce : std::uint8_t {
  kMean,  ///< over the group
  kMax,   ///< over the group
};

/// The published knobs. Released code: window 32, kernel 5, average, 2048 tokens; its papers'
/// comparisons: window 8, kernel 7, maximum.
struct Policy {
  std::int64_t window = 32;       ///< last tokens: their queries score, and they stay
  int kernel = 5;                 ///< of the pooling, odd; 1: none
  Pool pool = Pool::kAverage;     ///< see Pool
  Reduce reduce = Reduce::kMean;  ///< before the pooling, as AdaKV's code; the original selects for
                                  ///< each query head and so stores the group's rows several times

  /// What stays whatever its score.
  constexpr Protection protection() const { return {0, window}; }
};

/// Pools `raw` along the sequence, stride 1.
/// @throws ConfigError for an even kernel (the result would be longer than its input), or one
///   below 1.
inline std::vector<float> pooled(std::span<const float> raw, int kernel, Pool pool) {
  if (kernel < 1 || kernel % 2 == 0) {
    fail<ConfigError>("a pooling kernel must be odd and at least 1, got ", kernel);
  }
  std::vector<float> out(raw.size());
  const auto size = static_cast<std::ptrdiff_t>(raw.size());
  for (std::ptrdiff_t j = 0; j < size; ++j) {
    const std::ptrdiff_t first = std::max<std::ptrdiff_t>(0, j - kernel / 2);
    const std::ptrdiff_t last = std::min<std::ptrdiff_t>(size, j + kernel / 2 + 1);
    float sum = 0.0F;
    float max = raw[static_cast<std::size_t>(first)];
    for (std::ptrdiff_t i = first; i < last; ++i) {
      sum += raw[static_cast<std::size_t>(i)];
      max = std::max(max, raw[static_cast<std::size_t>(i)]);
    }
    out[static_cast<std::size_t>(j)] =
        pool == Pool::kAverage ? sum / static_cast<float>(kernel) : max;
  }
  return out;
}

/// Mean weight that the queries give each stored token before the window, reduced over the group;
/// 0 for the window's own tokens.
/// @param queries  the last `window` of the sequence (QueryWindow)
/// @param stored  positions of the keys, ascending
/// @param out  [keys.count]
/// @throws ConfigError for sizes that differ.
template <class Isa = simd::BestIsa>
void raw_scores(const Policy& policy, const ObservedQueries& queries, const RowView& keys,
                std::span<const std::int32_t> stored, std::int64_t length, std::span<float> out) {
  std::fill(out.begin(), out.end(), 0.0F);
  const std::int64_t rows = std::max<std::int64_t>(1, queries.count());
  std::vector<float> received(out.size());
  for (int g = 0; g < queries.group_size; ++g) {
    std::fill(received.begin(), received.end(), 0.0F);
    received_attention<Isa>(queries, g, keys, stored, Received::kSum, received);
    for (std::size_t j = 0; j < out.size(); ++j) {
      const float mean = received[j] / static_cast<float>(rows);
      out[j] = policy.reduce == Reduce::kMean
                   ? out[j] + mean / static_cast<float>(queries.group_size)
                   : std::max(out[j], mean);
    }
  }
  for (std::size_t j = 0; j < out.size(); ++j) {
    if (policy.protection().covers(stored[j], length)) out[j] = 0.0F;
  }
}

/// Appends one KV head to `scores`.
/// @param queries  of the last `window` tokens; fewer where the sequence is shorter
/// @param keys  stored rows
/// @param stored  their positions, ascending
/// @throws ConfigError for sizes that differ, or an even kernel.
template <class Isa = simd::BestIsa>
void add_head(const Policy& policy, const ObservedQueries& queries, const RowView& keys,
              std::span<const std::int32_t> stored, TokenScores& scores) {
  std::vector<float> raw(stored.size());
  raw_scores<Isa>(policy, queries, keys, stored, scores.length(), raw);
  // Pooled are the tokens before the window alone.
  std::size_t prefix = 0;
  while (prefix < stored.size() && !policy.protection().covers(stored[prefix], scores.length())) {
    ++prefix;
  }
  const std::vector<float> pool = pooled(std::span(raw).first(prefix), policy.kernel, policy.pool);
  std::ranges::copy(pool, scores.add_head(stored).begin());
  if (policy.pool == Pool::kMax) scores.set_tie_scores(raw);
}

}  // namespace headwise::inline v0::snap_kv
