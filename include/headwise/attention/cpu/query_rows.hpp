// SPDX-License-Identifier: MIT
/// @file query_rows.hpp
/// QueryRows: the query rows of one KV head in flight, and what one block of K and V does to them.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "headwise/attention/cpu/pack.hpp"
#include "headwise/attention/cpu/tile_product.hpp"
#include "headwise/attention/cpu/visibility.hpp"
#include "headwise/attention/problem.hpp"
#include "headwise/attention/state.hpp"
#include "headwise/core/bits.hpp"
#include "headwise/core/config.hpp"
#include "headwise/core/dtype.hpp"
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
  float* weight = nullptr;     ///< [rows]: factor on what is added to out, see safe_weight()
  float* max = nullptr;        ///< [rows]: SoftmaxState, as arrays
  float* sum = nullptr;        ///< [rows]
  float* out = nullptr;        ///< [rows][v_dim]: not divided by sum before finish_row()
  /// [packed_block_floats], used where V in place has scales: see multiply_scaled()
  float* scaled = nullptr;

  Window window;
  HeadSoftmax softmax;
  Pos first_query;
  int num_queries = 0;
  int group_size = 0;
  int k_dim = 0;
  int v_dim = 0;
  bool exact = false;     ///< whether V is looked at before queries that do not see it meet it
  bool weighted = false;  ///< whether a weight is not 1

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

