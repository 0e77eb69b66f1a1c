// SPDX-License-Identifier: MIT
/// @file window.hpp
/// The window rule: which keys a streaming head's query may see.
#pragma once

#include <compare>
#include <cstdint>
#include <limits>

#include "headwise/core/checked.hpp"
#include "headwise/core/position.hpp"

namespace headwise::inline v0 {

/// A query at `i` sees the key at `j` iff `j <= i and (i < from or j < sink or i - j < recent)`.
///
/// `recent` counts the current token (INCL). Published caches that keep `recent` past tokens
/// besides the current one (EXCL) are `Window::from_exclusive`.
struct Window {
  /// A `recent` that never forgets: the rule of a retrieval head.
  static constexpr std::int64_t kUnbounded = std::numeric_limits<std::int64_t>::max();

  std::int64_t sink = 0;             ///< first tokens of the sequence, always seen
  std::int64_t recent = kUnbounded;  ///< newest tokens seen, the query's own included; >= 1
  std::int64_t from = 0;             ///< queries at positions below it see everything

  /// The rule of a head that sees its whole past.
  static constexpr Window everything() { return {0, kUnbounded}; }

  /// From the convention "`past` earlier tokens plus the current one" (DuoAttention's and RLKV's
  /// HuggingFace caches in decode, StreamingLLM): EXCL(R) == INCL(R + 1).
  /// @throws ConfigError for a sink outside [0, kMaxTokens], or a past outside [0, kMaxTokens).
  static constexpr Window from_exclusive(std::int64_t sink, std::int64_t past) {
    return {detail::checked_range(sink, 0, kMaxTokens, "sink"),
            detail::checked_range(past, 0, kMaxTokens - 1, "past") + 1};
  }

  constexpr bool bounded() const { return recent != kUnbounded; }

  constexpr bool sees(Pos query, Pos key) const {
    return key <= query && (query.value < from || key.value < sink || query - key < recent);
  }

  /// The oldest position that the recent part reaches from `query`; sinks lie before or in it.
  constexpr Pos oldest_recent(Pos query) const {
    const bool forgets = bounded() && query.value >= recent && query.value >= from;
    return forgets ? Pos{query.value - recent + 1} : Pos{0};
  }

  friend constexpr auto operator<=>(Window, Window) = default;
  friend constexpr bool operator==(Window, Window) = default;  // nvcc 13 does not derive it
};

}  // namespace headwise::inline v0
