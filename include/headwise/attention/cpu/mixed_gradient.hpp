// SPDX-License-Identifier: MIT
/// @file mixed_gradient.hpp
/// The backward pass of mixed attention on the CPU: one KV head, a range of its queries.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "headwise/attention/cpu/query_rows.hpp"
#include "headwise/attention/cpu/tile_product.hpp"
#include "headwise/attention/cpu/visibility.hpp"
#include "headwise/cache/rows/tiles.hpp"
#include "headwise/core/bits.hpp"
#include "headwise/core/position.hpp"
#include "headwise/core/tensor_view.hpp"
#include "headwise/core/window.hpp"
#include "headwise/simd/math.hpp"
#include "headwise/simd/simd.hpp"

namespace headwise::inline v0 {

/// One KV head of a sequence from position 0 on, what its forward pass left, and where gradients
/// go. With p_ij and w_ij the softmax weights of the full and the streaming half, their outputs F_i
/// and S_i, x_ij = d_out_i . v_j, and the halves' weights a and b:
///
///     d_v_j  = sum_i (a p_ij + b w_ij) d_out_i
///     d_s_ij = a p_ij (x_ij - d_out_i . F_i) + b w_ij (x_ij - d_out_i . S_i)
///     d_q_i  = scale sum_j d_s_ij k_j,   d_k_j = scale sum_i d_s_ij q_i
///
/// so that both halves share all five products, and only weights are computed twice: where the
/// window sees. A half whose weight is 0 is not visited: without a full one the cost is O(n x
/// window).
struct MixedHead {
  Window window;                  ///< what the streaming half sees
  float full_weight = 0.0F;       ///< a; 0 also where the full half is a constant
  float streaming_weight = 0.0F;  ///< b
  int group_size = 1;             ///< query heads
  int k_dim = 0;                  ///< a multiple of 16
  int v_dim = 0;                  ///< a multiple of 16
  float scale = 1.0F;             ///< factor on q.k

  TensorView<const float> q;          ///< [tokens, group_size, k_dim]
  TensorView<const float> k;          ///< [tokens, 1, k_dim]
  TensorView<const float> v;          ///< [tokens, 1, v_dim]
  TensorView<const float> full;       ///< F, [tokens, group_size, v_dim]
  TensorView<const float> streaming;  ///< S, likewise
  TensorView<const float> full_lse;   ///< log-sum-exp, [tokens, group_size]; unread where a is 0
  TensorView<const float> streaming_lse;  ///< likewise of the streaming half
  TensorView<const float> d_out;          ///< [tokens, group_size, v_dim]
  TensorView<float> d_q;                  ///< [tokens, group_size, k_dim], written

  TensorView<float> d_k;  ///< [tokens, 1, k_dim], added to
  TensorView<float> d_v;  ///< [tokens, 1, v_dim], added to
};

namespace detail {

/// Query rows that share the packing of a block of K and V. Their q, d_out, d_q and the parts of a
/// chunk fill a second-level cache of 1 MiB at width 128.
inline constexpr int kGradientTileRows = 256;
/// Query rows of a chunk, whose scores and weights for one block stay near: the depth of the
/// products that make d_k and d_v.
inline constexpr int kGradientChunkRows = 128;

constexpr int gradient_tile_queries(int group_size) {
  return std::max(1, kGradientTileRows / group_size);
}
constexpr int gradient_chunk_queries(int group_size) {
  return std::max(1, kGradientChunkRows / group_size);
}

/// A tile of queries: rows in the order of q, [queries, group_size].
template <class Isa>
class MixedTile {
  using O = simd::Ops<Isa>;
  using V = typename O::V;