/// Floats of q, scores, lane_sums, rescale and weight.
constexpr std::size_t query_scratch_floats(std::size_t num_rows, int k_dim) {
  return num_rows * (round_up_to_panel(k_dim) + std::size_t{kBlockRows + kTile}) +
         2 * round_up_to_line(num_rows);
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
  HEADWISE_ASSERT(problem.softmax.alibi_slopes == nullptr || problem.past.compensation.count == 0,
                  "a compensation row has no position for ALiBi");
  rows.window = problem.window;
  rows.softmax = problem.softmax;
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
  rows.weight = rows.rescale + round_up_to_line(num_rows);
  rows.max = state;
  rows.sum = rows.max + round_up_to_line(num_rows);
  rows.out = rows.sum + round_up_to_line(num_rows);

  std::fill_n(rows.weight, num_rows, 1.0F);
  const auto scale = O::broadcast(problem.scale);
  AsStored<Format> as_stored;
  float* to = rows.q;
  problem.q.visit([&](auto queries) {
    for (std::int64_t i = begin; i < end; ++i) {
      for (int g = 0; g < rows.group_size; ++g, to += kPanel) {
        const auto load_from = [&](const auto* q) {
          for (int d = 0; d < rows.k_dim; d += O::kWidth) {
            O::store(to + d / kPanel * rows.q_stride() + d % kPanel, O::mul(scale, O::load(q + d)));
          }
        };
        if constexpr (RotatesK<Format>) {
          alignas(64) float room[kMaxRotatedDim];
          const FloatRows<Isa> floats{problem.q, rows.k_dim, room};
          load_from(as_stored(floats.row(i, g), rows.k_dim));
        } else {
          load_from(queries.row(i, g));
        }
      }
    }
  });
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

/// One more row for every query row, which all of them see: adds `share` of it to the state.
/// @param score  its logit; -inf: as if not there. +inf or NaN spoil the query row.
/// @param value  [v_dim], or null for zeros
template <class Isa>
void add_row(const QueryRows& rows, std::ptrdiff_t r, float score, const float* value) noexcept {
  using O = simd::Ops<Isa>;
  float* sums = rows.lane_sums + r * kTile;
  if (is_minus_infinity(score)) return;
  if (!is_finite(score)) {
    rows.max[r] = score;
    sums[0] = opaque_float(0x7FC00000U);
    return;
  }
  const float max = std::max(rows.max[r], score);
  const float kept = std::exp(rows.max[r] - max);
  const float share = std::exp(score - max);
  rows.max[r] = max;
  for (int i = 0; i < kTile; i += O::kWidth) {
    O::store(sums + i, O::mul(O::load(sums + i), O::broadcast(kept)));
  }
  sums[0] += share;
  float* out = rows.out + r * rows.v_dim;
  for (int d = 0; d < rows.v_dim; d += O::kWidth) {
    const auto old = O::mul(O::load(out + d), O::broadcast(kept));
    const auto added = value == nullptr ? O::zero() : O::load(value + d);
    O::store(out + d, O::fma(O::broadcast(share * rows.weight[r]), added, old));
  }
}

/// Sinks and the compensation row come last: to a sum that holds thousands of rows' weight, and
/// began with it, each further row would be a few bits.
/// @param row  with score q.k_mean, capped, + ln(count) and value v_mean
/// @param sinks  [group_size] or null
template <class Isa>
void add_rows_that_all_see(const QueryRows& rows, const CompensationRow& row,
                           const float* sinks) noexcept {
  using O = simd::Ops<Isa>;
  for (std::ptrdiff_t r = 0; r < rows.num_rows(); ++r) {
    if (sinks != nullptr) add_row<Isa>(rows, r, sinks[r % rows.group_size], nullptr);
    if (row.count <= 0) continue;
    const float* q = rows.q + r * kPanel;
    auto dot = O::zero();
    for (int d = 0; d < rows.k_dim; d += O::kWidth) {
      const auto x = O::load(q + d / kPanel * rows.q_stride() + d % kPanel);
      dot = O::fma(x, O::load(row.k_mean + d), dot);
    }
    float score = O::reduce_add(dot);
    if (const float cap = rows.softmax.soft_cap; cap > 0.0F && !is_nan(score)) {
      score = cap * std::tanh(score / cap);
    }
    add_row<Isa>(rows, r, score + std::log(static_cast<float>(row.count)), row.v_mean);
  }
}

/// Whether 16 x `count` elements at `x` are all finite; by bits, for the sake of -ffast-math.
template <class Isa, class Element>
bool are_finite(const Element* x, std::ptrdiff_t count) noexcept {
  using Bits = std::conditional_t<sizeof(Element) == 2, std::uint16_t, std::uint32_t>;
  constexpr Bits kExponent =  // all ones: infinite or NaN
      static_cast<Bits>(std::same_as<Element, f16>    ? 0x7C00U
                        : std::same_as<Element, bf16> ? 0x7F80U
                                                      : 0x7F800000U);
  Bits largest[kTile] = {};
  for (std::ptrdiff_t i = 0; i < count; ++i, x += kTile) {
    for (int lane = 0; lane < kTile; ++lane) {
      const auto exponent = static_cast<Bits>(std::bit_cast<Bits>(x[lane]) & kExponent);
      largest[lane] = std::max(largest[lane], exponent);
    }
  }
  return *std::max_element(largest, largest + kTile) < kExponent;
}

/// After the last block: a row's sum, and its out divided by it, or zeros where nothing was seen.
/// @param to  [v_dim], may be the row's out
/// @return whether all of it is finite
template <class Isa>
bool finish_row(const QueryRows& rows, std::ptrdiff_t row, float* to) noexcept {
  using O = simd::Ops<Isa>;
  const float sum = O::reduce_add(O::load(rows.lane_sums + row * kTile));
  rows.sum[row] = sum;
  if (SoftmaxState{.max = rows.max[row], .sum = sum}.empty()) {
    std::fill_n(to, rows.v_dim, 0.0F);
    return true;
  }
  const float* out = rows.out + row * rows.v_dim;
  const auto factor = O::broadcast(1.0F / (sum * rows.weight[row]));
  for (int d = 0; d < rows.v_dim; d += O::kWidth) {
    O::store(to + d, O::mul(O::load(out + d), factor));
  }
  return are_finite<Isa>(to, rows.v_dim / kTile);
}

/// A QueryRows::weight, a power of two, with which no sum over this problem's rows is larger than
/// the largest V. With the weight 1 sums are exact to smaller V, and overflow where V comes near
/// the end of the range (3e38 / rows): then all is done again, with this one for the query rows
/// that overflowed. Theirs alone, for V below 1e-38 x rows suffer, and other rows may not see the
/// large V.
template <class Format>
float safe_weight(const HeadProblem<Format>& problem) {
  const auto rows = static_cast<std::uint64_t>(problem.past.num_rows() + problem.num_queries + 1);
  return std::ldexp(1.0F, -static_cast<int>(std::bit_width(rows)));
}

/// Whether one of `count` scores is +inf or NaN; by bits, for the sake of -ffast-math.
inline bool spoils_row(const float* scores, int count) noexcept {
  std::uint32_t spoilt = 0;
  for (int i = 0; i < count; ++i) {
    const auto bits = std::bit_cast<std::uint32_t>(scores[i]);
    spoilt |= static_cast<std::uint32_t>((bits & 0x7FFFFFFFU) >= 0x7F800000U) &
              static_cast<std::uint32_t>(bits != 0xFF800000U);
  }
  return spoilt != 0;
}

/// soft_cap * tanh(score / soft_cap) for 16 x `num_tiles` scores.
template <class Isa>
void cap_scores(float* scores, int num_tiles, float soft_cap) noexcept {
  using O = simd::Ops<Isa>;
  constexpr bool kNanMayBeLost = __FINITE_MATH_ONLY__ != 0;
  std::uint64_t nans = 0;
  for (int i = 0; kNanMayBeLost && i < num_tiles * kTile; ++i) {
    nans |= std::uint64_t{is_nan(scores[i])} << i;
  }
  const auto cap = O::broadcast(soft_cap);
  for (int i = 0; i < num_tiles * kTile; i += O::kWidth) {
    O::store(scores + i, O::mul(cap, simd::tanh<Isa>(O::div(O::load(scores + i), cap))));
  }
  for (; nans != 0; nans &= nans - 1) scores[std::countr_zero(nans)] = opaque_float(0x7FC00000U);
}

/// From scale * q.k to logits, where that is not the same: soft-cap and ALiBi, for the rows of
/// `queries` and whole tiles of a block. Never inlined: most models have neither.
template <class Isa>
HEADWISE_NEVER_INLINE void shape_scores(const QueryRows& rows, const SeeingQueries& queries,
                                        Pos row0, int tile_begin, int tile_end) noexcept {
  using O = simd::Ops<Isa>;
  const int num_tiles = tile_end - tile_begin;
  const HeadSoftmax& softmax = rows.softmax;
  std::ptrdiff_t row = std::ptrdiff_t{queries.first} * rows.group_size;
  for (int i = queries.first; i < queries.last; ++i) {
    float distance[kBlockRows];  // from the query to each key
    const std::int64_t first = (row0 + tile_begin * kTile) - (rows.first_query + i);
    for (int j = 0; softmax.alibi_slopes != nullptr && j < num_tiles * kTile; ++j) {
      distance[j] = static_cast<float>(first + j);
    }
    for (int g = 0; g < rows.group_size; ++g, ++row) {
      float* scores = rows.scores + row * kBlockRows + tile_begin * kTile;
      if (softmax.soft_cap > 0.0F) cap_scores<Isa>(scores, num_tiles, softmax.soft_cap);
      if (softmax.alibi_slopes == nullptr) continue;
      const auto slope = O::broadcast(softmax.alibi_slopes[g]);
      for (int j = 0; j < num_tiles * kTile; j += O::kWidth) {
        O::store(scores + j, O::fma(slope, O::load(distance + j), O::load(scores + j)));
      }
    }
  }
}

/// Turns one row of scores into exp(score - max) and updates that row's max and sums.
/// @param scores  [64]; whole tiles around [seen.first, seen.last) hold scores
/// @param rows_end  probabilities are needed up to here
/// @param lane_sums  [16] of the row, as many as the vector is wide are used: see finish_row()
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
  const bool whole = seen.count() == end - begin;
  const auto fill_hidden = [&](float value) {
    std::fill(scores + begin, scores + seen.first, value);
    std::fill(scores + seen.hole_first, scores + seen.hole_last, value);
    std::fill(scores + seen.last, scores + end, value);
  };
  // What is hidden, or no row at all, is replaced rather than computed with: it may be NaN.
  if (!whole) fill_hidden(kNoScore);
  // Arithmetic makes the row NaN by itself where the compiler lets it.
  constexpr bool kNanMayBeLost = __FINITE_MATH_ONLY__ != 0;
  const bool spoilt = kNanMayBeLost && spoils_row(scores + begin, end - begin);

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
  const auto probability = [&](int i) {
    const V p = simd::exp<Isa>(O::sub(O::load(scores + i), ceiling));
    O::store(scores + i, p);
    return p;
  };
  if (whole) {
    for (int i = begin; i < end; i += O::kWidth) total = O::add(total, probability(i));
  } else {
    // A probability of 0 by place: where every score that is seen is as low as kNoScore or -inf,
    // the score of what is hidden is no lower.
    for (int i = begin; i < end; i += O::kWidth) probability(i);
    fill_hidden(0.0F);
    for (int i = begin; i < end; i += O::kWidth) total = O::add(total, O::load(scores + i));
  }
  O::store(lane_sums, total);
  if (spoilt) *lane_sums = opaque_float(0x7FC00000U);
  return shrink;
}

