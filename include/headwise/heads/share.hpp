// SPDX-License-Identifier: MIT
/// @file share.hpp
/// What a plan keeps of a context, in tokens: the memory formulas of the papers.
#pragma once

#include <cstdint>
#include <variant>

#include "headwise/heads/budget.hpp"
#include "headwise/heads/plan.hpp"

namespace headwise::inline v0 {

/// Rows that one head keeps of a context of `n` tokens, a compensation row included. Paging,
/// rollback slack and bytes are the cache's: see its estimate.
constexpr std::int64_t num_kept(const HeadBudget& budget, std::int64_t n) {
  if (const auto* keep = std::get_if<KeepWindow>(&budget)) {
    const Window window = keep->window;  // sink + recent may overflow: recent can be unbounded
    return n - window.sink <= window.recent ? n : window.sink + window.recent;
  }
  if (const auto* growing = std::get_if<KeepGrowingWindow>(&budget)) {
    const std::int64_t dropped = growing->dropped(n);
    return dropped > 0 ? n - dropped + 1 : n;
  }
  return n;
}

/// Rows kept by all heads over the rows of a full cache, at a context of `n` >= 1 tokens.
/// DuoAttention: f + (1 - f) min(n, S + R) / n; RazorAttention: f + (1 - f) (N0 + L(n) + 1) / n,
/// with f the share of retrieval heads. Its inverse bounds the decode speed-up (RLKV's "theory").
inline double kept_share(const HeadPlan& plan, std::int64_t n) {
  double kept = 0.0;
  for (const HeadBudget& budget : plan.budgets()) kept += static_cast<double>(num_kept(budget, n));
  return kept / (static_cast<double>(plan.num_heads()) * static_cast<double>(n));
}

}  // namespace headwise::inline v0