 public:
  /// Floats of scratch, a multiple of 16.
  static constexpr std::size_t scratch_floats(int group_size, int k_dim, int v_dim) {
    const std::size_t rows = tile_rows(group_size);
    const std::size_t chunk = round_up_to_panel(static_cast<int>(chunk_rows(group_size)));
    const auto k = static_cast<std::size_t>(k_dim);
    const auto v = static_cast<std::size_t>(v_dim);
    return rows * (round_up_to_panel(k_dim) + round_up_to_panel(v_dim) + 2 * k + v) +
           4 * round_up_to_line(rows) + chunk * (4 * kBlockRows + 1) +
           std::size_t{kBlockRows} * (2 * k + v);
  }

  /// @param scratch  [scratch_floats], 64-byte aligned
  MixedTile(const MixedHead& head, float* scratch) noexcept
      : head_(head),
        seen_(is_zero(head.full_weight) ? head.window : Window::everything()),
        scratch_(scratch) {}

  /// Takes queries [begin, end), at most gradient_tile_queries.
  /// @return sum of d_out . (full - streaming): what the gate gets of them
  double load(std::int64_t begin, std::int64_t end) noexcept {
    begin_ = begin;
    end_ = end;
    rows_ = static_cast<int>(end - begin) * head_.group_size;
    lay_out();
    double gate = 0.0;
    std::ptrdiff_t row = 0;
    for (std::int64_t i = begin; i < end; ++i) {
      for (int g = 0; g < head_.group_size; ++g, ++row) {
        load_row(head_.q.row(i, g), head_.k_dim, head_.scale, row, q_, q_strips_);
        const float* d_out = head_.d_out.row(i, g);
        load_row(d_out, head_.v_dim, 1.0F, row, d_out_, d_out_strips_);
        const float* full = head_.full.row(i, g);
        const float* streaming = head_.streaming.row(i, g);
        V of_full = O::zero();
        V of_streaming = O::zero();
        V of_gate = O::zero();
        for (int d = 0; d < head_.v_dim; d += O::kWidth) {
          const V x = O::load(d_out + d);
          const V f = O::load(full + d);
          const V s = O::load(streaming + d);
          of_full = O::fma(x, f, of_full);
          of_streaming = O::fma(x, s, of_streaming);
          of_gate = O::fma(x, O::sub(f, s), of_gate);
        }
        full_mean_[row] = O::reduce_add(of_full);
        streaming_mean_[row] = O::reduce_add(of_streaming);
        gate += static_cast<double>(O::reduce_add(of_gate));
        if (!is_zero(head_.full_weight)) full_lse_[row] = *head_.full_lse.row(i, g);
        streaming_lse_[row] = *head_.streaming_lse.row(i, g);
      }
    }
    std::fill_n(d_q_, static_cast<std::ptrdiff_t>(rows_) * head_.k_dim, 0.0F);
    return gate;
  }

  /// Adds what the tile gives all keys that it sees, and these to its d_q.
  void add_keys() noexcept {
    if (is_zero(head_.full_weight) && is_zero(head_.streaming_weight)) return;
    for_each_seen(seen_, Pos{begin_}, Pos{end_ - 1}, Pos{0}, end_,
                  [&](std::int64_t first, std::int64_t last) {
                    for (; first < last; first += kBlockRows) {
                      add_block(first,
                                static_cast<int>(std::min<std::int64_t>(last - first, kBlockRows)));
                    }
                  });
  }

  /// Writes d_q of the tile's queries.
  void store() const noexcept {
    const V scale = O::broadcast(head_.scale);
    const float* from = d_q_;
    for (std::int64_t i = begin_; i < end_; ++i) {
      for (int g = 0; g < head_.group_size; ++g, from += head_.k_dim) {
        float* to = head_.d_q.row(i, g);
        for (int d = 0; d < head_.k_dim; d += O::kWidth) {
          O::store(to + d, O::mul(scale, O::load(from + d)));
        }
      }
    }
  }

 private:
  static constexpr std::size_t tile_rows(int group_size) {
    return static_cast<std::size_t>(gradient_tile_queries(group_size)) *
           static_cast<std::size_t>(group_size);
  }
  static constexpr std::size_t chunk_rows(int group_size) {
    return static_cast<std::size_t>(gradient_chunk_queries(group_size)) *
           static_cast<std::size_t>(group_size);
  }

