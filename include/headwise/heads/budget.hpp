// SPDX-License-Identifier: MIT
/// @file budget.hpp
/// What one KV head may keep. A new kind is one type here and one file in cache/keep/; what else
/// must know of it does not compile until it does.
#pragma once

#include <algorithm>
#include <compare>
#include <cstdint>
#include <variant>

#include "headwise/core/check.hpp"
#include "headwise/core/checked.hpp"
#include "headwise/core/window.hpp"

namespace headwise::inline v0 {

/// A retrieval head: every token. RLKV's "reasoning heads" are retrieval heads here.
struct KeepEverything {
  friend constexpr auto operator<=>(KeepEverything, KeepEverything) = default;
  friend constexpr bool operator==(KeepEverything,
                                   KeepEverything) = default;  // nvcc 13 does not derive it
};

/// A streaming head: the window rule of core/window.hpp.
struct KeepWindow {
  Window window;  ///< bounded: recent >= 1, sink >= 0
  /// `recent` of prompt chunks where it is not decode's: the window is wider while a prompt is read
  /// (LServe), or the published server counts differently (RLKV); 0: the same. The head's ring
  /// holds the wider of the two.
  std::int64_t prompt_recent = 0;

  /// The rule of prompt chunks.
  constexpr Window prompt_window() const {
    return prompt_recent == 0 ? window : Window{window.sink, prompt_recent};
  }
  friend constexpr auto operator<=>(KeepWindow, KeepWindow) = default;
  friend constexpr bool operator==(KeepWindow, KeepWindow) = default;  // nvcc 13 does not derive it
};

/// RazorAttention's non-retrieval head (arXiv:2407.15891, Algorithm 1): `sink` first tokens, a
/// buffer of `recent(n)` newest ones that grows with the context, and one compensation row that
/// stands for all the others. The defaults are the paper's N0, S0 and C.
struct KeepGrowingWindow {
  std::int64_t sink = 4;           ///< N0, tokens
  std::int64_t min_recent = 4000;  ///< S0, tokens; >= 1
  std::int64_t divisor = 5;        ///< C; >= 1

  /// L_h = max(S0, N / C), in tokens, for a context of `n`.
  constexpr std::int64_t recent(std::int64_t n) const { return std::max(min_recent, n / divisor); }

  /// Nd, the tokens of a context of `n` that the compensation row stands for; 0: there is no row.
  /// The cache folds whole pages, and so may hold up to a page of them back.
  constexpr std::int64_t dropped(std::int64_t n) const {
    return std::max<std::int64_t>(0, n - sink - recent(n));
  }

  friend constexpr auto operator<=>(KeepGrowingWindow, KeepGrowingWindow) = default;
  friend constexpr bool operator==(KeepGrowingWindow,
                                   KeepGrowingWindow) = default;  // nvcc 13 does not derive it
};

/// A head that streams from a length on: queries at positions below `from` see everything, later
/// ones the window. Short contexts stay exact; long ones cost a window. (RTP-LLM's head-wise
/// attention, from 16384 tokens on, decides once for a prompt, by its length.) In
/// PrefillMode::kChunkCausal a prompt chunk's queries follow its first one.
struct KeepWindowFrom {
  KeepWindow keep;        ///< from position `from` on
  std::int64_t from = 1;  ///< tokens; >= 1

  friend constexpr auto operator<=>(const KeepWindowFrom&, const KeepWindowFrom&) = default;
  friend constexpr bool operator==(const KeepWindowFrom&,
                                   const KeepWindowFrom&) = default;  // nvcc 13 does not derive it
};

/// A head whose rows are chosen by what was read (SnapKV and its family): every token, until a
/// selection between two steps says which of them stay; every token after that, until the next one.
struct KeepSelected {
  /// Rows that selections are to leave of a long context; 0: not known, all of them. A forecast for
  /// estimates: how many really stay is the selection's choice, for each head and time anew.
  std::int64_t tokens = 0;

  friend constexpr auto operator<=>(KeepSelected, KeepSelected) = default;
  friend constexpr bool operator==(KeepSelected,
                                   KeepSelected) = default;  // nvcc 13 does not derive it
};

/// What one KV head may keep; default: everything.
using HeadBudget =
    std::variant<KeepEverything, KeepWindow, KeepGrowingWindow, KeepWindowFrom, KeepSelected>;

/// Whether the head keeps everything.
constexpr bool is_retrieval(const HeadBudget& budget) {
  return std::holds_alternative<KeepEverything>(budget);
}

}  // namespace headwise::inline v0

namespace headwise::inline v0::detail {

/// A visitor without a case for every kind does not compile.
struct CheckBudget {
  constexpr void operator()(KeepEverything) const {}
  constexpr void operator()(const KeepWindow& keep) const {
    checked_range(keep.window.sink, 0, kMaxTokens, "sink");
    checked_range(keep.prompt_recent, 0, kMaxTokens, "prompt_recent");
    if (keep.window.from != 0) {
      fail<ConfigError>("a window's from must be 0 in a budget, got ", keep.window.from,
                        ": a head that streams from a length on is KeepWindowFrom");
    }
    if (!keep.window.bounded()) return;
    checked_range(keep.window.recent, 1, kMaxTokens, "recent, which counts the current token,");
  }
  constexpr void operator()(const KeepGrowingWindow& keep) const {
    checked_range(keep.sink, 0, kMaxTokens, "sink");
    checked_range(keep.min_recent, 1, kMaxTokens, "min_recent");
    checked_range(keep.divisor, 1, kMaxTokens, "divisor");
  }
  constexpr void operator()(const KeepWindowFrom& keep) const {
    (*this)(keep.keep);
    checked_range(keep.from, 1, kMaxTokens, "from");
  }
  constexpr void operator()(KeepSelected keep) const {
    checked_range(keep.tokens, 0, kMaxTokens, "tokens of a selection");
  }
};

}  // namespace headwise::inline v0::detail

namespace headwise::inline v0 {

/// What HeadPlan::set() asks of a budget: sinks from 0, everything else from 1, to kMaxTokens; an
/// unbounded window's `recent` is Window::kUnbounded.
/// @throws ConfigError with name, limits and value of what is outside.
constexpr void check_budget(const HeadBudget& budget) { std::visit(detail::CheckBudget{}, budget); }

}  // namespace headwise::inline v0
