// SPDX-License-Identifier: MIT
/// @file task_kv.hpp
/// Task-KV: heads whose meaning lies far from the layer's mean keep everything, input by input.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <span>
#include <vector>

#include "headwise/attention/observed_queries.hpp"
#include "headwise/core/bits.hpp"
#include "headwise/core/check.hpp"
#include "headwise/core/checked.hpp"
#include "headwise/core/row_view.hpp"
#include "headwise/heads/kept_positions.hpp"
#include "headwise/heads/numbers.hpp"
#include "headwise/heads/token_counts.hpp"
#include "headwise/heads/token_scores.hpp"
#include "headwise/simd/simd.hpp"

/// Task-KV: Task-aware KV Cache Optimization via Semantic Differentiation of Attention Heads,
/// arXiv:2501.15113. At the end of a prompt each head has a semantic vector: the values of the
/// tokens that the last queries look at most, weighted by that look. Heads far from their layer's
/// centre (heterogeneous ones) keep everything, the others sinks, newest tokens and the middle ones
/// of most attention. Lower layers have more heterogeneous heads.
///
///     std::vector<std::vector<double>> vectors;                              // of one layer
///     for (each KV head)
///       vectors.push_back(task_kv::add_head(policy, queries, keys, values, positions, scores));
///     const task_kv::Split split = policy.split(place, scores.length(), budget);
///     const auto full = task_kv::farthest(vectors, split.far, split.near);
///     select_tokens(scores, policy.protection(), task_kv::counts(policy, scores, full, split),
///                   kept);
///
/// All heads are `KeepSelected`: roles follow the input, a plan would not. The paper has a vector a
/// query head; here a KV head's is the mean of its group's, and the heads at the top are scaled
/// down with the group. How f(r) is rounded is not stated: down. While decoding: add_later().
namespace headwise::inline v0::task_kv {

/// Which layer of what model.
struct Place {
  int layer = 0;                  ///< from 0, the lowest
  int num_layers = 1;             ///< of the model
  std::int64_t num_kv_heads = 1;  ///< of the layer
  int group_size = 1;             ///< query heads of a KV head
};

/// How a layer's budget is spent.
struct Split {
  std::int64_t far = 0;     ///< heterogeneous heads by distance, which keep everything
  std::int64_t near = 0;    ///< and those nearest to the centre
  std::int64_t middle = 0;  ///< tokens of each other head, beside sinks and newest ones
  friend constexpr bool operator==(const Split&, const Split&) = default;
};

/// The published knobs (Llama-2-7B-Chat; Mistral-7B-v0.2: share 0.3, top 1).
struct Policy {
  std::int64_t window = 32;      ///< last queries, which score
  std::int64_t strongest = 256;  ///< tokens that a semantic vector is made of
  int kernel = 7;                ///< of the average over neighbours, odd; zeros beyond the ends
  std::int64_t sink = 16;        ///< first tokens, which stay
  std::int64_t recent = 256;     ///< newest tokens, which stay
  double bottom_share = 0.25;    ///< of the heads of the lowest layer that are heterogeneous
  std::int64_t top = 4;          ///< query heads of the highest layer that are
  std::int64_t near_extra = 0;   ///< heads nearest to the centre that keep everything, too; the
                                 ///< paper's number is not stated

