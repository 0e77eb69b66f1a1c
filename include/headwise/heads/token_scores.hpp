// SPDX-License-Identifier: MIT
/// @file token_scores.hpp
/// TokenScores: how much each stored token of some KV heads matters; Protection: which stay anyway.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <span>
#include <vector>

#include "headwise/core/bits.hpp"
#include "headwise/core/check.hpp"
#include "headwise/core/checked.hpp"

namespace headwise::inline v0 {

/// Tokens that a selection keeps whatever their scores: the `sink` first and the `recent` last
/// positions of the sequence (the newest token counts). Positions, not rows: what an earlier
/// selection dropped does not make others first or last.
struct Protection {
  std::int64_t sink = 0;    ///< >= 0
  std::int64_t recent = 0;  ///< >= 0; SnapKV's observation window
  /// Whether the token at `position` of a sequence of `length` tokens stays.
  constexpr bool covers(std::int64_t position, std::int64_t length) const {
    return position < sink || position >= length - recent;
  }
  friend constexpr bool operator==(const Protection&, const Protection&) = default;
};

/// The score of every stored token of some KV heads of one sequence; higher: keep. Heads whose
/// scores are compared with each other (a layer's for AdaKV, a model's for a global cut) are in one
/// object. A score that is infinite or NaN counts as -infinity.
class TokenScores {
 public:
  /// @param length  tokens of the sequence: all positions are below it
  /// @throws ConfigError for a length outside [0, 2^31).
  explicit TokenScores(std::int64_t length)
      : length_(detail::checked_range(length, 0, std::int64_t{0x7FFFFFFF}, "length")) {}

  /// Appends a head, whose scores are to be filled in.
  /// @param positions  of its stored tokens, ascending, in [0, length)
  /// @return [positions.size()] scores, 0 so far; valid until the next add_head()
  /// @throws ConfigError for positions that do not ascend or lie outside.
  std::span<float> add_head(std::span<const std::int32_t> positions) & {
    std::int64_t last = -1;
    for (const std::int32_t position : positions) {
      if (position <= last || position >= length_) {
        fail<ConfigError>("KV head ", num_heads(), ": position ", position, " after ", last,
                          " must lie above it and below ", length_);
      }
      last = position;
    }
    positions_.insert(positions_.end(), positions.begin(), positions.end());
    return grow();
  }
  /// Appends a head that stores every token of the sequence.
  std::span<float> add_head() & {
    const std::size_t first = positions_.size();
    positions_.resize(first + static_cast<std::size_t>(length_));
    std::iota(positions_.begin() + static_cast<std::ptrdiff_t>(first), positions_.end(), 0);
    return grow();
  }
  std::span<float> add_head(std::span<const std::int32_t> positions) && = delete;
  std::span<float> add_head() && = delete;

  /// Tokens of the sequence.
  std::int64_t length() const { return length_; }
  /// Heads so far.
  std::int64_t num_heads() const { return static_cast<std::int64_t>(first_.size()) - 1; }
  /// Stored tokens of one head.
  std::int64_t num_tokens(std::int64_t head) const {
    return static_cast<std::int64_t>(end(head) - begin(head));
  }
  /// Positions of one head's tokens, ascending.
  std::span<const std::int32_t> positions(std::int64_t head) const& {
    return std::span(positions_).subspan(begin(head), end(head) - begin(head));
  }
  /// Their scores.
  std::span<const float> scores(std::int64_t head) const& {
    return std::span(scores_).subspan(begin(head), end(head) - begin(head));
  }
  /// @copydoc scores
  std::span<float> scores(std::int64_t head) & {
    return std::span(scores_).subspan(begin(head), end(head) - begin(head));
  }
  std::span<const std::int32_t> positions(std::int64_t head) const&& = delete;
  std::span<const float> scores(std::int64_t head) const&& = delete;

