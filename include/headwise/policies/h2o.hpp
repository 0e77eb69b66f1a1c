// SPDX-License-Identifier: MIT
/// @file h2o.hpp
/// H2O: heavy hitters, the tokens that received most attention so far, and the newest ones.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "headwise/attention/observed_queries.hpp"
#include "headwise/core/check.hpp"
#include "headwise/core/row_view.hpp"
#include "headwise/heads/token_scores.hpp"
#include "headwise/simd/simd.hpp"

/// Zhang et al., H2O: Heavy-Hitter Oracle for Efficient Generative Inference, arXiv:2306.14048.
/// State: for each stored token of a KV head the attention that it has received since it came, from
/// every query of its group; it goes with the rows when a selection drops others. The sum favours
/// old tokens, which more queries could see.
///
///     h2o::Sums sums;                                  // of one KV head of one sequence
///     sums.add<Isa>(queries, keys, positions);         // each step, with all of its queries
///     sums.add_head(scores);                           // and Protection{0, recent}
///     sums.keep(kept.of_head(head));                   // after compact()
namespace headwise::inline v0::h2o {

/// Attention received by the stored tokens of one KV head.
class Sums {
 public:
  /// Adds what some queries give to every stored key, their mean over the group.
  /// @param queries  all queries of the step (of a prompt: of the chunk), after RoPE
  /// @param keys  rows stored after the step
  /// @param stored  their positions, ascending: those known so far, then the step's own
  /// @throws ConfigError where known tokens are not the first of `stored`.
  template <class Isa = simd::BestIsa>
  void add(const ObservedQueries& queries, const RowView& keys,
           std::span<const std::int32_t> stored) {
    if (stored.size() < positions_.size() ||
        !std::equal(positions_.begin(), positions_.end(), stored.begin())) {
      fail<ConfigError>("sums of ", positions_.size(), " tokens do not go with ", stored.size(),
                        " stored ones: was keep() forgotten?");
    }
    positions_.assign(stored.begin(), stored.end());
    sums_.resize(stored.size(), 0.0F);
    std::vector<float> received(stored.size(), 0.0F);
    for (int g = 0; g < queries.group_size; ++g) {
      received_attention<Isa>(queries, g, keys, stored, Received::kSum, received);
    }
    for (std::size_t j = 0; j < sums_.size(); ++j) {
      sums_[j] += received[j] / static_cast<float>(queries.group_size);
    }
  }

  /// Drops the sums of tokens that a selection dropped.
  /// @param positions  that are left, ascending
  void keep(std::span<const std::int32_t> positions) {
    std::size_t kept = 0;
    auto next = positions.begin();
    for (std::size_t j = 0; j < sums_.size(); ++j) {
      while (next != positions.end() && *next < positions_[j]) ++next;
      if (next == positions.end() || *next != positions_[j]) continue;
      positions_[kept] = positions_[j];
      sums_[kept++] = sums_[j];
    }
    positions_.resize(kept);
    sums_.resize(kept);
  }
  /// Forgets tokens at `length` and beyond. What dropped queries gave to older ones stays: exact
  /// sums after a rollback need a copy from before.
  void forget(std::int64_t length) {
    while (!positions_.empty() && positions_.back() >= length) {
      positions_.pop_back();
      sums_.pop_back();
    }
  }

  /// Appends the head to `scores`.
  void add_head(TokenScores& scores) const {
    std::ranges::copy(sums_, scores.add_head(positions_).begin());
  }
  /// The same divided by the queries that could see each token: the mean attention (kvpress'
  /// ObservedAttention), for which nothing is protected there.
  void add_head_of_means(TokenScores& scores) const {
    const auto out = scores.add_head(positions_);
    for (std::size_t j = 0; j < out.size(); ++j) {
      out[j] = sums_[j] / static_cast<float>(scores.length() - positions_[j]);
    }
  }

  /// Of each stored token.
  std::span<const float> sums() const& { return sums_; }
  std::span<const float> sums() const&& = delete;
  /// Bytes for so many stored tokens: for an estimate.
  static constexpr std::size_t bytes(std::int64_t tokens) {
    return static_cast<std::size_t>(tokens) * (sizeof(float) + sizeof(std::int32_t));
  }

 private:
  std::vector<std::int32_t> positions_;
  std::vector<float> sums_;
};

/// Heavy hitters and newest tokens: counts in all.
struct Policy {
  std::int64_t heavy = 128;   ///< tokens by sum
  std::int64_t recent = 128;  ///< newest tokens, which stay
  /// What stays whatever its score.
  constexpr Protection protection() const { return {0, recent}; }
  /// Tokens of each head.
  constexpr std::int64_t count() const { return heavy + recent; }
};

}  // namespace headwise::inline v0::h2o
