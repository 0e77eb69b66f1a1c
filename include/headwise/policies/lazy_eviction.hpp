// SPDX-License-Identifier: MIT
/// @file lazy_eviction.hpp
/// LazyEviction: a token that was looked at again after a pause may be so again; wait that long.
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
#include "headwise/heads/decode_target.hpp"
#include "headwise/heads/token_scores.hpp"
#include "headwise/simd/simd.hpp"

/// Zhang et al., LazyEviction: Lagged KV Eviction with Attention Pattern Observation for Efficient
/// Long Reasoning, arXiv:2506.15969v3. While decoding, a record notes for each stored token when a
/// query last gave it `alpha` or more, and the longest gap between two such queries. A token whose
/// gap is not yet over stays; cuts come every `window` tokens, and what is newer than that stays.
///
///     lazy_eviction::Record record;                        // of one KV head of one sequence
///     record.add(policy, queries, keys, positions);        // each decode step, from the first on
///     if (policy.is_due(stored, decoded, in_step)) {       // after a step's commit
///       lazy_eviction::add_head(policy, record, scores);   // each KV head
///       select_tokens(scores, policy.protection(), uniform_counts(scores, policy.budget), kept);
///     }                                                    // and, after compact(),
///     record.keep(kept.of_head(head));
///
/// The released code (in WeianMao/triattention, e7a0eb18) has a record a query head, counters in
/// the attention's type, where bf16 is exact to 256 only, and leaves the kept tokens in the order
/// of their scores; here a record is a KV head's, which takes the largest weight of its group,
/// counters are int32, and order is the positions'. Comparable between heads: gaps are tokens in
/// all of them.
namespace headwise::inline v0::lazy_eviction {

/// How importance follows from t (the newest query), TS (when the token was last important) and MRI
/// (the longest gap). They keep different tokens.
enum class Formula : std::uint8_t {
  kPaper,     ///< 2 sig(-(t - TS) / MRI) + 2 sig(1 - MRI)
  kReleased,  ///< 2 sig(-1 - (t - TS) / (MRI + 1e-5)) + 2 sig(1 - MRI): at most 0.54 in its first
              ///< term, so that a short gap outweighs a recent look
};

/// The published knobs.
struct Policy {
  std::int64_t budget = 2048;  ///< tokens that a cut leaves; papers give shares: DecodeTarget's
  /// Newest tokens, which stay, and the tokens from one cut to the next; in [1, budget). Published:
  /// the 80th percentile of the longest gaps (Record::longest_gaps) over a hundredth of the tasks;
  /// 175 for Qwen on MATH-500.
  std::int64_t window = 175;
  /// The weight from which a look counts; in (0, 1]. 5e-4: DeepSeek-R1-Distill-Llama-8B; 1e-4: its
  /// Qwen-7B, Qwen3-4B, QwQ-32B.
  float alpha = 5e-4F;
  Formula formula = Formula::kPaper;  ///< see Formula

