// SPDX-License-Identifier: MIT
/// @file pack.hpp
/// TileBlock: up to 64 rows in the tile format that the kernel reads, in place or packed.
#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>

#include "headwise/attention/cpu/tile_product.hpp"
#include "headwise/attention/problem.hpp"
#include "headwise/cache/page_layout.hpp"
#include "headwise/core/config.hpp"
#include "headwise/core/dtype.hpp"
#include "headwise/core/kv_view.hpp"
#include "headwise/simd/simd.hpp"

namespace headwise::inline v0::detail {

/// Rows that go through scores, softmax and output together. 64 scores of one query row are one
/// page's worth and stay in the nearest cache beside 64 K and V rows.
inline constexpr int kBlockRows = 64;

/// Rows of consecutive positions, as tiles. Rows outside [first, last) may hold anything, NaN
/// included: V rows there are never read, scores of K rows there are overwritten.
template <class Element>
struct TileBlock {
  const Element* k = nullptr;  ///< [rows / 16][k_dim][16]
  const Element* v = nullptr;  ///< [v_dim / 16][rows][16], strips `v_stride` elements apart
  std::ptrdiff_t v_stride = 0;
  int first = 0;
  int last = 0;
  Pos row0;               ///< position of row 0, were it there
  Prefetch fetch_with_k;  ///< while K is read
  Prefetch fetch_with_v;  ///< while V is read
};

/// Floats that a packed block takes.
constexpr std::size_t packed_block_floats(int k_dim, int v_dim) {
  return static_cast<std::size_t>(kBlockRows) * static_cast<std::size_t>(k_dim + v_dim);
}

/// Consecutive stored rows within one block of one page.
struct StoredRows {
  Slot slot;
  Pos pos;
  int count = 0;
  bool more = false;  ///< does the run go on in the next slot?
};

/// Cuts `count` rows from `slot` on at the block boundaries of their pages.
template <class View, class Fn>
HEADWISE_ALWAYS_INLINE void for_each_block(const View& view, Slot slot, Pos pos, std::int64_t count,
                                           Fn&& fn) {
  for (std::int64_t done = 0; done < count;) {
    const std::int64_t row = (slot.value + done) % view.page_tokens;
    const std::int64_t block_end =
        std::min<std::int64_t>(row / kBlockRows * kBlockRows + kBlockRows, view.page_tokens);
    const std::int64_t rows = std::min(block_end - row, count - done);
    fn(StoredRows{slot + done, pos + done, static_cast<int>(rows), done + rows < count});
    done += rows;
  }
}

HEADWISE_ALWAYS_INLINE std::ptrdiff_t bytes_between(const void* from, const void* to) {
  return static_cast<const char*>(to) - static_cast<const char*>(from);
}

/// The block that a slot lies in, in a page of tiles.
template <class Row>
TileBlock<Row> block_of(const KvView<Row, TiledLayout>& view, Slot slot) {
  const PageShape shape{view.page_tokens, view.k_dim, view.v_dim};
  const auto row = static_cast<std::size_t>(slot.value % view.page_tokens);
  const Row* page = view.page_of(slot);
  TileBlock<Row> block;
  block.k = page + TiledLayout::k_offset(shape, row / kBlockRows * kBlockRows, 0);
  block.v = page + TiledLayout::v_offset(shape, row / kBlockRows * kBlockRows, 0);
  block.v_stride = static_cast<std::ptrdiff_t>(view.page_tokens) * kTile;
  block.first = static_cast<int>(row % kBlockRows);
  return block;
}

/// The rows where they lie, in a page of tiles. Fetched meanwhile: what is read next, K after V
/// after K, into the nearest cache, and what comes after that into the second.
template <class Isa, class Row>
TileBlock<Row> block_in_place(const KvView<Row, TiledLayout>& view, const StoredRows& rows) {
  TileBlock<Row> block = block_of(view, rows.slot);
  block.last = block.first + rows.count;
  block.row0 = rows.pos + -block.first;
  block.fetch_with_k.near = bytes_between(block.k, block.v);
  if (rows.more) {
    const TileBlock<Row> next = block_of(view, rows.slot + rows.count);
    block.fetch_with_k.far = bytes_between(block.k, next.k);
    block.fetch_with_v.near = bytes_between(block.v, next.k);
    block.fetch_with_v.far = bytes_between(block.v, next.v);
  }
  return block;
}

/// Packs `count` plain rows of K, `stride` elements apart, into tiles of floats; the lanes of the
/// last tile that have no row are zero.
/// @tparam Row  what each element is rounded to on the way
template <class Isa, class Row, class Element>
void pack_k(const Element* rows, std::ptrdiff_t stride, int count, int dim, float* tiles) noexcept {
  using O = simd::Ops<Isa>;
  constexpr int kWidth = O::kWidth;
  for (int token = 0; token < (count + kTile - 1) / kTile * kTile; token += kWidth) {
    float* tile = tiles + token / kTile * kTile * dim + token % kTile;
    for (int d = 0; d < dim; d += kWidth) {
      typename O::V square[std::size_t{kWidth}];
      for (int i = 0; i < kWidth; ++i) {
        square[i] = token + i < count
                        ? O::template round_to<Row>(O::load(rows + (token + i) * stride + d))
                        : O::zero();
      }
      O::transpose(square);
      for (int i = 0; i < kWidth; ++i) O::store(tile + (d + i) * kTile, square[i]);
    }
  }
}

/// Packs `count` plain rows of V, `stride` elements apart, into strips of floats.
template <class Isa, class Row, class Element>
void pack_v(const Element* rows, std::ptrdiff_t stride, int count, int dim,
            float* strips) noexcept {
  using O = simd::Ops<Isa>;
  for (int token = 0; token < count; ++token) {
    for (int d = 0; d < dim; d += O::kWidth) {
      float* strip = strips + d / kTile * kTile * kBlockRows + token * kTile + d % kTile;
      O::store(strip, O::template round_to<Row>(O::load(rows + token * stride + d)));
    }
  }
}

template <class Isa, class Element>
void widen(const Element* from, std::ptrdiff_t count, float* to) noexcept {
  using O = simd::Ops<Isa>;
  for (std::ptrdiff_t i = 0; i < count; i += O::kWidth) O::store(to + i, O::load(from + i));
}

template <class Isa>
TileBlock<float> packed_block(const float* packed, int k_dim, int first, int last, Pos row0) {
  TileBlock<float> block;
  block.k = packed;
  block.v = packed + kBlockRows * k_dim;
  block.v_stride = kBlockRows * kTile;
  block.first = first;
  block.last = last;
  block.row0 = row0;
  return block;
}

/// The rows of a page of plain rows, transposed into tiles of floats.
/// @param packed  [packed_block_floats]
template <class Isa, class Row>
TileBlock<float> pack_block(const KvView<Row, PlainLayout>& view, const StoredRows& rows,
                            float* packed) noexcept {
  const PageShape shape{view.page_tokens, view.k_dim, view.v_dim};
  const auto row = static_cast<std::size_t>(rows.slot.value % view.page_tokens);
  const Row* page = view.page_of(rows.slot);
  const Row* k = page + PlainLayout::k_offset(shape, row, 0);
  const Row* v = page + PlainLayout::v_offset(shape, row, 0);
  pack_k<Isa, f32>(k, view.k_dim, rows.count, view.k_dim, packed);
  pack_v<Isa, f32>(v, view.v_dim, rows.count, view.v_dim, packed + kBlockRows * view.k_dim);
  return packed_block<Isa>(packed, view.k_dim, 0, rows.count, rows.pos);
}

/// The rows of a page of tiles, widened to floats once for many query rows.
/// @param packed  [packed_block_floats]
template <class Isa, class Row>
TileBlock<float> pack_block(const KvView<Row, TiledLayout>& view, const StoredRows& rows,
                            float* packed) noexcept {
  const TileBlock<Row> stored = block_in_place<Isa>(view, rows);
  const std::ptrdiff_t tile = static_cast<std::ptrdiff_t>(view.k_dim) * kTile;
  const std::ptrdiff_t k_begin = stored.first / kTile * tile;
  const std::ptrdiff_t k_end = (stored.last + kTile - 1) / kTile * tile;
  widen<Isa>(stored.k + k_begin, k_end - k_begin, packed + k_begin);
  for (int strip = 0; strip < view.v_dim / kTile; ++strip) {
    float* to = packed + kBlockRows * (view.k_dim + strip * kTile) + stored.first * kTile;
    widen<Isa>(stored.v + strip * stored.v_stride + stored.first * kTile,
               static_cast<std::ptrdiff_t>(rows.count) * kTile, to);
  }
  return packed_block<Isa>(packed, view.k_dim, stored.first, stored.last, stored.row0);
}

/// The step's own rows [begin, begin + count), rounded through Row as the cache will store them.
/// @param packed  [packed_block_floats]
template <class Isa, class Row, class Layout>
TileBlock<float> pack_own_block(const HeadProblem<Row, Layout>& problem, std::int64_t begin,
                                int count, float* packed) noexcept {
  const int k_dim = problem.past.k_dim;
  const int v_dim = problem.past.v_dim;
  pack_k<Isa, Row>(problem.own_k.row(begin, 0), problem.own_k.stride_n, count, k_dim, packed);
  pack_v<Isa, Row>(problem.own_v.row(begin, 0), problem.own_v.stride_n, count, v_dim,
                   packed + kBlockRows * k_dim);
  return packed_block<Isa>(packed, k_dim, 0, count, problem.first_query + begin);
}

}  // namespace headwise::inline v0::detail