/// The output product where V that some query does not see is infinite or NaN, which times 0 is
/// NaN: query by query, and only what it sees.
/// @param output  as for all rows at once
template <class Isa, bool kFetch, class KElement, class Element>
HEADWISE_NEVER_INLINE void multiply_visible(const QueryRows& rows,
                                            const TileBlock<KElement, Element>& block,
                                            const SeeingQueries& queries,
                                            TileProduct<Element> output) noexcept {
  output.num_rows = rows.group_size;
  output.fetch = {};
  for (int i = queries.first; i < queries.last; ++i) {
    const VisibleRows seen =
        visible_rows(rows.window, rows.first_query + i, block.row0, block.first, block.last);
    const std::ptrdiff_t row = std::ptrdiff_t{i} * rows.group_size;
    const auto multiply = [&](int begin, int end) {
      if (begin == end) return;
      output.a = rows.scores + row * kBlockRows + begin;
      output.b = block.v.data + begin * kTile;
      output.c = rows.out + row * rows.v_dim;
      output.rescale = rows.rescale + row;
      output.depth = end - begin;
      multiply_tiles<Isa, kFetch>(output);
      std::fill_n(rows.rescale + row, rows.group_size, 1.0F);  // once a block
    };
    multiply(seen.first, seen.hole_first);
    multiply(seen.hole_last, seen.last);
  }
}

