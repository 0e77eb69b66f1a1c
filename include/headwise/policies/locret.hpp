// SPDX-License-Identifier: MIT
/// @file locret.hpp
/// Locret: a small trained network scores a token once, when it comes; prompts are cut as they run.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "headwise/core/check.hpp"
#include "headwise/core/checked.hpp"
#include "headwise/core/row_view.hpp"
#include "headwise/heads/token_scores.hpp"

/// Huang et al., Locret: Enhancing Eviction in Long-Context LLM Inference with Trained Retaining
/// Heads, arXiv:2410.01805; the rule is that of the released code (huangyuxiang03/Locret, 28995c5).
/// A layer's retaining head turns a token's queries, keys and values, before RoPE, into a score a
/// KV head, which is final. A prompt runs in chunks and is cut behind each; the newest tokens stay
/// in such a cut, but in the last one. The last tokens of the prompt come after it, and neither
/// they nor what is decoded causes a cut.
///
///     while (done < length) {
///       done += policy.next_step(done, length);             // of so many tokens, committed; each
///       retaining[l].score(features, by_head);              // layer's, by head to its Scores::add
///       if (!policy.cuts_at(done, length)) continue;
///       for (each head) of_head.add_head(scores);           // scores: TokenScores(done)
///       select_tokens(scores, policy.protection(done, length),
///                     uniform_counts(scores, policy.budget), kept);
///     }                                                     // after each compact(): keep()
///
/// The released code stores keys before RoPE and counts positions anew after a cut; here they stay
/// at their positions. Weights: locret_weights.hpp. Training is not here.
namespace headwise::inline v0::locret {

/// The published knobs, for Phi-3-mini-128K; Llama-3.1-8B's budget is 16384 in its comparisons.
struct Policy {
  std::int64_t budget = 6000;       ///< tokens that a cut leaves in each KV head
  std::int64_t chunk = 3072;        ///< tokens of a step of the prompt
  std::int64_t stabilizers = 2500;  ///< newest tokens, which stay, but in the last cut; < budget
  std::int64_t local = 100;         ///< last tokens of a prompt, a step of their own without a cut

  /// Tokens of the next step of a prompt.
  /// @param done  tokens before it
  /// @param length  of the prompt
  /// @throws ConfigError for a policy out of range.
  std::int64_t next_step(std::int64_t done, std::int64_t length) const {
    check();
    const std::int64_t cut = length - local;
    return done < cut ? std::min(chunk, cut - done) : std::max<std::int64_t>(0, length - done);
  }
  /// Whether a cut is due after the step that ends at `done`.
  bool cuts_at(std::int64_t done, std::int64_t length) const {
    check();
    return done > 0 && done <= length - local;
  }
  /// What stays whatever its score in that cut.
  Protection protection(std::int64_t done, std::int64_t length) const {
    check();
    return {0, done == length - local ? 0 : stabilizers};
  }
  /// @throws ConfigError for a budget or chunk below 1, stabilizers outside [0, budget), or a
  ///   negative `local`.
  void check() const {
    using headwise::detail::checked_range;
    checked_range(budget, 1, kMaxTokens, "budget");
    checked_range(chunk, 1, kMaxTokens, "chunk");
    checked_range(stabilizers, 0, budget - 1, "stabilizers");
    checked_range(local, 0, kMaxTokens, "local tokens");
  }
};

/// The network of one layer: w2 silu(w1 x), without biases.
class RetainingHead {
 public:
  /// @param w1  [hidden, features] row by row (1024 published)
  /// @param w2  [num_kv_heads, hidden]
  /// @throws ConfigError for sizes that do not go together or are none.
  RetainingHead(std::vector<float> w1, std::vector<float> w2, int features, int num_kv_heads)
      : w1_(std::move(w1)), w2_(std::move(w2)), features_(features), num_kv_heads_(num_kv_heads) {
    const auto in = static_cast<std::size_t>(std::max(1, features));
    hidden_ = w1_.size() / in;
    if (features < 1 || num_kv_heads < 1 || hidden_ == 0 || w1_.size() % in != 0 ||
        w2_.size() / hidden_ != static_cast<std::size_t>(num_kv_heads) ||
        w2_.size() % hidden_ != 0) {
      fail<ConfigError>("weights of ", w1_.size(), " and ", w2_.size(), " numbers for ", features,
                        " features and ", num_kv_heads, " KV heads");
    }
  }