  /// What decides between equal scores of one head, higher first; without it, or where it is equal
  /// too, the lower position. Max-pooled scores are equal in whole plateaus (SnapKV).
  /// @param tie_scores  [num_tokens(last head)]
  /// @throws ConfigError for another number.
  void set_tie_scores(std::span<const float> tie_scores) {
    const std::int64_t head = num_heads() - 1;
    const std::int64_t tokens = head < 0 ? 0 : num_tokens(head);
    if (static_cast<std::int64_t>(tie_scores.size()) != tokens) {
      fail<ConfigError>(tie_scores.size(), " tie scores for a head of ", tokens, " tokens");
    }
    ties_.resize(scores_.size(), 0.0F);
    std::ranges::copy(tie_scores, ties_.begin() + static_cast<std::ptrdiff_t>(begin(head)));
  }

  /// One head's tokens as indices into its lists, those to keep first: protected ones, newest
  /// first, then by score, tie score, lower position.
  std::vector<std::int32_t> order(std::int64_t head, const Protection& protection) const {
    std::vector<std::int32_t> tokens(static_cast<std::size_t>(num_tokens(head)));
    std::iota(tokens.begin(), tokens.end(), 0);
    std::sort(tokens.begin(), tokens.end(), [&](std::int32_t a, std::int32_t b) {
      return comes_first(head, a, head, b, protection);
    });
    return tokens;
  }
  /// Whether one token is to be kept before another, of the same head or of two that are compared:
  /// then the lower head comes first where scores are equal.
  bool comes_first(std::int64_t head_a, std::int32_t a, std::int64_t head_b, std::int32_t b,
                   const Protection& protection) const {
    const std::size_t at_a = begin(head_a) + static_cast<std::size_t>(a);
    const std::size_t at_b = begin(head_b) + static_cast<std::size_t>(b);
    const bool forced_a = protection.covers(positions_[at_a], length_);
    const bool forced_b = protection.covers(positions_[at_b], length_);
    if (forced_a != forced_b) return forced_a;
    if (forced_a) {
      return positions_[at_a] != positions_[at_b] ? positions_[at_a] > positions_[at_b]
                                                  : head_a < head_b;
    }
    // -infinity as a flag: no arithmetic or comparison on infinities, which -ffast-math denies.
    const bool counts_a = is_finite(scores_[at_a]);
    const bool counts_b = is_finite(scores_[at_b]);
    if (counts_a != counts_b) return counts_a;
    if (counts_a && scores_[at_a] != scores_[at_b]) return scores_[at_a] > scores_[at_b];
    if (head_a != head_b) return head_a < head_b;
    const bool ties_a = at_a < ties_.size() && is_finite(ties_[at_a]);
    const bool ties_b = at_b < ties_.size() && is_finite(ties_[at_b]);
    if (ties_a != ties_b) return ties_a;
    if (ties_a && ties_[at_a] != ties_[at_b]) return ties_[at_a] > ties_[at_b];
    return a < b;
  }
  /// Stored tokens of a head that are protected.
  std::int64_t num_protected(std::int64_t head, const Protection& protection) const {
    return std::ranges::count_if(positions(head), [&](std::int32_t position) {
      return protection.covers(position, length_);
    });
  }

 private:
  std::size_t begin(std::int64_t head) const {
    HEADWISE_ASSERT(head >= 0 && head < num_heads(), "KV head out of range");
    return first_[static_cast<std::size_t>(head)];
  }
  std::size_t end(std::int64_t head) const { return first_[static_cast<std::size_t>(head) + 1]; }
  std::span<float> grow() {
    scores_.resize(positions_.size(), 0.0F);
    first_.push_back(positions_.size());
    return scores(num_heads() - 1);
  }

  std::int64_t length_;
  std::vector<std::int32_t> positions_;
  std::vector<float> scores_;
  std::vector<float> ties_;            // as far as set
  std::vector<std::size_t> first_{0};  // [heads + 1]
};

}  // namespace headwise::inline v0
