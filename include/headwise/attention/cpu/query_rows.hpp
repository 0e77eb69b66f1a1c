// SPDX-License-Identifier: MIT
/// @file query_rows.hpp
/// QueryRows: the query rows of one KV head in flight, and what one block of K and V does to them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "headwise/attention/cpu/pack.hpp"
#include "headwise/attention/cpu/tile_product.hpp"
#include "headwise/attention/cpu/visibility.hpp"
#include "headwise/attention/problem.hpp"
#include "headwise/attention/state.hpp"
#include "headwise/core/config.hpp"
#include "headwise/simd/math.hpp"
#include "headwise/simd/simd.hpp"

namespace headwise::inline v0::detail {

/// `num_queries` x `group_size` query rows that share a KV head, in the order of the step's q, with
/// the softmax state of each. K and V are read once for all of them.
struct QueryRows {
  float* q = nullptr;          ///< [k_dim / 64][rows][64], times the softmax scale
  float* scores = nullptr;     ///< [rows][64]: one block's scores, then its probabilities
  float* lane_sums = nullptr;  ///< [rows][16]: what adds up to sum, once all blocks are done
  float* rescale = nullptr;    ///< [rows]: what the block does to the earlier blocks' sums
  float* max = nullptr;        ///< [rows]: SoftmaxState, as arrays
  float* sum = nullptr;        ///< [rows]
  float* out = nullptr;        ///< [rows][v_dim]

  Window window;
  Pos first_query;
  int num_queries = 0;
  int group_size = 0;
  int k_dim = 0;
  int v_dim = 0;

