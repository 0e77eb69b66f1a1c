// SPDX-License-Identifier: MIT
/// @file pinned.hpp
/// Heads that must keep everything, whatever another policy says of them.
#pragma once

#include <vector>

#include "headwise/core/check.hpp"
#include "headwise/heads/plan.hpp"
#include "headwise/policies/policy.hpp"

namespace headwise::inline v0::pinned {

/// Composes with any plan: `pinned::Policy{{{13, 2}}}.plan(select(scores, options))`. The other
/// heads keep the budgets they had, so that the plan's sparsity may fall.
struct Policy {
  std::vector<HeadId> heads;  ///< each may be named more than once

  /// @throws ConfigError for a head that the plan does not have.
  HeadPlan plan(HeadPlan plan) const {
    for (const HeadId head : heads) {
      if (head.layer < 0 || head.layer >= plan.num_layers()) {
        fail<ConfigError>("pinned layer ", head.layer, " is not in [0, ", plan.num_layers(), ")");
      }
      if (head.kv_head < 0 || head.kv_head >= plan.num_kv_heads(head.layer)) {
        fail<ConfigError>("pinned KV head ", head.kv_head, " of layer ", head.layer,
                          " is not in [0, ", plan.num_kv_heads(head.layer), ")");
      }
      plan.set(head.layer, head.kv_head, KeepEverything{});
    }
    return plan;
  }
};
static_assert(HeadPolicy<Policy, HeadPlan>);

}  // namespace headwise::inline v0::pinned
