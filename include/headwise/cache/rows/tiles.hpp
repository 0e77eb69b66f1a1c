// SPDX-License-Identifier: MIT
/// @file tiles.hpp
/// Tiles: the order of elements that the CPU kernels multiply with, and how rows get into it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "headwise/core/config.hpp"
#include "headwise/core/dtype.hpp"
#include "headwise/simd/simd.hpp"

namespace headwise::inline v0::detail {

/// 16 floats: one AVX-512 register, two AVX2 ones. Widths and page lengths are multiples of it.
inline constexpr int kTile = 16;

/// Rows that go through scores, softmax and output together. 64 scores of one query row are one
/// page's worth and stay in the nearest cache beside 64 K and V rows.
inline constexpr int kBlockRows = 64;

/// Up to 64 rows in tiles, where they lie.
template <class Element>
struct RowTiles {
  const Element* k = nullptr;   ///< [rows / 16][k_dim][16 rows]
  const Element* v = nullptr;   ///< [v_dim / 16][rows][16 dims], strips `v_stride` elements apart
  std::ptrdiff_t v_stride = 0;  ///< elements
};

/// Widens or rounds 16 elements.
template <class Isa, class From, class To>
HEADWISE_ALWAYS_INLINE void convert_strip(const From* from, To* to) {
  using O = simd::Ops<Isa>;
  for (int i = 0; i < kTile; i += O::kWidth) O::store(to + i, O::load(from + i));
}

/// Packs `count` rows of K into tiles of floats; the lanes of the last tile that have no row are
/// zero.
/// @param load  load(row, d): a register of the row's elements from d on
/// @param tiles  [kBlockRows / 16][dim][16]
template <class Isa, class Load>
HEADWISE_ALWAYS_INLINE void pack_k(int count, int dim, float* tiles, Load&& load) {
  using O = simd::Ops<Isa>;
  constexpr int kWidth = O::kWidth;
  for (int token = 0; token < (count + kTile - 1) / kTile * kTile; token += kWidth) {
    float* tile = tiles + token / kTile * kTile * dim + token % kTile;
    for (int d = 0; d < dim; d += kWidth) {
      typename O::V square[std::size_t{kWidth}];
      for (int i = 0; i < kWidth; ++i) {
        square[i] = token + i < count ? load(token + i, d) : O::zero();
      }
      O::transpose(square);
      for (int i = 0; i < kWidth; ++i) O::store(tile + (d + i) * kTile, square[i]);
    }
  }
}

/// Packs `count` rows of V into strips of floats.
/// @param load  as pack_k's
/// @param strips  [dim / 16][kBlockRows][16]
template <class Isa, class Load>
HEADWISE_ALWAYS_INLINE void pack_v(int count, int dim, float* strips, Load&& load) {
  using O = simd::Ops<Isa>;
  for (int token = 0; token < count; ++token) {
    for (int d = 0; d < dim; d += O::kWidth) {
      float* strip = strips + d / kTile * kTile * kBlockRows + token * kTile + d % kTile;
      O::store(strip, load(token, d));
    }
  }
}

}  // namespace headwise::inline v0::detail