  void lay_out() noexcept {
    const auto rows = static_cast<std::size_t>(rows_);
    const std::size_t chunk = round_up_to_panel(static_cast<int>(chunk_rows(head_.group_size)));
    const auto k = static_cast<std::size_t>(head_.k_dim);
    const auto v = static_cast<std::size_t>(head_.v_dim);
    float* next = scratch_;
    const auto take = [&](std::size_t floats) {
      float* const here = next;
      next += floats;
      return here;
    };
    q_ = take(rows * round_up_to_panel(head_.k_dim));
    d_out_ = take(rows * round_up_to_panel(head_.v_dim));
    q_strips_ = take(rows * k);
    d_out_strips_ = take(rows * v);
    d_q_ = take(rows * k);
    full_lse_ = take(round_up_to_line(rows));
    streaming_lse_ = take(round_up_to_line(rows));
    full_mean_ = take(round_up_to_line(rows));
    streaming_mean_ = take(round_up_to_line(rows));
    weights_ = take(chunk * kBlockRows);
    d_scores_ = take(chunk * kBlockRows);
    turned_weights_ = take(chunk * kBlockRows);
    turned_d_scores_ = take(chunk * kBlockRows);
    ones_ = take(chunk);
    k_tiles_ = take(std::size_t{kBlockRows} * k);
    k_strips_ = take(std::size_t{kBlockRows} * k);
    v_tiles_ = take(std::size_t{kBlockRows} * v);
    std::fill_n(ones_, chunk, 1.0F);
  }

  /// A row of q or d_out, as a left factor and as a right one.
  void load_row(const float* from, int dim, float scale, std::ptrdiff_t row, float* panels,
                float* strips) const noexcept {
    const V factor = O::broadcast(scale);
    for (int d = 0; d < dim; d += O::kWidth) {
      const V x = O::mul(factor, O::load(from + d));
      O::store(panels + (std::ptrdiff_t{d / kPanel} * rows_ + row) * kPanel + d % kPanel, x);
      O::store(strips + (std::ptrdiff_t{d / kTile} * rows_ + row) * kTile + d % kTile, x);
    }
  }

  /// Keys [first, first + count).
  void add_block(std::int64_t first, int count) noexcept {
    const auto load_from = [first](const TensorView<const float>& tensor) {
      return [&tensor, first](int row, int d) { return O::load(tensor.row(first + row, 0) + d); };
    };
    pack_k<Isa>(count, head_.k_dim, k_tiles_, load_from(head_.k));
    pack_v<Isa>(count, head_.k_dim, k_strips_, load_from(head_.k));
    pack_k<Isa>(count, head_.v_dim, v_tiles_, load_from(head_.v));
    const auto queries = static_cast<int>(end_ - begin_);
    const int step = gradient_chunk_queries(head_.group_size);
    for (int chunk = 0; chunk < queries; chunk += step) {
      const SeeingQueries seeing =
          seeing_queries(seen_, Pos{begin_ + chunk}, std::min(step, queries - chunk), Pos{first},
                         Pos{first + count - 1});
      if (seeing.first >= seeing.last) continue;
      add_chunk(first, count, chunk + seeing.first, chunk + seeing.last);
    }
  }

