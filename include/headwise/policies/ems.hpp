// SPDX-License-Identifier: MIT
/// @file ems.hpp
/// EMS: tokens by global and local attention; of the others, those alike are merged into the kept.
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
#include "headwise/heads/token_scores.hpp"
#include "headwise/simd/simd.hpp"

/// Li et al., EMS: Adaptive Evict-then-Merge Strategy for Head-wise KV Cache Compression Based on
/// Global-Local Importance, arXiv:2412.08521v2. Once, at the end of a prompt, head by head. A token
/// is worth the larger of the attention from all queries and from the last ones, brought to one
/// mean. The best are class centres and stay; the next ones each go to the centre they are most
/// redundant with, or to the zero class, which is dropped; the others are dropped at once.
///
///     ems::add_head(all_received, window, keys, positions, scores);  // each KV head
///     select_tokens(scores, policy.protection(), uniform_counts(scores, 256), kept);
///     ems::Merged rows = ems::merge(policy, scores, head, keys, values, kept.of_head(head));
///
/// KvCache::compact() moves rows bit for bit and takes no merged ones: with it this is EMS without
/// its merge. Merged rows are for an engine that writes its own, in the order of the kept
/// positions.
///
/// No released code was found. Ours, as far as the paper is silent or was not read: the constants
/// of Policy; global attention is scaled to the local mean; cosines below 0 count as 0 in a
/// redundancy (a product of two negative ones would be a likeness); a group's attention is its
/// mean; merged keys stay at their centre's position.
namespace headwise::inline v0::ems {

/// The knobs; ours.
struct Policy {
  std::int64_t window = 32;  ///< last tokens: their queries are the local ones, and they stay
  double merged = 1.0;       ///< candidates for a merge, in parts of the kept tokens; rounded up
  double threshold = 0.6;    ///< redundancy above which a candidate is merged; in [0, 1)

