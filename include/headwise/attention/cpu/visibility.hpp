// SPDX-License-Identifier: MIT
/// @file visibility.hpp
/// Which rows of a block a query sees: the window rule in block coordinates, without a mask tensor.
#pragma once

#include <algorithm>
#include <cstdint>

#include "headwise/core/config.hpp"
#include "headwise/core/position.hpp"
#include "headwise/core/window.hpp"

namespace headwise::inline v0::detail {

/// Rows [first, hole_first) (the sinks) and [hole_last, last) (the recent ones) of a block.
struct VisibleRows {
  int first = 0;
  int hole_first = 0;
  int hole_last = 0;
  int last = 0;

  HEADWISE_ALWAYS_INLINE int count() const { return (hole_first - first) + (last - hole_last); }
};

/// @param row0  position of block row 0; may be negative where the block's rows begin at `first` >
/// 0
/// @param first, last  the block's rows that exist; their positions follow one another
HEADWISE_ALWAYS_INLINE VisibleRows visible_rows(const Window& window, Pos query, Pos row0,
                                                int first, int last) {
  const auto within = [&](std::int64_t row, int low, int high) {
    return static_cast<int>(
        std::clamp(row, static_cast<std::int64_t>(low), static_cast<std::int64_t>(high)));
  };
  VisibleRows rows;
  rows.first = first;
  rows.last = within(query - row0 + 1, first, last);
  rows.hole_first = within(window.sink - row0.value, first, rows.last);
  rows.hole_last = within(window.oldest_recent(query) - row0, rows.hole_first, rows.last);
  return rows;
}

/// Queries [first, last) of a step: those that see any row of a block.
struct SeeingQueries {
  int first = 0;
  int last = 0;
};

/// Of `num_queries` queries from `first_query` on, those that may see a row at a position in
/// [oldest, newest].
HEADWISE_ALWAYS_INLINE SeeingQueries seeing_queries(const Window& window, Pos first_query,
                                                    int num_queries, Pos oldest, Pos newest) {
  const auto within = [&](std::int64_t query, int low) {
    return static_cast<int>(std::clamp<std::int64_t>(query, low, num_queries));
  };
  SeeingQueries queries;
  queries.first = within(oldest - first_query, 0);
  const bool forgotten = window.bounded() && oldest.value >= window.sink;
  queries.last = num_queries;
  if (forgotten) {
    const Pos end{std::max(newest.value + window.recent, window.from)};
    queries.last = within(end - first_query, queries.first);
  }
  return queries;
}

/// Calls `fn(begin, end)` for the at most two ranges of rows that some query of [oldest, newest]
/// may see, of `count` rows at positions from `first_pos` on.
template <class Fn>
HEADWISE_ALWAYS_INLINE void for_each_seen(const Window& window, Pos oldest, Pos newest,
                                          Pos first_pos, std::int64_t count, Fn&& fn) {
  const std::int64_t zero = 0;
  const std::int64_t end = std::clamp(newest - first_pos + 1, zero, count);
  const std::int64_t sinks = std::clamp(window.sink - first_pos.value, zero, end);
  const std::int64_t recent = std::clamp(window.oldest_recent(oldest) - first_pos, sinks, end);
  if (sinks == recent) {
    if (end > 0) fn(zero, end);
  } else {
    if (sinks > 0) fn(zero, sinks);
    if (end > recent) fn(recent, end);
  }
}

}  // namespace headwise::inline v0::detail