  /// One block of keys and the tile's queries [begin, end), which see some of it.
  void add_chunk(std::int64_t first, int count, int begin, int end) noexcept {
    const int tiles = (count + kTile - 1) / kTile;
    const std::ptrdiff_t row = std::ptrdiff_t{begin} * head_.group_size;
    const int rows = (end - begin) * head_.group_size;

    const auto products = [&](const float* left, const float* right, int dim, float* to) {
      TileProduct<float> product;
      product.a = left + row * kPanel;
      product.a_stride = std::ptrdiff_t{rows_} * kPanel;
      product.b = right;
      product.b_stride = std::ptrdiff_t{dim} * kTile;
      product.c = to;
      product.c_stride = kBlockRows;
      product.num_rows = rows;
      product.num_tiles = tiles;
      product.depth = dim;
      multiply_tiles<Isa, false>(product);
    };
    products(q_, k_tiles_, head_.k_dim, weights_);       // scores, for now
    products(d_out_, v_tiles_, head_.v_dim, d_scores_);  // d_out . v, for now
    std::ptrdiff_t at = 0;
    for (int i = begin; i < end; ++i) {
      const VisibleRows seen = visible_rows(head_.window, Pos{begin_ + i}, Pos{first}, 0, count);
      for (int g = 0; g < head_.group_size; ++g, ++at) {
        weigh(weights_ + at * kBlockRows, d_scores_ + at * kBlockRows, row + at, seen,
              tiles * kTile);
      }
    }
    turn(weights_, rows, tiles * kTile, turned_weights_);
    turn(d_scores_, rows, tiles * kTile, turned_d_scores_);

    TileProduct<float> d_q;
    d_q.a = d_scores_;
    d_q.b = k_strips_;
    d_q.b_stride = kBlockRows * kTile;
    d_q.c = d_q_ + row * head_.k_dim;
    d_q.c_stride = head_.k_dim;
    d_q.rescale = ones_;
    d_q.num_rows = rows;
    d_q.num_tiles = head_.k_dim / kTile;
    d_q.depth = count;
    multiply_tiles<Isa, false>(d_q);

    const auto add = [&](const float* turned, const float* strips, int dim,
                         const TensorView<float>& to) {
      TileProduct<float> product;
      product.a = turned;
      product.a_stride = kBlockRows * kPanel;
      product.b = strips + row * kTile;
      product.b_stride = std::ptrdiff_t{rows_} * kTile;
      product.c = to.row(first, 0);
      product.c_stride = static_cast<std::ptrdiff_t>(to.stride_n);
      product.rescale = ones_;
      product.num_rows = count;
      product.num_tiles = dim / kTile;
      product.depth = rows;
      multiply_tiles<Isa, false>(product);
    };
    add(turned_weights_, d_out_strips_, head_.v_dim, head_.d_v);
    add(turned_d_scores_, q_strips_, head_.k_dim, head_.d_k);
  }

  /// From a row's scores to its weights, from its d_out . v to d_s, for `columns` keys of a block.
  void weigh(float* scores, float* dots, std::ptrdiff_t row, const VisibleRows& seen,
             int columns) const noexcept {
    // No weight is above 1; of keys that are not seen it could be anything.
    const auto softmax = [&](int i, V lse, V weight) {
      const V below = O::max(O::zero(), O::sub(lse, O::load(scores + i)));
      return O::mul(weight, simd::exp<Isa>(O::sub(O::zero(), below)));
    };
    alignas(64) float streaming[kBlockRows];
    const bool streams = !is_zero(head_.streaming_weight) && seen.count() > 0;
    if (streams) {
      const V lse = O::broadcast(streaming_lse_[row]);
      const V weight = O::broadcast(head_.streaming_weight);
      for (int i = 0; i < columns; i += O::kWidth) O::store(streaming + i, softmax(i, lse, weight));
      std::fill(streaming + seen.hole_first, streaming + seen.hole_last, 0.0F);
    }
    const bool is_full = !is_zero(head_.full_weight);
    const V lse = O::broadcast(is_full ? full_lse_[row] : 0.0F);
    const V weight = O::broadcast(head_.full_weight);
    const V full_mean = O::broadcast(full_mean_[row]);
    const V streaming_mean = O::broadcast(streaming_mean_[row]);
    for (int i = 0; i < columns; i += O::kWidth) {
      const V dot = O::load(dots + i);
      V share = O::zero();
      V d_score = O::zero();
      if (is_full) {
        share = softmax(i, lse, weight);
        d_score = O::mul(share, O::sub(dot, full_mean));
      }
      if (streams) {
        const V more = O::load(streaming + i);
        share = O::add(share, more);
        d_score = O::fma(more, O::sub(dot, streaming_mean), d_score);
      }
      O::store(scores + i, share);
      O::store(dots + i, d_score);
    }
    std::fill(scores + seen.last, scores + columns, 0.0F);
    std::fill(dots + seen.last, dots + columns, 0.0F);
  }

