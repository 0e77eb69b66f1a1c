// SPDX-License-Identifier: MIT
/// @file token_counts.hpp
/// How many tokens each KV head keeps: the allocators. Integers out, whoever made the scores.
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
#include "headwise/heads/token_scores.hpp"

namespace headwise::inline v0 {

/// Tokens that remain of `n` when a share of them is removed: floor(n (1 - removed)), at least 1,
/// all where nothing is removed. Published code rounds in five ways, mostly down without a minimum
/// (0 of 10 at 0.9): pass its count to replay it.
/// @throws ConfigError for a share outside [0, 1), or a negative n.
inline std::int64_t tokens_left(std::int64_t n, double removed) {
  detail::checked_range(n, 0, kMaxTokens, "tokens");
  if (!is_finite(removed) || removed < 0.0 || removed >= 1.0) {
    fail<ConfigError>("a removed share must be in [0, 1), got ", removed);
  }
  if (n == 0) return 0;
  // 1e-9: 100 (1 - 0.9) is 9.99.. in double and means 10.
  const double left = std::floor(static_cast<double>(n) * (1.0 - removed) + 1e-9);
  return std::clamp<std::int64_t>(static_cast<std::int64_t>(left), 1, n);
}

/// Tokens of one head that so many bytes hold, pages not counted: a count from memory that is to be
/// used. (Share of tokens, share of heads and bytes are three things: a head's page is held as a
/// whole, and heads that are not selected from keep what they keep.)
/// @param row_bytes  of K and V of a token in this head
/// @throws ConfigError for row_bytes of 0.
inline std::int64_t tokens_of_bytes(std::size_t bytes, std::size_t row_bytes) {
  if (row_bytes == 0) fail<ConfigError>("row_bytes must be at least 1, got 0");
  return static_cast<std::int64_t>(bytes / row_bytes);
}

/// How many tokens each KV head of a TokenScores keeps.
using KeepCounts = std::vector<std::int64_t>;

/// The same count for all heads, at most what each has stored.
/// @throws ConfigError for a negative count.
inline KeepCounts uniform_counts(const TokenScores& scores, std::int64_t count) {
  detail::checked_range(count, 0, kMaxTokens, "tokens to keep");
  KeepCounts counts;
  for (std::int64_t h = 0; h < scores.num_heads(); ++h) {
    counts.push_back(std::min(count, scores.num_tokens(h)));
  }
  return counts;
}

/// All heads share `total` tokens by score: those with the highest ones stay, whosever they are
/// (one layer: AdaKV; all layers: KVzip's cut). Each head's protected tokens and its best
/// `safe_per_head` (protected ones counted) stay first. Exactly `total` in the end, unless that is
/// less than what must stay (then that) or more than is stored (then all).
/// Ties: lower head, lower position.
/// @pre scores are comparable across these heads: the scorer says so.
/// @throws ConfigError for a negative total or safe_per_head.
inline KeepCounts shared_counts(const TokenScores& scores, const Protection& protection,
                                std::int64_t total, std::int64_t safe_per_head = 0) {
  detail::checked_range(total, 0, kMaxTokens, "tokens to keep");
  detail::checked_range(safe_per_head, 0, kMaxTokens, "safe_per_head");
  using Token = std::pair<std::int64_t, std::int32_t>;  // head, token
  KeepCounts counts;
  std::vector<Token> others;
  std::int64_t left = total;
  for (std::int64_t h = 0; h < scores.num_heads(); ++h) {
    const std::int64_t safe = std::min(
        scores.num_tokens(h), std::max(safe_per_head, scores.num_protected(h, protection)));
    const std::vector<std::int32_t> order = scores.order(h, protection);
    for (std::size_t i = static_cast<std::size_t>(safe); i < order.size(); ++i) {
      others.emplace_back(h, order[i]);
    }
    counts.push_back(safe);
    left -= safe;
  }
  left = std::clamp<std::int64_t>(left, 0, std::ssize(others));
  std::partial_sort(others.begin(), others.begin() + left, others.end(),
                    [&](const Token& a, const Token& b) {
                      return scores.comes_first(a.first, a.second, b.first, b.second, protection);
                    });
  for (std::int64_t i = 0; i < left; ++i) {
    ++counts[static_cast<std::size_t>(others[static_cast<std::size_t>(i)].first)];
  }
  return counts;
}

/// Counts from a table (HeadKV, CompressKV, a calibrated one), one a head: each at most what its
/// head has stored; what a head cannot use goes to the others, as evenly as they have room (the
/// published codes lose it).
/// @throws ConfigError for another number of heads, or a negative count.
inline KeepCounts table_counts(const TokenScores& scores, std::span<const std::int64_t> table) {
  if (std::ssize(table) != scores.num_heads()) {
    fail<ConfigError>("a table of ", table.size(), " counts for ", scores.num_heads(), " KV heads");
  }
  KeepCounts counts;
  std::int64_t spare = 0;
  for (std::int64_t h = 0; h < scores.num_heads(); ++h) {
    const std::int64_t wanted =
        detail::checked_range(table[static_cast<std::size_t>(h)], 0, kMaxTokens, "tokens to keep");
    counts.push_back(std::min(wanted, scores.num_tokens(h)));
    spare += wanted - counts.back();
  }
  // Rounds of equal parts; each either spends all or fills a head.
  for (bool has_room = true; spare > 0 && has_room;) {
    std::int64_t open = 0;
    for (std::int64_t h = 0; h < scores.num_heads(); ++h) {
      open += counts[static_cast<std::size_t>(h)] < scores.num_tokens(h);
    }
    has_room = open > 0;
    const std::int64_t part = has_room ? std::max<std::int64_t>(1, spare / open) : 0;
    for (std::int64_t h = 0; h < scores.num_heads() && spare > 0; ++h) {
      std::int64_t& count = counts[static_cast<std::size_t>(h)];
      const std::int64_t more = std::min({part, spare, scores.num_tokens(h) - count});
      count += more;
      spare -= more;
    }
  }
  return counts;
}

}  // namespace headwise::inline v0
