// SPDX-License-Identifier: MIT
/// @file prefill.hpp
/// Prefill on the CPU: many queries, causal. A compute problem for heads that look far, O(n x
/// window) for those that do not.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "headwise/attention/cpu/query_rows.hpp"

namespace headwise::inline v0 {

/// Queries of one prefill task: as many as make about 384 query rows with their group. Measured
/// with AVX-512: 192, 256, 384 rows run at 0.71, 0.73, 0.75 of the FMA peak, for they share the
/// packing of a block; their q, scores and sums are 490 KiB, about a second-level cache.
constexpr std::int64_t prefill_tile_queries(int group_size) {
  return std::max(1, 384 / group_size);
}

/// Floats of scratch that `prefill_tile` needs for up to `prefill_tile_queries` queries, 64-byte
/// aligned, one per thread.
constexpr std::size_t prefill_scratch_floats(int group_size, int k_dim, int v_dim) {
  const auto rows = static_cast<std::size_t>(prefill_tile_queries(group_size)) *
                    static_cast<std::size_t>(group_size);
  return detail::query_scratch_floats(rows, k_dim) + detail::query_state_floats(rows, v_dim) +
         detail::packed_block_floats(k_dim, v_dim);
}

/// Attends queries [query_begin, query_end) of the step, for all query heads of the group, and
/// writes their output rows.
///
/// Blocks of 64 rows are packed to floats once and shared by all query rows of the tile; blocks
/// that no query of the tile sees are not touched. 2 (k_dim + v_dim) flop a visible row and query
/// row.
/// @param query_end  at most query_begin + prefill_tile_queries(group_size)
/// @param scratch  [prefill_scratch_floats], 64-byte aligned
template <class Isa, class Format>
void prefill_tile(const HeadProblem<Format>& problem, std::int64_t query_begin,
                  std::int64_t query_end, float* scratch) noexcept {
  if (query_begin >= query_end) return;
  const auto& past = problem.past;
  const auto num_rows = static_cast<std::size_t>(query_end - query_begin) *
                        static_cast<std::size_t>(problem.group_size);
  float* state = scratch + detail::query_scratch_floats(num_rows, past.shape.k_dim);
  float* packed = state + detail::query_state_floats(num_rows, past.shape.v_dim);

  auto queries = detail::load_queries<Isa>(problem, query_begin, query_end, scratch, state);
  for (;; queries.weight = detail::safe_weight(problem)) {
    detail::reset_state<Isa>(queries, past.compensation);
    for (const KvRun& run : past.runs()) {
      detail::for_each_seen(queries.window, queries.first_query, queries.last_query(),
                            run.first_pos, run.count, [&](std::int64_t first, std::int64_t last) {
                              detail::for_each_block(
                                  past, run.first_slot + first, run.first_pos + first, last - first,
                                  [&](const detail::StoredRows& rows) {
                                    detail::attend_block<Isa, false>(
                                        queries, detail::pack_block<Isa>(past, rows, packed));
                                  });
                            });
    }
    detail::attend_own_rows<Isa>(problem, queries, packed);

    bool finite = true;
    std::ptrdiff_t row = 0;
    for (std::int64_t i = query_begin; i < query_end; ++i) {
      for (int g = 0; g < problem.group_size; ++g, ++row) {
        finite &= detail::finish_row<Isa>(queries, row, problem.out.row(i, g));
      }
    }
    if (finite || queries.weight != 1.0F) return;
  }
}

}  // namespace headwise::inline v0