  /// What stays whatever its score.
  constexpr Protection protection() const { return {sink, recent}; }
  /// f(r): heterogeneous KV heads of a layer, from bottom_share of them down to `top` in a straight
  /// line, floored. With a group, `top` becomes max(1, round(top / group_size)), halves to even.
  /// @throws ConfigError for a policy or a place out of range.
  std::int64_t num_heterogeneous(const Place& place) const {
    check(place);
    const auto heads = static_cast<double>(place.num_kv_heads);
    const double bottom = heads * bottom_share;
    double at_top = static_cast<double>(top);
    if (place.group_size > 1) {
      at_top = std::max(1.0, round_half_even(at_top / static_cast<double>(place.group_size)));
    }
    const double slope =
        place.num_layers > 1 ? (bottom - at_top) / static_cast<double>(place.num_layers - 1) : 0.0;
    // 1e-9: the highest layer's is `top`, and 3.99.. in double.
    const double heterogeneous =
        std::floor(bottom - slope * static_cast<double>(place.layer) + 1e-9);
    return static_cast<std::int64_t>(std::clamp(heterogeneous, 0.0, heads));
  }
  /// The layer's budget as roles and counts. Heads keep everything as long as the others can have
  /// their sinks and newest tokens: else fewer do, the nearest ones first. Where not even these fit
  /// they are kept all the same.
  /// @param tokens  of the sequence
  /// @param budget  tokens of all KV heads of the layer together
  /// @throws ConfigError as num_heterogeneous(), or for negative numbers.
  Split split(const Place& place, std::int64_t tokens, std::int64_t budget) const {
    headwise::detail::checked_range(tokens, 0, std::int64_t{0x7FFFFFFF}, "tokens");
    headwise::detail::checked_range(budget, 0, kMaxTokens, "budget");
    const std::int64_t wanted = num_heterogeneous(place);
    const std::int64_t heads = place.num_kv_heads;
    const std::int64_t others = std::min(tokens, sink + recent);  // of a head that is not full
    std::int64_t full = std::min(heads, wanted + near_extra);
    while (full > 0 && full * tokens + (heads - full) * others > budget) --full;
    Split split{std::min(wanted, full), 0, 0};
    split.near = full - split.far;
    if (full < heads) {
      split.middle = std::clamp<std::int64_t>((budget - full * tokens) / (heads - full) - others, 0,
                                              tokens - others);
    }
    return split;
  }
  /// @throws ConfigError for a policy or a place out of range.
  void check(const Place& place) const {
    using headwise::detail::checked_range;
    checked_range(place.num_layers, 1, 1 << 20, "layers");
    checked_range(place.layer, 0, place.num_layers - 1, "layer");
    checked_range(place.num_kv_heads, 1, std::int64_t{1} << 20, "KV heads");
    checked_range(place.group_size, 1, 1 << 20, "group size");
    checked_range(sink, 0, kMaxTokens, "sink");
    checked_range(recent, 0, kMaxTokens, "recent");
    checked_range(top, 0, kMaxTokens, "heterogeneous heads at the top");
    checked_range(near_extra, 0, kMaxTokens, "heads near the centre");
    if (!is_finite(bottom_share) || bottom_share < 0.0 || bottom_share > 1.0) {
      fail<ConfigError>("a share of heads must be in [0, 1], got ", bottom_share);
    }
  }
};

/// Appends one KV head to `scores`, mean over its group of what the last queries give each token,
/// averaged over neighbours.
/// @param queries  of the last `window` tokens, after RoPE; fewer where the sequence is shorter
/// @param keys,values  stored rows
/// @param stored  their positions, ascending
/// @return [values.dim] the head's semantic vector: the sum of weight times value over the
///   `strongest` tokens, mean over the group. Values that are not finite are left out.
/// @throws ConfigError for sizes that differ, no query, an even kernel or none, or `strongest`
///   below 1; nothing is appended.
/// Cost: received_attention() of the queries, and a sort a query head.
template <class Isa = simd::BestIsa>
std::vector<double> add_head(const Policy& policy, const ObservedQueries& queries,
                             const RowView& keys, const RowView& values,
                             std::span<const std::int32_t> stored, TokenScores& scores) {
  if (policy.kernel < 1 || policy.kernel % 2 == 0) {
    fail<ConfigError>("a pooling kernel must be odd and at least 1, got ", policy.kernel);
  }
  headwise::detail::checked_range(policy.strongest, 1, kMaxTokens, "tokens of a vector");
  if (queries.count() < 1) fail<ConfigError>("a semantic vector needs at least one query");
  if (values.count != std::ssize(stored)) {
    fail<ConfigError>(values.count, " values at ", stored.size(), " positions");
  }
  const auto size = std::ssize(stored);
  std::vector<double> vector(static_cast<std::size_t>(values.dim), 0.0);
  std::vector<double> mean(stored.size(), 0.0);
  std::vector<float> received(stored.size());
  std::vector<double> pooled(stored.size());
  std::vector<std::size_t> order(stored.size());
  const double rows = static_cast<double>(queries.count()) * policy.kernel;
  for (int g = 0; g < queries.group_size; ++g) {
    std::fill(received.begin(), received.end(), 0.0F);
    received_attention<Isa>(queries, g, keys, stored, Received::kSum, received);
    for (std::ptrdiff_t j = 0; j < size; ++j) {
      const std::ptrdiff_t first = std::max<std::ptrdiff_t>(0, j - policy.kernel / 2);
      const std::ptrdiff_t last = std::min<std::ptrdiff_t>(size, j + policy.kernel / 2 + 1);
      const double sum = std::accumulate(received.begin() + first, received.begin() + last, 0.0);
      pooled[static_cast<std::size_t>(j)] = sum / rows;
      mean[static_cast<std::size_t>(j)] += sum / rows / queries.group_size;
    }
    std::iota(order.begin(), order.end(), std::size_t{0});
    const std::ptrdiff_t strongest = std::min<std::ptrdiff_t>(size, policy.strongest);
    std::partial_sort(order.begin(), order.begin() + strongest, order.end(),
                      [&](std::size_t a, std::size_t b) {
                        return pooled[a] != pooled[b] ? pooled[a] > pooled[b] : a < b;
                      });
    for (const std::size_t j : std::span(order).first(static_cast<std::size_t>(strongest))) {
      const float* value = values.row(static_cast<std::int64_t>(j));
      for (std::size_t d = 0; d < vector.size(); ++d) {
        const double part = pooled[j] * static_cast<double>(value[d]) / queries.group_size;
        if (is_finite(part)) vector[d] += part;
      }
    }
  }
  const auto out = scores.add_head(stored);
  for (std::size_t j = 0; j < out.size(); ++j) out[j] = static_cast<float>(mean[j]);
  return vector;
}

/// Which heads keep everything: the `far` heads farthest from the centre of all, and the `near`
/// nearest ones of the others. Equal distances: the lower head.
/// @param vectors  [heads] of one layer, all of one width
/// @return [heads] 1 or 0
/// @throws ConfigError for widths that differ, or counts that are negative or more than the heads.
inline std::vector<std::uint8_t> farthest(std::span<const std::vector<double>> vectors,
                                          std::int64_t far, std::int64_t near = 0) {
  const std::int64_t heads = std::ssize(vectors);
  headwise::detail::checked_range(far, 0, heads, "heads far from the centre");
  headwise::detail::checked_range(near, 0, heads - far, "heads near the centre");
  std::vector<std::uint8_t> full(vectors.size(), 0);
  if (vectors.empty()) return full;
  std::vector<double> centre(vectors[0].size(), 0.0);
  for (const auto& vector : vectors) {
    if (vector.size() != centre.size()) {
      fail<ConfigError>("semantic vectors of widths ", centre.size(), " and ", vector.size());
    }
    for (std::size_t d = 0; d < centre.size(); ++d) {
      centre[d] += vector[d] / static_cast<double>(heads);
    }
  }
  std::vector<double> distances;  // squared: the order is the same
  for (const auto& vector : vectors) {
    double sum = 0.0;
    for (std::size_t d = 0; d < centre.size(); ++d) {
      sum += (vector[d] - centre[d]) * (vector[d] - centre[d]);
    }
    distances.push_back(sum);
  }
  std::vector<std::size_t> order(vectors.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  const auto take = [&](std::int64_t count, auto&& comes_first) {
    std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) {
      return distances[a] != distances[b] ? comes_first(distances[a], distances[b]) : a < b;
    });
    for (const std::size_t h : order) {
      if (count == 0) break;
      if (full[h] != 0) continue;
      full[h] = 1;
      --count;
    }
  };
  take(far, [](double a, double b) { return a > b; });
  take(near, [](double a, double b) { return a < b; });
  return full;
}