  /// What stays whatever its score.
  constexpr Protection protection() const { return {0, window}; }
  /// @throws ConfigError for `merged` that is negative or not finite, a window below 0 or a
  ///   threshold outside [0, 1).
  void check() const {
    headwise::detail::checked_range(window, 0, kMaxTokens, "window");
    if (!is_finite(merged) || merged < 0.0) {
      fail<ConfigError>("candidates for a merge must be finite and >= 0 parts, got ", merged);
    }
    if (!is_finite(threshold) || threshold < 0.0 || threshold >= 1.0) {
      fail<ConfigError>("a redundancy threshold must be in [0, 1), got ", threshold);
    }
  }
};

/// Global-Local scores: max(global mean(local) / mean(global), local); local alone where the mean
/// of the global ones is 0.
/// @param global,local,out  [tokens]; `out` may be one of them
/// @throws ConfigError for sizes that differ.
inline void global_local(std::span<const float> global, std::span<const float> local,
                         std::span<float> out) {
  if (global.size() != local.size() || out.size() != local.size()) {
    fail<ConfigError>(global.size(), " global and ", local.size(), " local scores for ", out.size(),
                      " tokens");
  }
  const auto sum = [](std::span<const float> of) {
    return std::accumulate(of.begin(), of.end(), 0.0);
  };
  const double all = sum(global);
  const double scale = all > 0.0 ? sum(local) / all : 0.0;  // the counts are the same
  for (std::size_t j = 0; j < out.size(); ++j) {
    out[j] = static_cast<float>(
        std::max(static_cast<double>(global[j]) * scale, static_cast<double>(local[j])));
  }
}

/// Appends one KV head to `scores`.
/// @param global  [keys.count] attention that each token received from all queries so far, mean
/// over
///   the group (h2o::Sums::sums())
/// @param queries  of the last `window` tokens, after RoPE
/// @param keys  stored rows
/// @param stored  their positions, ascending
/// @throws ConfigError for sizes that differ; nothing is appended.
template <class Isa = simd::BestIsa>
void add_head(std::span<const float> global, const ObservedQueries& queries, const RowView& keys,
              std::span<const std::int32_t> stored, TokenScores& scores) {
  std::vector<float> local(stored.size(), 0.0F);
  for (int g = 0; g < queries.group_size; ++g) {
    received_attention<Isa>(queries, g, keys, stored, Received::kSum, local);
  }
  for (float& x : local) x /= static_cast<float>(queries.group_size);
  global_local(global, local, local);
  std::ranges::copy(local, scores.add_head(stored).begin());
}

/// What a head's kept tokens become.
struct Merged {
  std::vector<float> k;         ///< [kept, k_dim], in the order of the kept positions
  std::vector<float> v;         ///< [kept, v_dim]
  std::int64_t num_merged = 0;  ///< tokens that went into a centre
};

namespace detail {

inline double dot(const float* a, const float* b, int dim) {
  double sum = 0.0;
  for (int d = 0; d < dim; ++d) sum += static_cast<double>(a[d]) * static_cast<double>(b[d]);
  return sum;
}

/// Cosine, 0 where it is negative or a norm is 0 or not finite.
inline double likeness(const float* a, double norm_a, const float* b, double norm_b, int dim) {
  const double cosine = dot(a, b, dim) / (norm_a * norm_b);
  return norm_a > 0.0 && norm_b > 0.0 && is_finite(cosine) ? std::max(0.0, cosine) : 0.0;
}

inline std::vector<double> norms(const RowView& rows) {
  std::vector<double> norms;
  for (std::int64_t i = 0; i < rows.count; ++i) {
    norms.push_back(std::sqrt(dot(rows.row(i), rows.row(i), rows.dim)));
  }
  return norms;
}

}  // namespace detail

/// Merges dropped tokens of one head into those it keeps. Candidates are the best dropped ones,
/// ceil(merged x kept). Each goes to the centre with the largest redundancy, cos(k) cos(v), equal
/// ones: the lower position, if that is above the threshold; else it is dropped (the zero class). A
/// class's value is the mean of its tokens', weighted by score; its key the same mean of
/// directions, as long as the same mean of norms. A centre without tokens is copied bit for bit.
/// @param scores  of add_head(), never negative
/// @param head  of `scores`, whose stored rows `keys` and `values` are
/// @param kept  positions that stay (select_tokens), ascending: the class centres
/// @throws ConfigError for a policy out of range, sizes that differ, kept positions that are not
///   stored or not ascending, or a score below 0.
/// Cost: 2 (k_dim + v_dim) flop a candidate and centre; a sort.
inline Merged merge(const Policy& policy, const TokenScores& scores, std::int64_t head,
                    const RowView& keys, const RowView& values,
                    std::span<const std::int32_t> kept) {
  policy.check();
  headwise::detail::checked_range(head, 0, scores.num_heads() - 1, "KV head");
  const auto stored = scores.positions(head);
  if (keys.count != std::ssize(stored) || values.count != std::ssize(stored)) {
    fail<ConfigError>(keys.count, " keys and ", values.count, " values of ", stored.size(),
                      " tokens");
  }
  // Each class's tokens as indices, the centre first.
  std::vector<std::vector<std::size_t>> classes;
  std::vector<char> is_centre(stored.size(), 0);
  std::int32_t last = -1;
  for (const std::int32_t position : kept) {
    const auto at = std::ranges::lower_bound(stored, position);
    if (position <= last || at == stored.end() || *at != position) {
      fail<ConfigError>("KV head ", head, ": kept position ", position,
                        " is not stored, or not ascending");
    }
    last = position;
    classes.push_back({static_cast<std::size_t>(at - stored.begin())});
    is_centre[classes.back()[0]] = 1;
  }
  std::vector<double> weights;
  for (const float score : scores.scores(head)) {
    if (is_finite(score) && score < 0.0F) {
      fail<ConfigError>("KV head ", head, ": a score must be >= 0, got ", score);
    }
    weights.push_back(is_finite(score) ? static_cast<double>(score) : 0.0);
  }
  Merged out;
  const std::vector<double> k_norms = detail::norms(keys);
  const std::vector<double> v_norms = detail::norms(values);
  auto left = std::ceil(policy.merged * static_cast<double>(kept.size()));
  for (const std::int32_t index : scores.order(head, policy.protection())) {
    const auto token = static_cast<std::size_t>(index);
    if (is_centre[token] != 0) continue;
    if (left < 1.0) break;
    left -= 1.0;
    double most = policy.threshold;
    std::vector<std::size_t>* to = nullptr;
    for (auto& of_class : classes) {
      const std::size_t centre = of_class[0];
      const auto row = [](const RowView& rows, std::size_t i) {
        return rows.row(static_cast<std::int64_t>(i));
      };
      const double redundancy = detail::likeness(row(keys, token), k_norms[token],
                                                 row(keys, centre), k_norms[centre], keys.dim) *
                                detail::likeness(row(values, token), v_norms[token],
                                                 row(values, centre), v_norms[centre], values.dim);
      if (redundancy <= most) continue;
      most = redundancy;
      to = &of_class;
    }
    if (to == nullptr || !(weights[token] > 0.0)) continue;
    to->push_back(token);
    ++out.num_merged;
  }
  std::vector<double> direction(static_cast<std::size_t>(keys.dim));
  std::vector<double> value(static_cast<std::size_t>(values.dim));
  for (const auto& of_class : classes) {
    const auto centre = static_cast<std::int64_t>(of_class[0]);
    if (of_class.size() == 1) {
      out.k.insert(out.k.end(), keys.row(centre), keys.row(centre) + keys.dim);
      out.v.insert(out.v.end(), values.row(centre), values.row(centre) + values.dim);
      continue;
    }
    std::ranges::fill(direction, 0.0);
    std::ranges::fill(value, 0.0);
    double total = 0.0;
    for (const std::size_t token : of_class) total += weights[token];
    double norm = 0.0;
    for (const std::size_t token : of_class) {
      const double share = weights[token] / total;
      const float* k = keys.row(static_cast<std::int64_t>(token));
      const float* v = values.row(static_cast<std::int64_t>(token));
      norm += share * k_norms[token];
      for (std::size_t d = 0; d < direction.size(); ++d) {
        direction[d] += share * static_cast<double>(k[d]) / k_norms[token];
      }
      for (std::size_t d = 0; d < value.size(); ++d) value[d] += share * static_cast<double>(v[d]);
    }
    // Never 0: every token's direction is less than a right angle from the centre's.
    const double length =
        std::sqrt(std::inner_product(direction.begin(), direction.end(), direction.begin(), 0.0));
    for (const double x : direction) out.k.push_back(static_cast<float>(x / length * norm));
    for (const double x : value) out.v.push_back(static_cast<float>(x));
  }
  return out;
}

}  // namespace headwise::inline v0::ems