  HEADWISE_ALWAYS_INLINE int num_rows() const { return num_queries * group_size; }
  /// Floats from one panel of q to the next.
  HEADWISE_ALWAYS_INLINE std::ptrdiff_t q_stride() const {
    return static_cast<std::ptrdiff_t>(num_rows()) * kPanel;
  }
  HEADWISE_ALWAYS_INLINE Pos last_query() const { return first_query + (num_queries - 1); }
};

/// Arrays of one float a row start on cache lines.
constexpr std::size_t round_up_to_line(std::size_t floats) { return (floats + 15) / 16 * 16; }

/// The last panel of q may be wider than what is left of a row.
constexpr std::size_t round_up_to_panel(int k_dim) {
  return (static_cast<std::size_t>(k_dim) + kPanel - 1) / kPanel * kPanel;
}

/// Floats of q, scores, lane_sums and rescale.
constexpr std::size_t query_scratch_floats(std::size_t num_rows, int k_dim) {
  return num_rows * (round_up_to_panel(k_dim) + std::size_t{kBlockRows + kTile}) +
         round_up_to_line(num_rows);
}

/// Floats of max, sum and out.
constexpr std::size_t query_state_floats(std::size_t num_rows, int v_dim) {
  return 2 * round_up_to_line(num_rows) + num_rows * static_cast<std::size_t>(v_dim);
}

/// Queries [begin, end) of a problem, loaded into scratch.
/// @param scratch  [query_scratch_floats], 64-byte aligned
/// @param state  [query_state_floats], 64-byte aligned
template <class Isa, class Format>
QueryRows load_queries(const HeadProblem<Format>& problem, std::int64_t begin, std::int64_t end,
                       float* scratch, float* state) noexcept {
  using O = simd::Ops<Isa>;
  QueryRows rows;
  rows.window = problem.window;
  rows.first_query = problem.first_query + begin;
  rows.num_queries = static_cast<int>(end - begin);
  rows.group_size = problem.group_size;
  rows.k_dim = problem.past.shape.k_dim;
  rows.v_dim = problem.past.shape.v_dim;

  const auto num_rows = static_cast<std::size_t>(rows.num_rows());
  rows.q = scratch;
  rows.scores = rows.q + num_rows * round_up_to_panel(rows.k_dim);
  rows.lane_sums = rows.scores + num_rows * kBlockRows;
  rows.rescale = rows.lane_sums + num_rows * kTile;
  rows.max = state;
  rows.sum = rows.max + round_up_to_line(num_rows);
  rows.out = rows.sum + round_up_to_line(num_rows);

  const auto scale = O::broadcast(problem.scale);
  float* to = rows.q;
  for (std::int64_t i = begin; i < end; ++i) {
    for (int g = 0; g < rows.group_size; ++g, to += kPanel) {
      const float* q = problem.q.row(i, g);
      for (int d = 0; d < rows.k_dim; d += O::kWidth) {
        O::store(to + d / kPanel * rows.q_stride() + d % kPanel, O::mul(scale, O::load(q + d)));
      }
    }
  }
  return rows;
}

/// Before any row was seen.
template <class Isa>
void reset_state(const QueryRows& rows) noexcept {
  const int num_rows = rows.num_rows();
  std::fill_n(rows.max, num_rows, kNoScore);
  std::fill_n(rows.lane_sums, num_rows * kTile, 0.0F);
  std::fill_n(rows.out, static_cast<std::ptrdiff_t>(num_rows) * rows.v_dim, 0.0F);
}

/// As if the compensation row were the first row seen: it begins the softmax state as it is, with
/// score q.k_mean + ln(count), sum 1 and output v_mean.
template <class Isa>
void reset_state(const QueryRows& rows, const CompensationRow& row) noexcept {
  using O = simd::Ops<Isa>;
  reset_state<Isa>(rows);
  if (row.count <= 0) return;
  for (int r = 0; r < rows.num_rows(); ++r) {
    const float* q = rows.q + static_cast<std::ptrdiff_t>(r) * kPanel;
    float* out = rows.out + static_cast<std::ptrdiff_t>(r) * rows.v_dim;
    auto dot = O::zero();
    for (int d = 0; d < rows.k_dim; d += O::kWidth) {
      const auto x = O::load(q + d / kPanel * rows.q_stride() + d % kPanel);
      dot = O::fma(x, O::load(row.k_mean + d), dot);
    }
    rows.max[r] = O::reduce_add(dot) + std::log(static_cast<float>(row.count));
    rows.lane_sums[static_cast<std::ptrdiff_t>(r) * kTile] = 1.0F;
    for (int d = 0; d < rows.v_dim; d += O::kWidth) {
      O::store(out + d, O::load(row.v_mean + d));
    }
  }
}

/// After the last block: the sums of the softmax states.
template <class Isa>
void add_lanes(const QueryRows& rows) noexcept {
  using O = simd::Ops<Isa>;
  for (int r = 0; r < rows.num_rows(); ++r) {
    rows.sum[r] = O::reduce_add(O::load(rows.lane_sums + static_cast<std::ptrdiff_t>(r) * kTile));
  }
}

/// Turns one row of scores into exp(score - max) and updates that row's max and sums.
/// @param scores  [64]; whole tiles around [seen.first, seen.last) hold scores
/// @param rows_end  probabilities are needed up to here
/// @param lane_sums  [16] of the row, as many as the vector is wide are used: see add_lanes()
/// @return the factor by which what was summed so far shrinks
template <class Isa>
float softmax_row(float* scores, const VisibleRows& seen, int rows_end, float& max,
                  float* lane_sums) noexcept {
  using O = simd::Ops<Isa>;
  using V = typename O::V;
  if (seen.count() == 0) {
    std::fill(scores + seen.first, scores + rows_end, 0.0F);
    return 1.0F;
  }
  const int begin = seen.first / kTile * kTile;
  const int end = (rows_end + kTile - 1) / kTile * kTile;
  // What is hidden, or no row at all, is replaced rather than computed with: it may be NaN.
  std::fill(scores + begin, scores + seen.first, kNoScore);
  std::fill(scores + seen.hole_first, scores + seen.hole_last, kNoScore);
  std::fill(scores + seen.last, scores + end, kNoScore);

  V top = O::load(scores + begin);
  for (int i = begin + O::kWidth; i < end; i += O::kWidth) top = O::max(top, O::load(scores + i));
  float shrink = 1.0F;
  if (O::any_above(top, O::broadcast(max))) {
    const float block_max = O::reduce_max(top);
    shrink = std::exp(max - block_max);
    max = block_max;
  }
  const V ceiling = O::broadcast(max);
  V total = O::mul(O::load(lane_sums), O::broadcast(shrink));
  for (int i = begin; i < end; i += O::kWidth) {
    const V p = simd::exp<Isa>(O::sub(O::load(scores + i), ceiling));
    O::store(scores + i, p);
    total = O::add(total, p);
  }
  O::store(lane_sums, total);
  return shrink;
}

/// Attends those query rows that see something of a block: scores, softmax, output.
/// @tparam kFetch  prefetch what is read after this: see block_in_place
template <class Isa, bool kFetch, class Element>
void attend_block(const QueryRows& rows, const TileBlock<Element>& block) noexcept {
  const int tile_begin = block.first / kTile;
  const int tile_end = (block.last + kTile - 1) / kTile;
  const SeeingQueries queries =
      seeing_queries(rows.window, rows.first_query, rows.num_queries, block.row0 + block.first,
                     block.row0 + (block.last - 1));
  const std::ptrdiff_t first_row = std::ptrdiff_t{queries.first} * rows.group_size;

  TileProduct<Element> scores;
  scores.a = rows.q + first_row * kPanel;
  scores.a_stride = rows.q_stride();
  scores.b_stride = static_cast<std::ptrdiff_t>(rows.k_dim) * kTile;
  scores.b = block.k + tile_begin * scores.b_stride;
  scores.c = rows.scores + first_row * kBlockRows + tile_begin * kTile;
  scores.c_stride = kBlockRows;
  scores.num_rows = (queries.last - queries.first) * rows.group_size;
  scores.num_tiles = tile_end - tile_begin;
  scores.depth = rows.k_dim;
  scores.fetch = block.fetch_with_k;
  multiply_tiles<Isa, kFetch>(scores);

  // Memory is kept busy meanwhile. Measured with AVX-512: 4 lines a row make decode 2 % faster with
  // groups of 4 and of 8, 1 % slower without groups; 8 lines are too many at once. A run's last
  // block fetches itself again, which costs nothing that shows.
  constexpr int kLinesPerRow = 4;
  const char* fetch = reinterpret_cast<const char*>(block.v) + block.fetch_with_v.far;
  std::ptrdiff_t row = first_row;
  for (int i = queries.first; i < queries.last; ++i) {
    const VisibleRows seen =
        visible_rows(rows.window, rows.first_query + i, block.row0, block.first, block.last);
    for (int g = 0; g < rows.group_size; ++g, ++row) {
      if constexpr (kFetch) {
        for (int line = 0; line < kLinesPerRow; ++line, fetch += 64) {
          __builtin_prefetch(fetch, 0, 2);
        }
      }
      rows.rescale[row] = softmax_row<Isa>(rows.scores + row * kBlockRows, seen, block.last,
                                           rows.max[row], rows.lane_sums + row * kTile);
    }
  }

  static_assert(kBlockRows == kPanel, "a block's probabilities are one panel");
  TileProduct<Element> output;
  output.a = rows.scores + first_row * kBlockRows + block.first;
  output.b = block.v + block.first * kTile;
  output.b_stride = block.v_stride;
  output.c = rows.out + first_row * rows.v_dim;
  output.c_stride = rows.v_dim;
  output.rescale = rows.rescale + first_row;
  output.num_rows = scores.num_rows;
  output.num_tiles = rows.v_dim / kTile;
  output.depth = block.last - block.first;
  output.fetch = block.fetch_with_v;
  multiply_tiles<Isa, kFetch>(output);
}

/// Attends all query rows over those of the step's own rows that they see.
/// @param packed  [packed_block_floats]
template <class Isa, class Format>
void attend_own_rows(const HeadProblem<Format>& problem, const QueryRows& rows,
                     float* packed) noexcept {
  for_each_seen(
      rows.window, rows.first_query, rows.last_query(), problem.first_query, problem.num_queries,
      [&](std::int64_t begin, std::int64_t end) {
        for (; begin < end; begin += kBlockRows) {
          const auto count = static_cast<int>(std::min<std::int64_t>(end - begin, kBlockRows));
          attend_block<Isa, false>(rows, pack_own_block<Isa>(problem, begin, count, packed));
        }
      });
}

}  // namespace headwise::inline v0::detail
