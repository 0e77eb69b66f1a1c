// SPDX-License-Identifier: MIT
/// @file prefill.hpp
/// Prefill on the CPU: many queries, causal. A compute problem for heads that look far, O(n x
/// window) for those that do not.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "headwise/attention/cpu/decode.hpp"
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

namespace detail {

/// Attends queries over the rows of a split. Blocks of 64 rows are packed to floats once and shared
/// by all queries; blocks that none of them sees are not touched.
/// @param packed  [packed_block_floats]
/// @param to  to(row): where a query row's output goes, [v_dim]
template <class Isa, class Format, class RowOut>
void attend_split_packed(const HeadProblem<Format>& problem, QueryRows queries,
                         const DecodeSplit& split, float* packed, RowOut&& to) noexcept {
  const auto& past = problem.past;
  for (;; queries.weight = safe_weight(problem)) {
    reset_state<Isa>(queries, split.own_rows ? past.compensation : CompensationRow{});
    for_each_stored_block(queries, past, split, [&](const StoredRows& rows) {
      attend_block<Isa, false>(queries, pack_block<Isa>(past, rows, packed));
    });
    if (split.own_rows) attend_own_rows<Isa>(problem, queries, packed);

    bool finite = true;
    for (std::ptrdiff_t row = 0; row < queries.num_rows(); ++row) {
      finite &= finish_row<Isa>(queries, row, to(row));
    }
    if (finite || queries.weight != 1.0F) return;
  }
}

}  // namespace detail

/// Attends queries [query_begin, query_end) of the step, for all query heads of the group, over one
/// split of the rows: what decode_split does, for more queries than make it a memory problem.
///
/// 2 (k_dim + v_dim) flop a visible row and query row.
/// @param query_end  at most query_begin + prefill_tile_queries(group_size)
/// @param partial  [decode_partial_floats of these queries' rows], 64-byte aligned: see
///   merge_splits
/// @param scratch  [prefill_scratch_floats], 64-byte aligned
template <class Isa, class Format>
void prefill_split(const HeadProblem<Format>& problem, std::int64_t query_begin,
                   std::int64_t query_end, DecodeSplit split, float* partial,
                   float* scratch) noexcept {
  if (query_begin >= query_end) return;
  const auto queries = detail::load_queries<Isa>(problem, query_begin, query_end, scratch, partial);
  float* packed =
      scratch + detail::query_scratch_floats(static_cast<std::size_t>(queries.num_rows()),
                                             problem.past.shape.k_dim);
  detail::attend_split_packed<Isa>(problem, queries, split, packed, [&](std::ptrdiff_t row) {
    return queries.out + row * queries.v_dim;
  });
}

/// Attends queries [query_begin, query_end) of the step, for all query heads of the group, over
/// everything that they see, and writes their output rows.
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

  const auto queries = detail::load_queries<Isa>(problem, query_begin, query_end, scratch, state);
  detail::attend_split_packed<Isa>(
      problem, queries, {0, past.num_rows(), true}, packed, [&](std::ptrdiff_t row) {
        return problem.out.row(query_begin + row / problem.group_size, row % problem.group_size);
      });
}

}  // namespace headwise::inline v0
