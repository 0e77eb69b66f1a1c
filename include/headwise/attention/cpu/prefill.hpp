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

/// Attends queries [query_begin, query_end) of the step, for all query heads of the group, over one
/// split of the rows: what decode_split does, for more queries than make it a memory problem.
///
/// Blocks of 64 rows are packed to floats once and shared by all query rows; blocks that no query
/// of the tile sees are not touched. 2 (k_dim + v_dim) flop a visible row and query row.
/// @param query_end  at most query_begin + prefill_tile_queries(group_size)
/// @param partial  [decode_partial_floats of these queries' rows], 64-byte aligned: see
///   merge_splits
/// @param scratch  [prefill_scratch_floats], 64-byte aligned
template <class Isa, class Format>
void prefill_split(const HeadProblem<Format>& problem, std::int64_t query_begin,
                   std::int64_t query_end, DecodeSplit split, float* partial,
                   float* scratch) noexcept {
  if (query_begin >= query_end) return;
  auto queries = detail::load_queries<Isa>(problem, query_begin, query_end, scratch, partial);
  float* packed =
      scratch + detail::query_scratch_floats(static_cast<std::size_t>(queries.num_rows()),
                                             problem.past.shape.k_dim);
  detail::attend_split<Isa>(
      problem, queries, split, packed,
      [&](const detail::StoredRows& rows) {
        detail::attend_block<Isa, false>(queries,
                                         detail::pack_block<Isa>(problem.past, rows, packed));
      },
      [&](std::ptrdiff_t row) { return queries.out + row * queries.v_dim; });
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

  auto queries = detail::load_queries<Isa>(problem, query_begin, query_end, scratch, state);
  detail::attend_split<Isa>(
      problem, queries, {0, past.num_rows(), true}, packed,
      [&](const detail::StoredRows& rows) {
        detail::attend_block<Isa, false>(queries, detail::pack_block<Isa>(past, rows, packed));
      },
      [&, in_place = problem.out.type() == IoType::kF32](std::ptrdiff_t row) {
        if (!in_place) return queries.out + row * queries.v_dim;
        return problem.out.row(query_begin + row / problem.group_size,
                               static_cast<int>(row % problem.group_size));
      });
  if (problem.out.type() == IoType::kF32) return;
  problem.out.visit([&](auto out) {  // rounded once a row is final, while it is near
    using O = simd::Ops<Isa>;
    for (std::ptrdiff_t row = 0; row < queries.num_rows(); ++row) {
      const float* from = queries.out + row * queries.v_dim;
      auto* to = out.row(query_begin + row / problem.group_size, row % problem.group_size);
      for (int d = 0; d < queries.v_dim; d += O::kWidth) O::store(to + d, O::load(from + d));
    }
  });
}

}  // namespace headwise::inline v0