/// Tokens of each head, for select_tokens(): all, or sinks, newest and middle ones.
/// @param full  [heads] of farthest()
/// @throws ConfigError for another number of heads.
inline KeepCounts counts(const Policy& policy, const TokenScores& layer,
                         std::span<const std::uint8_t> full, const Split& split) {
  if (std::ssize(full) != layer.num_heads()) {
    fail<ConfigError>(full.size(), " roles for ", layer.num_heads(), " KV heads");
  }
  KeepCounts counts;
  for (std::int64_t h = 0; h < layer.num_heads(); ++h) {
    const std::int64_t forced = layer.num_protected(h, policy.protection());
    counts.push_back(full[static_cast<std::size_t>(h)] != 0
                         ? layer.num_tokens(h)
                         : std::min(layer.num_tokens(h), forced + split.middle));
  }
  return counts;
}

/// Appends one head that is not heterogeneous, while decoding: sinks, newest tokens, and the middle
/// ones of the selection at the prompt's end, which are fixed.
/// @param at_prompt_end  what that selection kept of the head, ascending
/// @param prompt  tokens of the sequence then
/// @param stored  positions that the head stores now, ascending
/// @param length  tokens of the sequence now
inline void add_later(const Policy& policy, std::span<const std::int32_t> at_prompt_end,
                      std::int64_t prompt, std::span<const std::int32_t> stored,
                      std::int64_t length, KeptPositions& kept) {
  std::vector<std::int32_t> positions;
  for (const std::int32_t position : stored) {
    const bool middle = !policy.protection().covers(position, prompt) &&
                        std::ranges::binary_search(at_prompt_end, position);
    if (middle || policy.protection().covers(position, length)) positions.push_back(position);
  }
  kept.add_head(positions);
}

}  // namespace headwise::inline v0::task_kv
