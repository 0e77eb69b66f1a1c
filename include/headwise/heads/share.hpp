// SPDX-License-Identifier: MIT
/// @file share.hpp
/// What a plan keeps of a context, in tokens: the memory formulas of the papers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <variant>

#include "headwise/heads/budget.hpp"
#include "headwise/heads/plan.hpp"

namespace headwise::inline v0::detail {

/// A visitor without a case for every kind does not compile.
struct NumKept {
  std::int64_t n;
  constexpr std::int64_t operator()(KeepEverything) const { return n; }
  constexpr std::int64_t operator()(const KeepWindow& keep) const {
    Window window = keep.window;  // sink + recent may overflow: recent can be unbounded
    window.recent = std::max(window.recent, keep.prompt_window().recent);  // the ring's
    return n - window.sink <= window.recent ? n : window.sink + window.recent;
  }
  constexpr std::int64_t operator()(const KeepGrowingWindow& keep) const {
    const std::int64_t dropped = keep.dropped(n);
    return dropped > 0 ? n - dropped + 1 : n;
  }
  constexpr std::int64_t operator()(const KeepWindowFrom& keep) const {
    return n <= keep.from ? n : (*this)(keep.keep);  // the newest query is at n - 1
  }
  constexpr std::int64_t operator()(KeepSelected keep) const {
    return keep.tokens == 0 ? n : std::min(n, keep.tokens);
  }
};

}  // namespace headwise::inline v0::detail

namespace headwise::inline v0 {

/// Rows that one head keeps of a context of `n` tokens, a compensation row included; in [0, n].
/// Paging, rollback slack and bytes are the cache's: see its estimate.
/// @throws ConfigError for `n` outside [0, kMaxTokens], or a budget out of range (check_budget()).
constexpr std::int64_t num_kept(const HeadBudget& budget, std::int64_t n) {
  check_budget(budget);
  detail::checked_range(n, 0, kMaxTokens, "a context");
  return std::visit(detail::NumKept{n}, budget);
}

/// Rows kept by all heads over the rows of a full cache, at a context of `n` >= 1 tokens.
/// @throws ConfigError for `n` outside [1, kMaxTokens].
/// DuoAttention: f + (1 - f) min(n, S + R) / n; RazorAttention: f + (1 - f) (N0 + L(n) + 1) / n,
/// with f the share of retrieval heads. Its inverse bounds the decode speed-up (RLKV's "theory").
inline double kept_share(const HeadPlan& plan, std::int64_t n) {
  detail::checked_range(n, 1, kMaxTokens, "a context");
  double kept = 0.0;
  for (const HeadBudget& budget : plan.budgets()) kept += static_cast<double>(num_kept(budget, n));
  return kept / (static_cast<double>(plan.num_heads()) * static_cast<double>(n));
}

}  // namespace headwise::inline v0
