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

/// Four-bit integers of K, two a byte: one row's dimensions 2i (low half) and 2i + 1.
struct Int4Steps {
  std::uint8_t bits = 0;  ///< two's complement
};
/// Four-bit integers of V, two a byte: one row's dimensions i (low half) and i + 16 of 32.
struct Int4Columns {
  std::uint8_t bits = 0;  ///< two's complement
};

/// What lies in a tile. A line of a tile is 16 stored elements; most elements are one value each.
template <class Element>
struct TileElement {
  static constexpr int kSteps = 1;  ///< lines of values that follow one another in one such line
  static constexpr int kTiles = 1;  ///< tiles of values that lie side by side in it
  static constexpr int kGroup = 0;  ///< dimensions of a row that share a scale; 0: all of them
};
template <>
struct TileElement<Int4Steps> {
  static constexpr int kSteps = 2;
  static constexpr int kTiles = 1;
  static constexpr int kGroup = 32;
};
template <>
struct TileElement<Int4Columns> {
  static constexpr int kSteps = 1;
  static constexpr int kTiles = 2;
  static constexpr int kGroup = 32;
};

/// Whether values are integers, which have scales.
template <class Element>
inline constexpr bool kIsScaled = !RowElement<Element>;

/// K, or V, of up to 64 rows in tiles, where they lie.
template <class Element>
struct Tiles {
  /// K: [rows / 16][k_dim][16 rows]. V: [v_dim / 16][rows][16 dims].
  const Element* data = nullptr;
  std::ptrdiff_t stride = 0;  ///< elements from one tile or strip to the next
  /// [groups of dims][rows], null: there are none. bf16: an integer of up to 16 bits times a scale
  /// is exact in float, and reaches as far.
  const bf16* scales = nullptr;
  std::ptrdiff_t scale_stride = 0;  ///< scales from one group to the next
};

/// Up to 64 rows in tiles, where they lie.
template <class KElement, class VElement = KElement>
struct RowTiles {
  Tiles<KElement> k;
  Tiles<VElement> v;
};

/// K of one format's tiles, V of another's.
template <class KElement, class VElement, class OtherV, class OtherK>
HEADWISE_ALWAYS_INLINE RowTiles<KElement, VElement> join(const RowTiles<KElement, OtherV>& k,
                                                         const RowTiles<OtherK, VElement>& v) {
  return {k.k, v.v};
}

/// The values that a register's width of stored elements holds.
template <class Isa, class Element>
HEADWISE_ALWAYS_INLINE void load_values(
    const Element* from,
    typename simd::Ops<Isa>::V (
        &values)[std::size_t{TileElement<Element>::kSteps * TileElement<Element>::kTiles}]) {
  if constexpr (TileElement<Element>::kSteps * TileElement<Element>::kTiles == 1) {
    values[0] = simd::Ops<Isa>::load(from);
  } else {
    simd::Ops<Isa>::load_int4(&from->bits, values[0], values[1]);
  }
}

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