  /// What stays whatever its score.
  constexpr Protection protection() const { return {0, window}; }
  /// Whether a cut is due after a step: more than the budget is stored, and the step reached a
  /// multiple of `window`. DecodeTarget counts from the last cut instead, and so cuts at once where
  /// a sequence passes its budget between two multiples.
  /// @param stored  rows of the head that has most
  /// @param decoded  tokens since the prompt, the step's included
  /// @param in_step  tokens of the step, of those
  /// @throws ConfigError for a window outside [1, budget).
  constexpr bool is_due(std::int64_t stored, std::int64_t decoded, std::int64_t in_step = 1) const {
    check_window();
    return stored > budget && decoded / window != (decoded - in_step) / window;
  }
  /// The same bounds as a target: most_rows() is what a head holds at most between steps of one
  /// token, for an estimate, once a prompt of more than the budget was cut.
  constexpr DecodeTarget target() const { return {budget, window}; }
  /// @throws ConfigError for a window outside [1, budget).
  constexpr void check_window() const {
    headwise::detail::checked_range(budget, 2, kMaxTokens, "budget");
    headwise::detail::checked_range(window, 1, budget - 1, "window");
  }
};

/// How likely a token is to be looked at again. A token that never was important is worth nothing.
/// @param since  tokens since the last important query, t - TS; >= 0
/// @param longest_gap  MRI; >= 0
/// Golden values: the specification's, in tests/policies/lazy_eviction_test.cpp.
inline double importance(Formula formula, std::int64_t since, std::int64_t longest_gap) {
  const auto age = static_cast<double>(since);
  const auto gap = static_cast<double>(longest_gap);
  // 80: e^80 is finite in fp32 too, and 2 / e^80 adds nothing to a score.
  const auto twice_sigmoid = [](double minus) {
    return 2.0 / (1.0 + std::exp(std::min(minus, 80.0)));
  };
  if (longest_gap == 0) {  // the limit of the first term; the second is not defined and left out
    if (formula == Formula::kPaper) return since == 0 ? 1.0 : 0.0;
    return since == 0 ? twice_sigmoid(1.0) : 0.0;
  }
  // 1e-5: the released code's.
  const double first = formula == Formula::kPaper ? age / gap : 1.0 + age / (gap + 1e-5);
  return twice_sigmoid(first) + twice_sigmoid(gap - 1.0);
}

/// When the stored tokens of one KV head were last important, and their longest gaps. The clock is
/// the position of the newest query.
///
/// 12 bytes a stored token, so never more than bytes(budget + window) where keep() follows each
/// cut. A fork copies it. A rollback forgets tokens, and what it cannot know it bounds (forget());
/// to be exact, copy it before a speculation and put the copy back.
class Record {
 public:
  /// Notes what a step's queries give to every stored key: a token is important to a query that
  /// gives it `alpha` or more in any query head of the group. Prompts are not noted: tokens from
  /// before the first noted query begin as if important just before it. A step that is not noted is
  /// one without important tokens.
  /// @param queries  all queries of the step, after RoPE; each newer than any noted before
  /// @param keys  rows stored after the step
  /// @param stored  their positions, ascending: those known so far, then the step's own
  /// @throws ConfigError for sizes that differ, known tokens that are not the first of `stored`,
  ///   positions that do not ascend, a query noted before or an alpha outside (0, 1]; nothing is
  ///   noted then.
  /// Cost: received_attention() of each query, and as many comparisons as keys.
  template <class Isa = simd::BestIsa>
  void add(const Policy& policy, const ObservedQueries& queries, const RowView& keys,
           std::span<const std::int32_t> stored) {
    check(policy, queries, keys, stored);
    if (queries.count() == 0) return;
    std::vector<std::size_t> by_position(queries.positions.size());
    std::iota(by_position.begin(), by_position.end(), std::size_t{0});
    std::ranges::sort(by_position, {}, [&](std::size_t i) { return queries.positions[i]; });
    if (start_ < 0) start_ = queries.positions[by_position.front()];
    for (std::size_t j = positions_.size(); j < stored.size(); ++j) {
      positions_.push_back(stored[j]);
      last_important_.push_back(std::max(stored[j], start_) - 1);
      longest_gaps_.push_back(0);
    }
    std::vector<float> largest(stored.size());
    for (const std::size_t i : by_position) {
      const std::int32_t now = queries.positions[i];
      const std::int64_t visible = std::ranges::upper_bound(stored, now) - stored.begin();
      std::fill(largest.begin(), largest.end(), 0.0F);
      for (int g = 0; g < queries.group_size; ++g) {
        const auto row = static_cast<std::int64_t>(i);
        received_attention<Isa>(queries.of(g).rows(row, row + 1), std::span(&visible, 1), keys,
                                queries.scale, Received::kMax, largest);
      }
      for (std::size_t j = 0; j < largest.size(); ++j) {
        if (!is_finite(largest[j]) || largest[j] < policy.alpha) continue;
        longest_gaps_[j] = std::max(longest_gaps_[j], now - last_important_[j]);
        last_important_[j] = now;
      }
      clock_ = now;
    }
  }

  /// Drops what is noted of tokens that a selection dropped.
  /// @param positions  that are left, ascending
  void keep(std::span<const std::int32_t> positions) {
    std::size_t kept = 0;
    auto next = positions.begin();
    for (std::size_t j = 0; j < positions_.size(); ++j) {
      while (next != positions.end() && *next < positions_[j]) ++next;
      if (next == positions.end() || *next != positions_[j]) continue;
      positions_[kept] = positions_[j];
      last_important_[kept] = last_important_[j];
      longest_gaps_[kept++] = longest_gaps_[j];
    }
    resize(kept);
  }