  /// [rows][64] to panels [rows / 64][64][64] of the transpose, of `columns` columns.
  static void turn(const float* from, int rows, int columns, float* to) noexcept {
    for (int r = 0; r < rows; r += O::kWidth) {
      for (int c = 0; c < columns; c += O::kWidth) {
        V square[std::size_t{O::kWidth}];
        for (int i = 0; i < O::kWidth; ++i) {
          square[i] = r + i < rows ? O::load(from + (r + i) * kBlockRows + c) : O::zero();
        }
        O::transpose(square);
        float* panel = to + r / kPanel * kBlockRows * kPanel + r % kPanel;
        for (int i = 0; i < O::kWidth; ++i) O::store(panel + (c + i) * kPanel, square[i]);
      }
    }
  }

  const MixedHead& head_;
  Window seen_;  // by either half whose weight is not 0
  float* scratch_;
  std::int64_t begin_ = 0;
  std::int64_t end_ = 0;
  int rows_ = 0;

  float* q_ = nullptr;             // [k_dim / 64][rows][64], times scale
  float* d_out_ = nullptr;         // [v_dim / 64][rows][64]
  float* q_strips_ = nullptr;      // [k_dim / 16][rows][16], times scale
  float* d_out_strips_ = nullptr;  // [v_dim / 16][rows][16]
  float* d_q_ = nullptr;           // [rows][k_dim], not yet times scale
  float* full_lse_ = nullptr;      // [rows]
  float* streaming_lse_ = nullptr;
  float* full_mean_ = nullptr;  // d_out . F
  float* streaming_mean_ = nullptr;
  float* weights_ = nullptr;         // [chunk rows][64]
  float* d_scores_ = nullptr;        // [chunk rows][64]
  float* turned_weights_ = nullptr;  // [chunk rows / 64][64][64]
  float* turned_d_scores_ = nullptr;
  float* ones_ = nullptr;
  float* k_tiles_ = nullptr;   // [4][k_dim][16]
  float* k_strips_ = nullptr;  // [k_dim / 16][64][16]
  float* v_tiles_ = nullptr;   // [4][v_dim][16]
};

}  // namespace detail

/// Floats of scratch that `mixed_gradient` needs, 64-byte aligned, one per thread.
constexpr std::size_t mixed_gradient_scratch_floats(int group_size, int k_dim, int v_dim) {
  return detail::MixedTile<simd::Scalar>::scratch_floats(group_size, k_dim, v_dim);
}

/// Writes d_q of queries [begin, end) of a head, and adds what they give to its d_k and d_v of
/// keys [0, end).
///
/// 2 (3 k_dim + 2 v_dim) flop a visible key and query row; where only the window is seen, for the
/// keys in it alone. Everything must be finite.
/// @param scratch  [mixed_gradient_scratch_floats], 64-byte aligned
/// @return sum over queries and query heads of d_out . (full - streaming)
template <class Isa>
double mixed_gradient(const MixedHead& head, std::int64_t begin, std::int64_t end,
                      float* scratch) noexcept {
  detail::MixedTile<Isa> tile(head, scratch);
  const int step = detail::gradient_tile_queries(head.group_size);
  double gate = 0.0;
  for (; begin < end; begin += step) {
    gate += tile.load(begin, std::min(begin + step, end));
    tile.add_keys();
    tile.store();
  }
  return gate;
}

}  // namespace headwise::inline v0
