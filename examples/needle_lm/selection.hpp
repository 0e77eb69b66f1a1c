// SPDX-License-Identifier: MIT
/// @file selection.hpp
/// Which tokens of a prompt stay: the methods of run-time selection, from scores to kept positions.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <variant>
#include <vector>

#include "headwise/attention/rope.hpp"
#include "headwise/heads/budget.hpp"
#include "headwise/heads/kept_positions.hpp"
#include "headwise/heads/plan.hpp"
#include "headwise/heads/select_tokens.hpp"
#include "headwise/heads/token_counts.hpp"
#include "headwise/heads/token_scores.hpp"
#include "headwise/policies/ada_kv.hpp"
#include "headwise/policies/expected_attention.hpp"
#include "headwise/policies/pyramid_kv.hpp"
#include "headwise/policies/snap_kv.hpp"
#include "headwise/policies/tri_attention.hpp"

namespace needle_lm {

enum class SelectionMethod : std::uint8_t {
  kSnapKv,
  kAdaKv,      ///< over SnapKV's scores
  kPyramidKv,  ///< over SnapKV's scores
  kExpectedAttention,
  kKvZip,
  kTriAttention,
};
inline constexpr std::size_t kNumSelectionMethods = 6;

/// A method at a share of the prompt.
struct Selection {
  SelectionMethod method = SelectionMethod::kSnapKv;
  double share = 0.5;  ///< of the prompt's tokens, the mean over the heads that are selected from
};

/// SnapKV's pooling kernel in the papers' comparisons.
inline constexpr int kPublishedPool = 7;

/// Where the methods stand, with the papers' knobs.
struct SelectionPolicies {
  /// As in the papers' comparisons. The released code's window of 32 leaves PyramidKV no pyramid
  /// below 640 tokens a head; a quarter of these prompts is 500.
  headwise::snap_kv::Policy snap_kv{
      .window = 8, .kernel = kPublishedPool, .pool = headwise::snap_kv::Pool::kMax};
  headwise::ada_kv::Policy ada_kv = {};
  headwise::pyramid_kv::Policy pyramid_kv = {};
  headwise::expected_attention::Policy expected_attention = {};
  /// Published while decoding, with the prompt protected. Here the prompt is what is cut.
  headwise::tri_attention::Policy tri_attention = {};
  std::int64_t kv_zip_prefix = 1;  ///< `<s>`: the template of KVzip's prompts

  /// @param pool  SnapKV's kernel: tokens that share the highest score among them; odd
  explicit SelectionPolicies(double rope_theta, int pool = kPublishedPool) {
    snap_kv.kernel = pool;
    expected_attention.rope.theta = rope_theta;
    tri_attention.rope.theta = rope_theta;
  }
};

/// Of a prompt that was read: scores of the heads that are selected from. Groups are what is
/// compared with each other: a layer's heads; for KVzip, in one group, all of them.
struct PromptScores {
  std::int64_t length = 0;    ///< tokens of the prompt
  std::int64_t question = 1;  ///< last tokens, which every method keeps
  std::vector<headwise::TokenScores> snap_kv;
  std::vector<headwise::TokenScores> expected_attention;
  std::vector<headwise::TokenScores> kv_zip;
  std::vector<headwise::TokenScores> tri_attention;
};

/// "snap_kv", in the CSV.
inline const char* id_of(SelectionMethod method) {
  constexpr std::array<const char*, kNumSelectionMethods> kIds{
      "snap_kv", "ada_kv", "pyramid_kv", "expected_attention", "kv_zip", "tri_attention"};
  return kIds[static_cast<std::size_t>(method)];
}
/// "SnapKV", in the table.
inline const char* title_of(SelectionMethod method) {
  constexpr std::array<const char*, kNumSelectionMethods> kTitles{
      "SnapKV", "AdaKV", "PyramidKV", "Expected Att.", "KVzip", "TriAttention"};
  return kTitles[static_cast<std::size_t>(method)];
}

/// Whether a head's rows are selected.
inline bool is_selected(const headwise::HeadBudget& budget) {
  return std::holds_alternative<headwise::KeepSelected>(budget);
}

/// The plan with its retrieval heads selected from; the others stream as they did.
inline headwise::HeadPlan with_selection(headwise::HeadPlan plan) {
  for (int layer = 0; layer < plan.num_layers(); ++layer) {
    for (int head = 0; head < plan.num_kv_heads(layer); ++head) {
      if (headwise::is_retrieval(plan.budget(layer, head))) {
        plan.set(layer, head, headwise::KeepSelected{});
      }
    }
  }
  return plan;
}

namespace detail {

inline const std::vector<headwise::TokenScores>& groups_of(const PromptScores& scores,
                                                           SelectionMethod method) {
  switch (method) {
    case SelectionMethod::kExpectedAttention:
      return scores.expected_attention;
    case SelectionMethod::kKvZip:
      return scores.kv_zip;
    case SelectionMethod::kTriAttention:
      return scores.tri_attention;
    default:
      return scores.snap_kv;
  }
}

/// What a method protects, and the question: without it there is nothing to answer.
inline headwise::Protection protection_of(const SelectionPolicies& policies,
                                          const PromptScores& scores, SelectionMethod method) {
  headwise::Protection protection = policies.snap_kv.protection();
  if (method == SelectionMethod::kExpectedAttention) {
    protection = policies.expected_attention.protection();
  } else if (method == SelectionMethod::kKvZip) {
    protection = {policies.kv_zip_prefix, 0};
  } else if (method == SelectionMethod::kTriAttention) {
    protection = policies.tri_attention.protection();
  }
  protection.recent = std::max(protection.recent, scores.question);
  return protection;
}

/// Tokens of each head of a group.
inline headwise::KeepCounts counts_of(const SelectionPolicies& policies, SelectionMethod method,
                                      const headwise::TokenScores& group, std::size_t layer,
                                      int num_layers, const headwise::Protection& protection,
                                      std::int64_t mean) {
  if (method == SelectionMethod::kAdaKv) return policies.ada_kv.counts(group, protection, mean);
  if (method == SelectionMethod::kKvZip) {
    return headwise::shared_counts(group, protection, mean * group.num_heads());
  }
  if (method == SelectionMethod::kPyramidKv) {
    mean = policies.pyramid_kv.counts(num_layers, group.length(), mean, protection.recent)[layer];
  }
  return headwise::uniform_counts(group, mean);
}

}  // namespace detail

/// What each head of `plan` keeps of a prompt; heads that are not selected from: nothing is said.
/// @throws ConfigError for a share so small that it is less than the protected tokens.
inline headwise::KeptPositions select(const SelectionPolicies& policies,
                                      const headwise::HeadPlan& plan, const PromptScores& scores,
                                      Selection selection) {
  const std::int64_t mean = headwise::tokens_left(scores.length, 1.0 - selection.share);
  const headwise::Protection protection = detail::protection_of(policies, scores, selection.method);
  headwise::KeptPositions selected;
  std::size_t layer = 0;
  for (const headwise::TokenScores& group : detail::groups_of(scores, selection.method)) {
    headwise::select_tokens(group, protection,
                            detail::counts_of(policies, selection.method, group, layer++,
                                              plan.num_layers(), protection, mean),
                            selected);
  }
  headwise::KeptPositions kept;
  std::int64_t next = 0;
  for (const headwise::HeadBudget& budget : plan.budgets()) {
    kept.add_head(is_selected(budget) ? selected.of_head(next++) : std::span<const std::int32_t>{});
  }
  return kept;
}

}  // namespace needle_lm