  /// Forgets tokens and queries at `length` and beyond: a rollback's. A token that those queries
  /// found important counts as important to the newest that is left, and keeps its longest gap.
  /// Back to before the first noted query nothing is left, which is exact.
  void forget(std::int64_t length) {
    if (start_ < 0 || length > clock_) return;
    if (length <= start_) {
      *this = Record();
      return;
    }
    clock_ = static_cast<std::int32_t>(length - 1);
    std::size_t kept = positions_.size();
    while (kept > 0 && positions_[kept - 1] >= length) --kept;
    resize(kept);
    for (std::int32_t& position : last_important_) position = std::min(position, clock_);
  }

  /// Stored tokens that are known, ascending.
  std::span<const std::int32_t> positions() const& { return positions_; }
  /// Of each: the position of the last query that it was important to.
  std::span<const std::int32_t> last_important() const& { return last_important_; }
  /// Of each: the most tokens between two such queries; 0 where there was none. To calibrate
  /// Policy::window.
  std::span<const std::int32_t> longest_gaps() const& { return longest_gaps_; }
  std::span<const std::int32_t> positions() const&& = delete;
  std::span<const std::int32_t> last_important() const&& = delete;
  std::span<const std::int32_t> longest_gaps() const&& = delete;
  /// Position of the newest query noted; -1 before the first.
  std::int32_t newest() const { return clock_; }
  /// Bytes for so many stored tokens: for an estimate.
  static constexpr std::size_t bytes(std::int64_t tokens) {
    return static_cast<std::size_t>(tokens) * 3 * sizeof(std::int32_t);
  }

 private:
  void check(const Policy& policy, const ObservedQueries& queries, const RowView& keys,
             std::span<const std::int32_t> stored) const {
    if (!is_finite(policy.alpha) || policy.alpha <= 0.0F || policy.alpha > 1.0F) {
      fail<ConfigError>("alpha must be in (0, 1], got ", policy.alpha);
    }
    if (queries.dim != keys.dim || std::ssize(stored) != keys.count) {
      fail<ConfigError>("queries of width ", queries.dim, " over ", keys.count, " keys of width ",
                        keys.dim, " at ", stored.size(), " positions");
    }
    if (stored.size() < positions_.size() ||
        !std::equal(positions_.begin(), positions_.end(), stored.begin())) {
      fail<ConfigError>("a record of ", positions_.size(), " tokens does not go with ",
                        stored.size(), " stored ones: was keep() forgotten?");
    }
    std::int32_t last = -1;
    for (const std::int32_t position : stored) {
      if (position <= last) fail<ConfigError>("stored position ", position, " after ", last);
      last = position;
    }
    std::vector<std::int32_t> noted(queries.positions.begin(), queries.positions.end());
    std::ranges::sort(noted);
    last = clock_;
    for (const std::int32_t position : noted) {
      if (position <= last) {
        fail<ConfigError>("a query at ", position, " after one noted at ", last);
      }
      last = position;
    }
  }
  void resize(std::size_t tokens) {
    positions_.resize(tokens);
    last_important_.resize(tokens);
    longest_gaps_.resize(tokens);
  }

  std::int32_t start_ = -1;  // position of the first query noted
  std::int32_t clock_ = -1;
  std::vector<std::int32_t> positions_;
  std::vector<std::int32_t> last_important_;
  std::vector<std::int32_t> longest_gaps_;
};

/// Appends one KV head to `scores`.
/// @param record  of this head, the sequence's newest query noted
/// @throws ConfigError for a record that ends before the sequence does, or a window outside [1,
///   budget).
inline void add_head(const Policy& policy, const Record& record, TokenScores& scores) {
  policy.check_window();
  if (record.newest() < 0 || record.newest() != scores.length() - 1) {
    fail<ConfigError>("a record up to position ", record.newest(), " of a sequence of ",
                      scores.length(), " tokens");
  }
  const auto out = scores.add_head(record.positions());
  for (std::size_t j = 0; j < out.size(); ++j) {
    out[j] = static_cast<float>(importance(
        policy.formula, record.newest() - record.last_important()[j], record.longest_gaps()[j]));
  }
}

}  // namespace headwise::inline v0::lazy_eviction
