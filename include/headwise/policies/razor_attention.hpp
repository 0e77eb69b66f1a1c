// SPDX-License-Identifier: MIT
/// @file razor_attention.hpp
/// RazorAttention: induction and echo heads keep everything; the others a growing window and one
/// compensation row for all that left it.
#pragma once

#include <cstddef>

#include "headwise/core/bits.hpp"
#include "headwise/core/check.hpp"
#include "headwise/heads/budget.hpp"
#include "headwise/heads/numbers.hpp"
#include "headwise/heads/plan.hpp"
#include "headwise/heads/scores.hpp"
#include "headwise/heads/select.hpp"
#include "headwise/policies/policy.hpp"

/// Tang et al., RazorAttention, arXiv:2407.15891. Needs no training, and no attention weights at
/// run time.
///
/// **Which heads.** In a random sequence that is repeated, an *induction* head attends to the token
/// that followed an earlier occurrence of the current one, an *echo* head to that occurrence
/// itself. The top 14 % of KV heads by induction and the top 1 % by echo are retrieval heads; a KV
/// head is worth its best query head (reduce_max()). razor_probe.hpp finds the scores.
///
/// **The RazorAttention rule** (Algorithm 1). With n tokens so far, a head that is not a retrieval
/// head keeps the first N0 tokens and the last L(n) = max(S0, n / C). The Nd = n - N0 - L(n) others
/// become one row, the means k^, v^ of their keys (after RoPE) and values. With s = q.k * sm_scale,
///
///     out = (Nd exp(s^) v^ + sum exp(s_j) v_j) / (Nd exp(s^) + sum exp(s_j))
///
/// over the kept rows j: the row has a log weight of ln(Nd). When all dropped keys are equal this
/// is full attention; it never weighs more than what it stands for (Jensen). With nothing dropped
/// there is no row (ln 0). The paper leaves open whether the window moves while decoding; here it
/// does, a page at a time. Prompts are prefilled with dense attention, as in `chunk_causal` mode.
///
/// The budget is KeepGrowingWindow (heads/budget.hpp: L(n), Nd), the cache folds the rows, and
/// CompensationRow (core/kv_view.hpp) carries their sums to attention.
namespace headwise::inline v0::razor_attention {

/// Evidence: how much attention every KV head spends on either pattern, in [0, 1].
struct Scores {
  HeadScores induction;  ///< attention to the token after an earlier occurrence
  HeadScores echo;       ///< attention to the earlier occurrence itself
};

/// The published selection with its parameters.
struct Policy {
  /// Shares of all KV heads. The authors' advice: 0.15 to 0.20 by induction suits most open models;
  /// where quality is short, 0.03 more at a time.
  double induction_share = 0.14;
  double echo_share = 0.01;    ///< as induction_share
  KeepGrowingWindow budget{};  ///< what the other heads keep

  /// Union of the round(share * heads) best by either score, halves to even; in a model of 50 heads
  /// or fewer 1 % is no echo head at all. Ties are cut by order, so that the counts are exact; the
  /// released code selects by value and keeps all heads that tie at the cut.
  /// @throws ConfigError for a share outside [0, 1], or scores of two different models.
  HeadPlan plan(const Scores& scores) const {
    if (scores.induction.heads_per_layer() != scores.echo.heads_per_layer()) {
      fail<ConfigError>("induction and echo scores differ in shape: ", scores.induction.num_heads(),
                        " and ", scores.echo.num_heads(), " heads");
    }
    HeadPlan plan = select_top(scores.induction, count(scores, induction_share), budget);
    const HeadPlan echo = select_top(scores.echo, count(scores, echo_share), budget);
    for (int layer = 0; layer < plan.num_layers(); ++layer) {
      for (int head = 0; head < plan.num_kv_heads(layer); ++head) {
        if (is_retrieval(echo.budget(layer, head))) plan.set(layer, head, KeepEverything{});
      }
    }
    return plan;
  }

 private:
  static std::size_t count(const Scores& scores, double share) {
    if (!is_finite(share) || share < 0.0 || share > 1.0) {
      fail<ConfigError>("a share of heads must be in [0, 1], got ", share);
    }
    const auto heads = static_cast<double>(scores.induction.num_heads());
    return static_cast<std::size_t>(round_half_even(share * heads));
  }
};
static_assert(HeadPolicy<Policy, Scores>);

}  // namespace headwise::inline v0::razor_attention
