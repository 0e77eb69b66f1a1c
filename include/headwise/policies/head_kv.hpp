// SPDX-License-Identifier: MIT
/// @file head_kv.hpp
/// HeadKV and HeadKV-R2: heads share one pool of cache entries by their importance.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "headwise/core/bits.hpp"
#include "headwise/core/check.hpp"
#include "headwise/core/checked.hpp"
#include "headwise/heads/numbers.hpp"
#include "headwise/heads/scores.hpp"
#include "headwise/policies/policy.hpp"

/// Fu et al., Not All Heads Matter, arXiv:2410.19258. Scores of *query heads*: "copy" (HeadKV-R) is
/// retrieval_head's, "reason" (HeadKV-R2, eq. 2) weighs attention on the right answer. Published
/// files: load_head_runs() in heads/json.hpp.
///
/// Here the method ends in a table of capacities. Which tokens fill them is decided at run time, by
/// the attention of the last prompt tokens: snap_kv's scores and table_counts() over the reduced
/// capacities, to each of which the window is added.
///
///     head_kv::Policy policy{.capacity = 128, .beta = 1.01};
///     auto per_kv_head = head_kv::reduce_mean(policy.capacities(runs.mean), group_size);
namespace headwise::inline v0::head_kv {

/// Shares that add up to 1 over all layers and heads: L1-normalised scores.
/// @param mean_scores  [num_layers, num_qo_heads], >= 0, mean over runs.
/// @param temperature  exponent put on every share before they are normalised again; released code
///   only, default 1.
/// @throws ConfigError for a negative score (with layer and head), scores that are all 0, or a
///   temperature that is not above 0.
inline QueryHeadScores importance(const QueryHeadScores& mean_scores, double temperature = 1.0) {
  if (!is_finite(temperature) || temperature <= 0.0) {
    fail<ConfigError>("temperature must be finite and > 0, got ", temperature);
  }
  double largest = 0.0;
  for (int layer = 0; layer < mean_scores.num_layers(); ++layer) {
    for (int head = 0; head < mean_scores.num_heads(layer); ++head) {
      const double score = mean_scores.value(layer, head);
      if (score < 0.0) {
        fail<ConfigError>("layer ", layer, ", head ", head, ": an importance must be >= 0, got ",
                          score);
      }
      largest = std::max(largest, score);
    }
  }
  if (largest == 0.0) fail<ConfigError>("all importances are 0: there is nothing to share by");
  std::vector<double> shares(mean_scores.values().begin(), mean_scores.values().end());
  double sum = 0.0;
  for (double& share : shares) {
    share = std::pow(share / largest, temperature);  // relative to the largest: cannot overflow
    sum += share;
  }
  for (double& share : shares) share /= sum;
  return QueryHeadScores(mean_scores.heads_per_layer(), std::move(shares));
}

/// Entries of all heads together: what one head may get, and what an int64 and a double hold.
inline constexpr std::int64_t kMaxEntries = std::int64_t{1} << 62;

/// Python's `a // b` of two floats, for a >= 0 and b > 0, as CPython's float_floor_div has it: the
/// floor of their exact quotient. std::floor(a / b) is that of the rounded one: 2040 / 1.02 rounds
/// up to 2000, but the double next to 1.02 is a little more than 1.02, and 2040 // 1.02 is 1999.
inline double floor_div(double a, double b) {
  const double rest = std::fmod(a, b);  // exact
  const double quotient = (a - rest) / b;
  const double below = std::floor(quotient);
  return quotient - below > 0.5 ? below + 1.0 : below;  // the division may round to either side
}

/// The published allocation with its parameters.
struct Policy {
  std::int64_t capacity = 128;          ///< mean entries per query head, the next ones included
  std::int64_t observation_window = 8;  ///< last prompt tokens, always kept ("alpha" in the paper)
  /// > 1; the pool that is shared by importance is the 1/beta part of all entries, so that near 1
  /// nearly everything follows the scores and a large one is nearly uniform (the released README
  /// says the reverse). Published grid: 1.005, 1.01, 1.1, 1.2, 1.5, 2, 5, 10, the best reported.
  double beta = 1.01;
  double temperature = 1.0;  ///< see importance()

  /// Entries that each query head may select, observation window not counted: eq. 4, with the
  /// floor division and the rounding of the released code. Not capped by a prompt's length.
  /// @param mean_scores  [num_layers, num_qo_heads].
  /// @return [num_layers, num_qo_heads], layer by layer; sums to about
  ///   (capacity - observation_window) * heads.
  /// @throws ConfigError for a capacity below the observation window or beyond kMaxTokens, more
  ///   than kMaxEntries for all heads, a beta not above 1, and what
  ///   importance() refuses.
  std::vector<std::int64_t> capacities(const QueryHeadScores& mean_scores) const {
    if (observation_window < 0) {
      fail<ConfigError>("observation_window must be >= 0, got ", observation_window);
    }
    if (capacity < observation_window || capacity > kMaxTokens) {
      fail<ConfigError>("capacity must be in [", observation_window, " (the observation window), ",
                        kMaxTokens, "], got ", capacity);
    }
    const auto heads = static_cast<std::int64_t>(mean_scores.num_heads());
    detail::checked_range(detail::checked_mul(capacity, heads, "capacity * heads"), 0, kMaxEntries,
                          "capacity * heads");
    if (!is_finite(beta) || beta <= 1.0) fail<ConfigError>("beta must be > 1, got ", beta);
    const auto base = static_cast<double>(capacity - observation_window);
    const double dynamic = floor_div(base, beta);
    const double pool = dynamic * static_cast<double>(mean_scores.num_heads());
    std::vector<std::int64_t> entries;
    entries.reserve(mean_scores.num_heads());
    const QueryHeadScores shares = importance(mean_scores, temperature);
    for (const double share : shares.values()) {
      const double exact = share * pool + (base - dynamic);
      entries.push_back(static_cast<std::int64_t>(round_half_even(exact)));
    }
    return entries;
  }
};
static_assert(CapacityPolicy<Policy>);

/// A KV head may select the mean of what its query heads may, halves to even: entries per stored
/// head stay what they were (KVCache-Factory's kv_head mode; the released code stores K and V once
/// per *query* head instead, `group_size` times as much).
/// @param capacities  [.., num_qo_heads], groups contiguous, each in [0, kMaxEntries].
/// @throws ConfigError when `group_size` does not divide their number, or for one out of range.
inline std::vector<std::int64_t> reduce_mean(std::span<const std::int64_t> capacities,
                                             int group_size) {
  const auto group = static_cast<std::size_t>(group_size);
  if (group_size < 1 || capacities.size() % group != 0) {
    fail<ConfigError>("group_size ", group_size, " does not divide ", capacities.size(),
                      " capacities");
  }
  std::vector<std::int64_t> reduced;
  for (std::size_t first = 0; first < capacities.size(); first += group) {
    double sum = 0.0;
    for (const std::int64_t entries : capacities.subspan(first, group)) {
      detail::checked_range(entries, 0, kMaxEntries, "a capacity");
      sum += static_cast<double>(entries);
    }
    reduced.push_back(static_cast<std::int64_t>(round_half_even(sum / group_size)));
  }
  return reduced;
}

}  // namespace headwise::inline v0::head_kv