/// Whether all V that [first, last) of the block have is finite.
template <class Isa, class KElement, class Element>
bool has_finite_v(const TileBlock<KElement, Element>& block, int v_dim) noexcept {
  bool finite = true;
  for (int strip = 0; strip < v_dim / kTile; ++strip) {
    finite &= are_finite<Isa>(block.v.data + strip * block.v.stride + block.first * kTile,
                              block.last - block.first);
  }
  return finite;
}

/// Query rows whose probabilities are scaled together: what [packed_block_floats] holds of any V.
inline constexpr int kScaledRows = 16;

/// The output product where V are integers: probabilities are multiplied by the scales of the rows
/// first, group by group of dimensions. What a query does not see gets 0 by place, for its scale
/// may be NaN, and integers are finite: see multiply_visible() for V that are not.
/// @param output  as for all rows at once
template <class Isa, bool kFetch, class KElement, class Element>
void multiply_scaled(const QueryRows& rows, const TileBlock<KElement, Element>& block,
                     const SeeingQueries& queries, bool all_see_all,
                     TileProduct<Element> output) noexcept {
  using O = simd::Ops<Isa>;
  const int group = TileElement<Element>::kGroup == 0 ? rows.v_dim : TileElement<Element>::kGroup;
  const int begin = block.first / kTile * kTile;
  const std::ptrdiff_t first_row = std::ptrdiff_t{queries.first} * rows.group_size;
  const std::ptrdiff_t end_row = std::ptrdiff_t{queries.last} * rows.group_size;
  output.a = rows.scaled + block.first;
  output.a_tile = kScaledRows * kBlockRows;
  output.num_tiles =
      (output.num_tiles + TileElement<Element>::kTiles - 1) / TileElement<Element>::kTiles;
  output.num_columns = rows.v_dim;
  for (std::ptrdiff_t chunk = first_row; chunk < end_row; chunk += kScaledRows) {
    const std::ptrdiff_t chunk_end = std::min(chunk + kScaledRows, end_row);
    const auto* scales = block.v.scales;
    float* to_group = rows.scaled;
    for (int d = 0; d < rows.v_dim; d += group) {
      float* to = to_group;
      for (std::ptrdiff_t row = chunk; row < chunk_end; ++row, to += kBlockRows) {
        const float* from = rows.scores + row * kBlockRows;
        for (int i = begin; i < block.last; i += O::kWidth) {
          O::store(to + i, O::mul(O::load(from + i), O::load(scales + i)));
        }
        if (all_see_all) continue;
        const VisibleRows seen =
            visible_rows(rows.window, rows.first_query + static_cast<int>(row / rows.group_size),
                         block.row0, block.first, block.last);
        std::fill(to + block.first, to + seen.first, 0.0F);
        std::fill(to + seen.hole_first, to + seen.hole_last, 0.0F);
        std::fill(to + seen.last, to + block.last, 0.0F);
      }
      scales += block.v.scale_stride;
      to_group += kScaledRows * kBlockRows;
    }
    output.c = rows.out + chunk * rows.v_dim;
    output.rescale = rows.rescale + chunk;
    output.num_rows = static_cast<int>(chunk_end - chunk);
    multiply_tiles<Isa, kFetch>(output);
  }
}

