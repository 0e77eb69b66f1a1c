// SPDX-License-Identifier: MIT
/// @file decode.hpp
/// Decode on the CPU: a few queries over many stored rows. A memory problem.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "headwise/attention/cpu/query_rows.hpp"

namespace headwise::inline v0 {

/// The part of one KV head's decode that one task does.
struct DecodeSplit {
  std::int64_t begin = 0;  ///< first row of the past, counted through the runs in their order
  std::int64_t end = 0;    ///< one after the last; at most past.num_rows()
  /// Does this split also do the step's own rows, the compensation row and the sinks? Exactly one
  /// must.
  bool own_rows = false;
};

/// Floats of scratch that `decode_split` needs, one per thread, 64-byte aligned.
/// @param num_rows  query rows: num_queries * group_size
constexpr std::size_t decode_scratch_floats(std::int64_t num_rows, int k_dim, int v_dim) {
  return detail::query_scratch_floats(static_cast<std::size_t>(num_rows), k_dim) +
         detail::packed_block_floats(k_dim, v_dim);
}

/// Floats of the partial result of one split; a multiple of 16.
constexpr std::size_t decode_partial_floats(std::int64_t num_rows, int v_dim) {
  return detail::query_state_floats(static_cast<std::size_t>(num_rows), v_dim);
}

namespace detail {

/// In place where the format's pages hold tiles, else packed.
/// @param packed  [packed_block_floats]
template <class Isa, class Format>
void attend_stored_rows(const QueryRows& queries, const KvView<Format>& past,
                        const StoredRows& rows, [[maybe_unused]] float* packed) noexcept {
  if constexpr (TiledInPlace<Format>) {
    attend_block<Isa, true>(queries, block_in_place<Isa>(past, rows));
  } else {
    attend_block<Isa, false>(queries, pack_block<Isa>(past, rows, packed));
  }
}

/// Calls `fn(StoredRows)` for the blocks of a split of the past that some of the queries see.
template <class Format, class Fn>
HEADWISE_ALWAYS_INLINE void for_each_stored_block(const QueryRows& queries,
                                                  const KvView<Format>& past,
                                                  const DecodeSplit& split, Fn&& fn) {
  std::int64_t run_begin = 0;
  for (const KvRun& run : past.runs()) {
    const std::int64_t begin = std::clamp(split.begin - run_begin, std::int64_t{0}, run.count);
    const std::int64_t end = std::clamp(split.end - run_begin, begin, run.count);
    run_begin += run.count;
    for_each_seen(queries.window, queries.first_query, queries.last_query(), run.first_pos + begin,
                  end - begin, [&](std::int64_t first, std::int64_t last) {
                    const std::int64_t row = begin + first;
                    for_each_block(past, run.first_slot + row, run.first_pos + row, last - first,
                                   fn);
                  });
  }
}

/// Attends all of `queries` over a split: each row's softmax state, its out divided by its sum.
/// Where a row comes out infinite or NaN, all is done again: V that some query does not see is
/// looked at first (infinity times 0 is NaN), and then, if that was not it, rows are weighted.
/// @param attend_rows  `(StoredRows)`: attends queries over a block of stored rows
/// @param output_of  `(row)`: where a query row's out belongs; may be its place in the state
/// @param packed  [packed_block_floats]
template <class Isa, class Format, class AttendRows, class OutputOf>
HEADWISE_ALWAYS_INLINE void attend_split(const HeadProblem<Format>& problem, QueryRows& queries,
                                         const DecodeSplit& split, float* packed,
                                         AttendRows&& attend_rows, OutputOf&& output_of) {
  AsStored<Format> as_stored;
  CompensationRow mean = split.own_rows ? problem.past.compensation : CompensationRow{};
  if (mean.count > 0) mean.k_mean = as_stored(mean.k_mean, queries.k_dim);
  for (;;) {
    reset_state<Isa>(queries);
    for_each_stored_block(queries, problem.past, split, attend_rows);
    if (split.own_rows) {
      attend_own_rows<Isa>(problem, queries, packed);
      add_rows_that_all_see<Isa>(queries, mean, problem.softmax.sinks);
    }

    bool again = false;
    for (std::ptrdiff_t row = 0; row < queries.num_rows(); ++row) {
      if (finish_row<Isa>(queries, row, output_of(row)) || queries.weighted) continue;
      if (queries.exact) queries.weight[row] = safe_weight(problem);
      again = true;
    }
    if (!again) return;
    queries.weighted = queries.exact;
    queries.exact = true;
  }
}

}  // namespace detail

/// Attends all queries of the step, and all query heads of the group, over one split of the rows.
///
/// Each K and V row of the split is read once: as many bytes as the format stores of it, which is
/// the bound up to a group of about 4 on AVX2; beyond, 2 (k_dim + v_dim) flop a row and query row
/// are. The result depends on the split alone, never on threads or other sequences.
/// @param partial  [decode_partial_floats], 64-byte aligned: the split's softmax states
/// @param scratch  [decode_scratch_floats], 64-byte aligned
template <class Isa, class Format>
void decode_split(const HeadProblem<Format>& problem, DecodeSplit split, float* partial,
                  float* scratch) noexcept {
  const auto& past = problem.past;
  auto queries = detail::load_queries<Isa>(problem, 0, problem.num_queries, scratch, partial);
  if (queries.num_rows() == 0) return;
  float* packed = scratch + detail::query_scratch_floats(
                                static_cast<std::size_t>(queries.num_rows()), past.shape.k_dim);
  queries.scaled = packed;  // free while stored rows are read in place

  detail::attend_split<Isa>(
      problem, queries, split, packed,
      [&](const detail::StoredRows& rows) {
        detail::attend_stored_rows<Isa>(queries, past, rows, packed);
      },
      [&](std::ptrdiff_t row) { return queries.out + row * queries.v_dim; });
}

/// Merges the partial results of a head's splits, in index order, and writes the head's output
/// rows.
/// @param partials  num_splits partial results, the first of which is overwritten
/// @param stride  floats from one to the next; at least decode_partial_floats
template <class Isa, class Format>
void merge_splits(const HeadProblem<Format>& problem, float* partials, std::size_t stride,
                  std::int64_t num_splits) noexcept {
  const int v_dim = problem.past.shape.v_dim;
  const auto num_rows =
      static_cast<std::size_t>(problem.num_queries) * static_cast<std::size_t>(problem.group_size);
  const std::size_t line = detail::round_up_to_line(num_rows);
  const auto state = [&](std::int64_t split, std::size_t row) {
    float* partial = partials + static_cast<std::size_t>(split) * stride;
    float* out = partial + 2 * line + row * static_cast<std::size_t>(v_dim);
    return SoftmaxState{partial[row], partial[line + row], out};
  };

  problem.out.visit([&](auto out) {
    std::size_t row = 0;
    for (std::int64_t i = 0; i < problem.num_queries; ++i) {
      for (int g = 0; g < problem.group_size; ++g, ++row) {
        SoftmaxState whole = state(0, row);
        for (std::int64_t s = 1; s < num_splits; ++s) merge<Isa>(whole, state(s, row), v_dim);
        write_output<Isa>(whole, out.row(i, g), v_dim);
      }
    }
  });
}

}  // namespace headwise::inline v0
