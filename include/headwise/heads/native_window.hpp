// SPDX-License-Identifier: MIT
/// @file native_window.hpp
/// A budget in a layer whose model has a sliding window of its own: the smaller of the two.
#pragma once

#include <algorithm>
#include <cstdint>
#include <variant>

#include "headwise/core/check.hpp"
#include "headwise/heads/budget.hpp"

namespace headwise::inline v0::detail {

/// A visitor without a case for every kind does not compile.
struct WithinWindow {
  std::int64_t window;  // tokens, the query's own included

  HeadBudget operator()(KeepEverything) const { return KeepWindow{{0, window}}; }
  HeadBudget operator()(const KeepWindow& keep) const {
    const std::int64_t recent = std::min(keep.window.recent, window);
    const std::int64_t prompt_recent = std::min(keep.prompt_window().recent, window);
    return KeepWindow{{0, recent}, prompt_recent == recent ? 0 : prompt_recent};
  }
  HeadBudget operator()(const KeepGrowingWindow& keep) const {
    if (keep.min_recent < window) {
      fail<ConfigError>("min_recent of a growing window (", keep.min_recent,
                        ") must be at least the layer's own window (", window,
                        "): its compensation row would stand for tokens that the layer sees");
    }
    return KeepWindow{{0, window}};
  }
  HeadBudget operator()(const KeepWindowFrom& keep) const { return (*this)(keep.keep); }
  HeadBudget operator()(KeepSelected) const { return (*this)(KeepEverything{}); }
};

}  // namespace headwise::inline v0::detail

namespace headwise::inline v0 {

/// What a head of this budget keeps in a layer whose queries see `sliding_window` newest tokens
/// (LayerShape::sliding_window): a window without sinks, as large as the smaller of the two, so
/// that no query sees what either hides. Sinks of the budget are given up, for they leave the
/// layer's own window sooner or later; so is a length to stream from. Nothing is selected from such
/// a head: it has the window.
/// @param sliding_window  in [1, kMaxTokens]; 0: there is none, the budget as it is
/// @throws ConfigError for a growing window that begins to fold within the layer's own.
inline HeadBudget within_window(const HeadBudget& budget, std::int64_t sliding_window) {
  if (sliding_window == 0) return budget;
  return std::visit(detail::WithinWindow{sliding_window}, budget);
}

}  // namespace headwise::inline v0