/// Attends those query rows that see something of a block: scores, softmax, output.
/// @tparam kFetch  prefetch what is read after this: see block_in_place
template <class Isa, bool kFetch, class KElement, class VElement>
void attend_block(const QueryRows& rows, const TileBlock<KElement, VElement>& block) noexcept {
  const int tile_begin = block.first / kTile;
  const int tile_end = (block.last + kTile - 1) / kTile;
  const SeeingQueries queries =
      seeing_queries(rows.window, rows.first_query, rows.num_queries, block.row0 + block.first,
                     block.row0 + (block.last - 1));
  const std::ptrdiff_t first_row = std::ptrdiff_t{queries.first} * rows.group_size;

  TileProduct<KElement> scores;
  scores.a = rows.q + first_row * kPanel;
  scores.a_stride = rows.q_stride();
  scores.b_stride = block.k.stride;
  scores.b = block.k.data + tile_begin * scores.b_stride;
  if constexpr (kIsScaled<KElement>) {
    scores.scales = block.k.scales + tile_begin * kTile;
    scores.scale_stride = block.k.scale_stride;
  }
  scores.c = rows.scores + first_row * kBlockRows + tile_begin * kTile;
  scores.c_stride = kBlockRows;
  scores.num_rows = (queries.last - queries.first) * rows.group_size;
  scores.num_tiles = tile_end - tile_begin;
  scores.depth = rows.k_dim;
  scores.fetch = block.fetch_with_k;
  multiply_tiles<Isa, kFetch>(scores);
  if (rows.softmax.soft_cap > 0.0F || rows.softmax.alibi_slopes != nullptr) {
    shape_scores<Isa>(rows, queries, block.row0, tile_begin, tile_end);
  }

  // Memory is kept busy meanwhile. Measured with AVX-512: 4 lines a row make decode 2 % faster with
  // groups of 4 and of 8, 1 % slower without groups; 8 lines are too many at once. A run's last
  // block fetches itself again, which costs nothing that shows.
  constexpr int kLinesPerRow = 4;
  const char* fetch = reinterpret_cast<const char*>(block.v.data) + block.fetch_with_v.far;
  std::ptrdiff_t row = first_row;
  bool all_see_all = true;
  for (int i = queries.first; i < queries.last; ++i) {
    const VisibleRows seen =
        visible_rows(rows.window, rows.first_query + i, block.row0, block.first, block.last);
    all_see_all &= seen.count() == block.last - block.first;
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

  if (rows.weighted) {
    for (std::ptrdiff_t r = first_row; r < row; ++r) {
      for (int i = block.first; i < block.last; ++i) {
        rows.scores[r * kBlockRows + i] *= rows.weight[r];
      }
    }
  }

  static_assert(kBlockRows == kPanel, "a block's probabilities are one panel");
  TileProduct<VElement> output;
  output.a = rows.scores + first_row * kBlockRows + block.first;
  output.b = block.v.data + block.first * kTile;
  output.b_stride = block.v.stride;
  output.c = rows.out + first_row * rows.v_dim;
  output.c_stride = rows.v_dim;
  output.rescale = rows.rescale + first_row;
  output.num_rows = scores.num_rows;
  output.num_tiles = rows.v_dim / kTile;
  output.depth = block.last - block.first;
  output.fetch = block.fetch_with_v;
  if constexpr (kIsScaled<VElement>) {
    multiply_scaled<Isa, kFetch>(rows, block, queries, all_see_all, output);
  } else if (all_see_all || !rows.exact || has_finite_v<Isa>(block, rows.v_dim)) {
    multiply_tiles<Isa, kFetch>(output);
  } else {
    multiply_visible<Isa, kFetch>(rows, block, queries, output);
  }
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