  /// Scores of tokens. A token's bits do not depend on the others.
  /// @param x  [tokens, features] of each token the projections before RoPE: queries of all heads,
  ///   keys of all, values of all
  /// @param out  [num_kv_heads, tokens]
  /// @throws ConfigError for sizes that differ.
  /// Cost: 2 hidden (features + num_kv_heads) flop a token.
  void score(const RowView& x, std::span<float> out) const {
    if (x.dim != features_ ||
        out.size() != static_cast<std::size_t>(x.count) * static_cast<std::size_t>(num_kv_heads_)) {
      fail<ConfigError>(x.count, " tokens of ", x.dim, " features and ", out.size(),
                        " scores; a retaining head of ", features_, " features and ", num_kv_heads_,
                        " KV heads");
    }
    const auto in = static_cast<std::size_t>(features_);
    std::vector<float> hidden(hidden_);
    for (std::int64_t i = 0; i < x.count; ++i) {
      for (std::size_t o = 0; o < hidden_; ++o) {
        const float z = product(w1_.data() + o * in, x.row(i), in);
        hidden[o] = z / (1.0F + std::exp(std::min(-z, 80.0F)));  // e^80 is finite
      }
      for (std::size_t h = 0; h < static_cast<std::size_t>(num_kv_heads_); ++h) {
        out[h * static_cast<std::size_t>(x.count) + static_cast<std::size_t>(i)] =
            product(w2_.data() + h * hidden_, hidden.data(), hidden_);
      }
    }
  }
  /// Numbers that a token has before the network.
  int features() const { return features_; }
  /// Scores that it has behind it.
  int num_kv_heads() const { return num_kv_heads_; }

 private:
  static float product(const float* a, const float* b, std::size_t size) {
    float sums[8] = {};  // chains of their own: no sum waits for the one before
    std::size_t i = 0;
    for (; i + 8 <= size; i += 8) {
      for (std::size_t j = 0; j < 8; ++j) sums[j] += a[i + j] * b[i + j];
    }
    for (; i < size; ++i) sums[i % 8] += a[i] * b[i];
    float sum = 0.0F;
    for (const float part : sums) sum += part;
    return sum;
  }

  std::vector<float> w1_, w2_;
  std::size_t hidden_ = 0;
  int features_;
  int num_kv_heads_;
};

/// Scores of the stored tokens of one KV head of one sequence; they go with its rows.
class Scores {
 public:
  /// Adds a step's tokens.
  /// @param first_position  of the first of them, behind every known one
  /// @param of_step  their scores
  /// @throws ConfigError for a position that is known or negative, or beyond int32.
  void add(std::int64_t first_position, std::span<const float> of_step) {
    const std::int64_t next = positions_.empty() ? 0 : std::int64_t{positions_.back()} + 1;
    headwise::detail::checked_range(first_position, next,
                                    std::int64_t{0x7FFFFFFF} - std::ssize(of_step),
                                    "position of the first new score");
    for (const float score : of_step) {
      positions_.push_back(static_cast<std::int32_t>(first_position++));
      scores_.push_back(score);
    }
  }
  /// Drops the scores of tokens that a selection dropped.
  /// @param positions  that are left, ascending
  void keep(std::span<const std::int32_t> positions) {
    std::size_t kept = 0;
    for (std::size_t j = 0; j < positions_.size(); ++j) {
      if (!std::ranges::binary_search(positions, positions_[j])) continue;
      positions_[kept] = positions_[j];
      scores_[kept++] = scores_[j];
    }
    positions_.resize(kept);
    scores_.resize(kept);
  }
  /// Forgets tokens at `length` and beyond: exact, as no score depends on later tokens.
  void forget(std::int64_t length) {
    while (!positions_.empty() && positions_.back() >= length) {
      positions_.pop_back();
      scores_.pop_back();
    }
  }
  /// Appends the head to `scores`.
  void add_head(TokenScores& scores) const {
    std::ranges::copy(scores_, scores.add_head(positions_).begin());
  }
  /// Bytes for so many stored tokens: for an estimate.
  static constexpr std::size_t bytes(std::int64_t tokens) {
    return static_cast<std::size_t>(tokens) * (sizeof(float) + sizeof(std::int32_t));
  }

 private:
  std::vector<std::int32_t> positions_;
  std::vector<float> scores_;
};

}  // namespace headwise::inline v0::locret
