// SPDX-License-Identifier: MIT
/// @file pack.hpp
/// TileBlock: up to 64 rows in the tile format that the kernel reads, in place or packed.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "headwise/attention/cpu/own_rows.hpp"
#include "headwise/attention/cpu/tile_product.hpp"
#include "headwise/attention/problem.hpp"
#include "headwise/cache/rows/format.hpp"
#include "headwise/cache/rows/rotated_rows.hpp"
#include "headwise/cache/rows/tiles.hpp"
#include "headwise/core/config.hpp"
#include "headwise/core/kv_view.hpp"

namespace headwise::inline v0::detail {

/// Rows of consecutive positions, as tiles. Rows outside [first, last) may hold anything, NaN
/// included: V rows there are never read, scores of K rows there are overwritten.
template <class KElement, class VElement = KElement>
struct TileBlock {
  Tiles<KElement> k;
  Tiles<VElement> v;
  int first = 0;
  int last = 0;
  Pos row0;               ///< position of row 0, were it there
  Prefetch fetch_with_k;  ///< while K is read
  Prefetch fetch_with_v;  ///< while V is read
};

/// A q or a mean of K as it is multiplied with stored K: turned where that is.
template <class Format>
class AsStored {
 public:
  /// @param x  [k_dim]
  const float* operator()(const float* x, [[maybe_unused]] int k_dim) {
    if constexpr (RotatesK<Format>) {
      return Format::rotate_k(x, k_dim, turned_);
    } else {
      return x;
    }
  }

 private:
  float turned_[RotatesK<Format> ? kMaxRotatedDim : 1];
};

/// Floats that a packed block takes, and behind it a tile of own rows that are no floats yet.
constexpr std::size_t packed_block_floats(int k_dim, int v_dim) {
  return static_cast<std::size_t>(kBlockRows) * static_cast<std::size_t>(k_dim + v_dim) +
         static_cast<std::size_t>(kTile) * static_cast<std::size_t>(std::max(k_dim, v_dim));
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
    const std::int64_t row = (slot.value + done) % view.shape.page_tokens;
    const std::int64_t block_end =
        std::min<std::int64_t>(row / kBlockRows * kBlockRows + kBlockRows, view.shape.page_tokens);
    const std::int64_t rows = std::min(block_end - row, count - done);
    fn(StoredRows{slot + done, pos + done, static_cast<int>(rows), done + rows < count});
    done += rows;
  }
}

HEADWISE_ALWAYS_INLINE std::ptrdiff_t bytes_between(const void* from, const void* to) {
  return static_cast<const char*>(to) - static_cast<const char*>(from);
}

/// The scales of a block of V or K, into the second cache: too few for the walk along its tiles.
template <class Element>
HEADWISE_ALWAYS_INLINE void fetch_scales([[maybe_unused]] const Tiles<Element>& tiles,
                                         [[maybe_unused]] int dim) {
  if constexpr (kIsScaled<Element>) {
    const int group = TileElement<Element>::kGroup == 0 ? dim : TileElement<Element>::kGroup;
    const auto* scales = reinterpret_cast<const char*>(tiles.scales);
    constexpr auto kSize = static_cast<std::ptrdiff_t>(sizeof(*tiles.scales));
    for (int d = 0; d < dim; d += group, scales += tiles.scale_stride * kSize) {
      for (std::ptrdiff_t at = 0; at < kBlockRows * kSize; at += 64) {
        __builtin_prefetch(scales + at, 0, 2);
      }
    }
  }
}

template <class KElement, class VElement>
HEADWISE_ALWAYS_INLINE TileBlock<KElement, VElement> block_of(
    const RowTiles<KElement, VElement>& tiles) {
  TileBlock<KElement, VElement> block;
  block.k = tiles.k;
  block.v = tiles.v;
  return block;
}

/// The rows where they lie. Fetched meanwhile: what is read next, K after V after K, into the
/// nearest cache, and what comes after that into the second.
template <class Isa, TiledInPlace Format>
auto block_in_place(const KvView<Format>& view, const StoredRows& rows) {
  const auto tiles_at = [&](Slot slot) {
    return Format::tiles(view.page_of(slot), view.shape,
                         static_cast<std::size_t>(slot.value % view.shape.page_tokens));
  };
  auto block = block_of(tiles_at(rows.slot));
  block.first = static_cast<int>(rows.slot.value % view.shape.page_tokens % kBlockRows);
  block.last = block.first + rows.count;
  block.row0 = rows.pos + -block.first;
  block.fetch_with_k.near = bytes_between(block.k.data, block.v.data);
  if (rows.more) {
    const auto next = tiles_at(rows.slot + rows.count);
    block.fetch_with_k.far = bytes_between(block.k.data, next.k.data);
    block.fetch_with_v.near = bytes_between(block.v.data, next.k.data);
    block.fetch_with_v.far = bytes_between(block.v.data, next.v.data);
    fetch_scales(next.k, view.shape.k_dim);
    fetch_scales(next.v, view.shape.v_dim);
  }
  return block;
}

HEADWISE_ALWAYS_INLINE TileBlock<float> packed_block(const float* packed, int k_dim, int first,
                                                     int count, Pos pos) {
  TileBlock<float> block;
  block.k = {packed, static_cast<std::ptrdiff_t>(k_dim) * kTile};
  block.v = {packed + kBlockRows * k_dim, kBlockRows * kTile};
  block.first = first;
  block.last = first + count;
  block.row0 = pos + -first;
  return block;
}

/// The rows as tiles of floats, made once for many query rows.
/// @param packed  [packed_block_floats]
template <class Isa, class Format>
TileBlock<float> pack_block(const KvView<Format>& view, const StoredRows& rows,
                            float* packed) noexcept {
  const PageShape& shape = view.shape;
  const auto row = static_cast<std::size_t>(rows.slot.value % shape.page_tokens);
  const int first = Format::template pack<Isa>(view.page_of(rows.slot), shape, row, rows.count,
                                               packed, packed + kBlockRows * shape.k_dim);
  return packed_block(packed, shape.k_dim, first, rows.count, rows.pos);
}

/// The step's own rows [begin, begin + count), rounded as the cache will store them.
/// @param packed  [packed_block_floats]
template <class Isa, class Format>
TileBlock<float> pack_own_block(const HeadProblem<Format>& problem, std::int64_t begin, int count,
                                float* packed) noexcept {
  const int k_dim = problem.past.shape.k_dim;
  const int v_dim = problem.past.shape.v_dim;
  float* strips = packed + kBlockRows * k_dim;
  float* room = strips + kBlockRows * v_dim;
  for_each_float_rows<Isa, kTile>(
      problem.own_k, begin, count, k_dim, room,
      [&](const float* rows, std::ptrdiff_t stride, int first, int num_rows) {
        Format::template pack_own_k<Isa>(rows, stride, num_rows, k_dim, packed + first * k_dim);
      });
  for_each_float_rows<Isa, kTile>(
      problem.own_v, begin, count, v_dim, room,
      [&](const float* rows, std::ptrdiff_t stride, int first, int num_rows) {
        Format::template pack_own_v<Isa>(rows, stride, num_rows, v_dim, strips + first * kTile);
      });
  return packed_block(packed, k_dim, 0, count, problem.first_query + begin);
}

}  // namespace headwise::inline v0::detail
