// SPDX-License-Identifier: MIT
/// @file retrieval_head.hpp
/// Retrieval Head: how often a head's strongest attention copies the needle, token by token.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "headwise/core/check.hpp"
#include "headwise/core/checked.hpp"
#include "headwise/core/position.hpp"
#include "headwise/core/window.hpp"
#include "headwise/heads/scores.hpp"
#include "headwise/heads/select.hpp"
#include "headwise/policies/policy.hpp"

/// Wu et al., Retrieval Head Mechanistically Explains Long-Context Factuality, arXiv:2404.15574.
/// The scores are of *query heads*: the mean over needle-in-a-haystack runs in which the answer was
/// right (ROUGE-1 recall above 50 %). Published files: load_head_runs() in heads/json.hpp; a
/// model's own: retrieval_probe.hpp.
///
///     HeadRuns runs = load_head_runs("head_score.json");
///     retrieval_head::Policy policy{.group_size = 1, .window = {.sink = 64, .recent = 256}};
///     HeadPlan plan = policy.plan(runs.mean);
namespace headwise::inline v0::retrieval_head {

/// Section 2: a head with a mean score of at least 0.1 is a retrieval head (3-6 % of all heads).
inline constexpr double kThreshold = 0.1;

/// One head's score in one run (section 2). At each decode step the head copies if the position of
/// its largest attention weight, over all keys, lies in the needle and the needle's token there is
/// the one being generated.
class CopyScore {
 public:
  /// @param first  position of the needle's first token.
  /// @param needle  its token ids, at least one.
  /// @throws ConfigError for an empty needle or a negative position.
  CopyScore(Pos first, std::span<const std::int32_t> needle)
      : first_(first), needle_(needle.begin(), needle.end()), copied_(needle.size()) {
    if (needle.empty()) fail<ConfigError>("a needle needs at least 1 token, got 0");
    detail::checked_range(first.value, 0, kMaxTokens, "the needle's position");
  }

  /// @param attended  where the head attends most.
  /// @param generated  the token this step generates.
  void step(Pos attended, std::int32_t generated) {
    if (attended < first_) return;
    const std::int64_t i = attended - first_;
    if (i >= static_cast<std::int64_t>(needle_.size())) return;
    if (needle_[static_cast<std::size_t>(i)] != generated) return;
    ++num_hits_;
    copied_[static_cast<std::size_t>(i)] = true;
  }

  /// As the released code counts, and so as the published files are made: hits / needle length. A
  /// token copied twice counts twice; scores up to 1.88 are published.
  double score() const { return share(num_hits_); }

  /// As the paper defines it: the share of needle tokens copied at least once, in [0, 1].
  double paper_score() const { return share(std::count(copied_.begin(), copied_.end(), true)); }

 private:
  double share(std::ptrdiff_t count) const {
    return static_cast<double>(count) / static_cast<double>(needle_.size());
  }

  Pos first_;
  std::vector<std::int32_t> needle_;
  std::vector<bool> copied_;
  std::ptrdiff_t num_hits_ = 0;
};

/// Not in the paper, which masks heads but caches everything: KV heads with a retrieval head in
/// their group keep everything, the others stream.
struct Policy {
  double threshold = kThreshold;  ///< least mean score of a retrieval head
  int group_size = 1;             ///< query heads per KV head
  Window window{};                ///< must be given: no published value

  /// @throws ConfigError when the window was not given or the group does not divide the heads.
  HeadPlan plan(const QueryHeadScores& mean_scores) const {
    if (!window.bounded()) fail<ConfigError>("retrieval_head needs a window: it publishes none");
    return select_at_least(reduce_max(mean_scores, group_size), threshold, KeepWindow{window});
  }
};
static_assert(HeadPolicy<Policy, QueryHeadScores>);

}  // namespace headwise::inline v0::retrieval_head
