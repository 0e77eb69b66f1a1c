// SPDX-License-Identifier: MIT
/// @file tiles.hpp
/// Tiles: the order of elements that the CPU kernels multiply with, and how rows get into it.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <type_traits>

#include "headwise/core/config.hpp"
#include "headwise/core/dtype.hpp"
#include "headwise/core/page_shape.hpp"
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

/// Writes 16 elements of a row to a tile's column. Eight bytes are read at a time and cut in a
/// register: as many reads as writes take 1.2 times as long.
/// @param to  the column's first element; the others are 16 elements apart
template <class E>
HEADWISE_ALWAYS_INLINE void scatter_strip(const E* strip, E* to) {
  using Bits = std::conditional_t<sizeof(E) == 2, std::uint16_t, std::uint32_t>;
  constexpr int kBits = 8 * sizeof(Bits);
  static_assert(sizeof(E) == sizeof(Bits));
  constexpr int kAtOnce = 64 / kBits;
  for (int i = 0; i < kTile; i += kAtOnce) {
    std::uint64_t word;
    std::memcpy(&word, strip + i, sizeof word);
    for (int j = 0; j < kAtOnce; ++j) {
      const int place = std::endian::native == std::endian::little ? j : kAtOnce - 1 - j;
      to[(i + j) * kTile] = std::bit_cast<E>(static_cast<Bits>(word >> (place * kBits)));
    }
  }
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

/// Says that a line will be read soon, where the compiler has a word for it.
HEADWISE_ALWAYS_INLINE void prefetch([[maybe_unused]] const void* line) {
#if defined(__GNUC__) || defined(__clang__)
  __builtin_prefetch(line);
#endif
}

/// RowFormat's copy_rows for K [page_tokens / 16][k_dim][16 tokens] and V [v_dim / 16][page_tokens]
/// [16 dims], as TiledRows has them. Rows of one tile are moved together, one dimension after the
/// other, so that each of its lines is read once; the newest first, so that rows may move up within
/// a page.
template <class T>
void copy_tiled_rows(const T* from, std::span<const std::int32_t> rows, T* to, std::size_t to_row,
                     const PageShape& shape) {
  constexpr auto kRows = static_cast<std::size_t>(kTile);
  const auto k_dim = static_cast<std::size_t>(shape.k_dim);
  const auto page_tokens = static_cast<std::size_t>(shape.page_tokens);
  const auto k_offset = [&](std::size_t row) { return row / kRows * kRows * k_dim + row % kRows; };
  for (std::size_t end = rows.size(); end > 0;) {
    const std::size_t tile = static_cast<std::size_t>(rows[end - 1]) / kRows;
    std::size_t old_at[kRows];
    std::size_t new_at[kRows];
    std::size_t count = 0;  // newest first
    for (; end > 0 && static_cast<std::size_t>(rows[end - 1]) / kRows == tile; --end, ++count) {
      old_at[count] = k_offset(static_cast<std::size_t>(rows[end - 1]));
      new_at[count] = k_offset(to_row + end - 1);
    }
    // The tile below comes next, and its begin is no place where hardware would look ahead.
    const T* below = from + (tile == 0 ? 0 : tile - 1) * kRows * k_dim;
    for (std::size_t d = 0; d < k_dim * kRows; d += kRows) {
      prefetch(below + d);
      for (std::size_t i = 0; i < count; ++i) to[new_at[i] + d] = from[old_at[i] + d];
    }
  }
  const T* old_v = from + page_tokens * k_dim;
  T* new_v = to + page_tokens * k_dim;
  for (std::size_t d = 0; d < static_cast<std::size_t>(shape.v_dim); d += kRows) {
    for (std::size_t i = rows.size(); i > 0; --i) {
      T strip[kRows];
      std::memcpy(strip, old_v + d * page_tokens + static_cast<std::size_t>(rows[i - 1]) * kRows,
                  sizeof strip);
      std::memcpy(new_v + d * page_tokens + (to_row + i - 1) * kRows, strip, sizeof strip);
    }
  }
}

}  // namespace headwise::inline v0::detail
