// SPDX-License-Identifier: MIT
/// @file tile_product.hpp
/// The one inner kernel: a few rows times a few tiles. Scores are q times K tiles, outputs are
/// probabilities times V strips; decode runs it over stored elements, prefill over packed floats.
#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>

#include "headwise/cache/rows/tiles.hpp"
#include "headwise/core/config.hpp"
#include "headwise/core/dtype.hpp"
#include "headwise/simd/simd.hpp"

#ifdef __NVCC__  // leaves "GCC unroll" to the host compiler, and says so at each one
#pragma nv_diagnostic push
#pragma nv_diag_suppress 1675
#endif

namespace headwise::inline v0::detail {

/// Columns of a panel of the left factor. A row of a panel lies a constant distance behind the one
/// before, so that one pointer and constants address all rows of a block: with a stride known only
/// at run time g++ keeps row pointers in vector registers, and moving them back takes 5 % of the
/// FMA ports' time (AVX-512, 8 rows). 64 is the width of a block's scores, which are one panel.
inline constexpr int kPanel = 64;

/// Bytes from each line that is read to the lines that are fetched meanwhile.
struct Prefetch {
  std::ptrdiff_t near = 0;  ///< read next: into the nearest cache
  std::ptrdiff_t far = 0;   ///< read after that: into the second
};

/// c[r][t * 16 + lane] = c[r][..] * rescale[r] + sum over i of a[r][i] * b[t][i][lane]
/// for `num_rows` rows r, `num_tiles` tiles t and `depth` steps i.
///
/// Where b has scales, of columns, each b[t][i][lane] is multiplied by that of the group of i; the
/// sum over a group is. Where stored tiles hold two tiles of values each (kTiles of TileElement), t
/// counts stored ones, and each has an `a` of its own: that is where their columns' scales went.
template <class Element>
struct TileProduct {
  const float* a = nullptr;  ///< [depth / 64][num_rows][64], panels `a_stride` floats apart
  std::ptrdiff_t a_stride = 0;
  std::ptrdiff_t a_tile = 0;   ///< floats from one tile's `a` to the next's, where it has its own
  const Element* b = nullptr;  ///< [num_tiles][depth][16], tiles `b_stride` elements apart
  std::ptrdiff_t b_stride = 0;
  /// [groups][num_tiles * 16], groups `scale_stride` scales apart; null: there are none
  const bf16* scales = nullptr;
  std::ptrdiff_t scale_stride = 0;
  float* c = nullptr;  ///< [num_rows][c_stride]
  std::ptrdiff_t c_stride = 0;
  const float* rescale = nullptr;  ///< [num_rows]; null: c is written, not added to
  int num_rows = 0;
  int num_tiles = 0;
  int num_columns = 0;  ///< where a stored tile holds several: those that c has
  int depth = 0;
  Prefetch fetch;  ///< for each line of b
};

/// Registers that hold sums. The rest hold one step of b, a broadcast of a, and temporaries.
/// At least 8 sums are in flight wherever there is the work: two FMA ports, four cycles each.
template <class Isa>
constexpr int num_sum_registers() {
  if constexpr (std::same_as<Isa, simd::Avx512>) return 16;  // of 32
  if constexpr (std::same_as<Isa, simd::Avx2>) return 12;    // of 16
  if constexpr (std::same_as<Isa, simd::Neon>) return 16;    // of 32
  return 32;  // Scalar: floats in memory or in whatever registers the compiler finds
}

template <class Isa>
inline constexpr int kVectorsPerTile = kTile / simd::Ops<Isa>::kWidth;

/// Sums that a row has of one stored tile.
template <class Isa, class Element>
inline constexpr int kSumsPerTile = kVectorsPerTile<Isa>* TileElement<Element>::kTiles;

/// Most rows that one call of the inner loop serves.
template <class Isa, class Element>
inline constexpr int kMaxBlockRows = std::min(8, num_sum_registers<Isa>() /
                                                     std::max(2, kSumsPerTile<Isa, Element>));

/// Most tiles side by side, a power of two.
template <class Isa, class Element, int kRows>
constexpr int max_block_tiles() {
  const int tiles = num_sum_registers<Isa>() / (kRows * kSumsPerTile<Isa, Element>);
  return tiles >= 4 ? 4 : std::max(1, tiles & 2);
}

template <class Isa, bool kFetch, int kRows, int kTiles, class Element>
void multiply_block(const TileProduct<Element>& p, int row, int tile) noexcept {
  using O = simd::Ops<Isa>;
  using V = typename O::V;
  using Stored = TileElement<Element>;
  constexpr int kVectors = kTiles * kSumsPerTile<Isa, Element>;
  // Lines per cache line: one prefetch each into either cache.
  constexpr int kLines = kFetch ? static_cast<int>(64 / (kTile * sizeof(Element))) : 1;
  // Steps between which sums are scaled, or else of a panel.
  constexpr bool kIsGrouped = Stored::kSteps > 1;
  constexpr int kRun = kIsGrouped ? Stored::kGroup : kPanel;

  const float* HEADWISE_RESTRICT a = p.a + row * kPanel;
  const Element* HEADWISE_RESTRICT b = p.b + tile * p.b_stride;
  float* c = p.c + row * p.c_stride + tile * (kTile * Stored::kTiles);
  [[maybe_unused]] const int columns = p.num_columns - tile * (kTile * Stored::kTiles);
  if constexpr (Stored::kTiles > 1) a += tile * p.a_tile;

  // The last stored tile may be half empty.
  const auto has_column = [&]([[maybe_unused]] int v) {
    if constexpr (Stored::kTiles == 1) {
      return true;
    } else {
      return v * O::kWidth < columns;
    }
  };

  V sum[std::size_t{kRows}][std::size_t{kVectors}];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const V factor = p.rescale != nullptr ? O::broadcast(p.rescale[row + r]) : O::zero();
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      sum[r][v] = p.rescale != nullptr && has_column(v)
                      ? O::mul(factor, O::load(c + r * p.c_stride + v * O::kWidth))
                      : O::zero();
    }
  }

  const auto line = [&](int i) {  // within a run
    V columns_of[std::size_t{Stored::kSteps}][std::size_t{kVectors}];
#pragma GCC unroll 16
    for (int stored = 0; stored < kTiles * kVectorsPerTile<Isa>; ++stored) {
      const int t = stored / kVectorsPerTile<Isa>;
      const int lane = stored % kVectorsPerTile<Isa> * O::kWidth;
      V values[std::size_t{Stored::kSteps * Stored::kTiles}];
      load_values<Isa>(b + t * p.b_stride + i * kTile + lane, values);
      if constexpr (Stored::kTiles == 1) {
#pragma GCC unroll 2
        for (int s = 0; s < Stored::kSteps; ++s) columns_of[s][stored] = values[s];
      } else {
#pragma GCC unroll 2
        for (int half = 0; half < Stored::kTiles; ++half) {
          columns_of[0][(t * Stored::kTiles + half) * kVectorsPerTile<Isa> +
                        stored % kVectorsPerTile<Isa>] = values[half];
        }
      }
    }
#pragma GCC unroll 2
    for (int s = 0; s < Stored::kSteps; ++s) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const float* x = a + r * kPanel + i * Stored::kSteps + s;
        if constexpr (Stored::kTiles == 1) {
          const V factor = O::broadcast(*x);
#pragma GCC unroll 16
          for (int v = 0; v < kVectors; ++v) {
            sum[r][v] = O::fma(factor, columns_of[s][v], sum[r][v]);
          }
        } else {
#pragma GCC unroll 16
          for (int v = 0; v < kVectors; ++v) {
            const V factor = O::broadcast(x[v / kSumsPerTile<Isa, Element> * p.a_tile]);
            sum[r][v] = O::fma(factor, columns_of[s][v], sum[r][v]);
          }
        }
      }
    }
  };

  /// Sums so far times their columns' scales: added to those of the groups before.
  const auto scale_sums = [&](int group) {
    const auto* scales = p.scales + group * p.scale_stride + tile * kTile;
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      const V scale = O::load(scales + v * O::kWidth);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        if (group == 0) {
          sum[r][v] = O::mul(sum[r][v], scale);
        } else {
          sum[r][v] = O::fma(sum[r][v], scale, O::load(c + r * p.c_stride + v * O::kWidth));
        }
      }
    }
  };

  for (int done = 0; done < p.depth; done += kRun) {
    const int lines = std::min(p.depth - done, kRun) / Stored::kSteps;
    int i = 0;
    for (; i + kLines <= lines; i += kLines) {
      if constexpr (kFetch) {
#pragma GCC unroll 4
        for (int t = 0; t < kTiles; ++t) {
          const auto* from = reinterpret_cast<const char*>(b + t * p.b_stride + i * kTile);
          __builtin_prefetch(from + p.fetch.near);
          __builtin_prefetch(from + p.fetch.far, 0, 2);
        }
      }
#pragma GCC unroll 4
      for (int j = 0; j < kLines; ++j) line(i + j);
    }
    for (; i < lines; ++i) line(i);
    b += kRun / Stored::kSteps * kTile;
    if constexpr (kIsGrouped) {
      a += kRun;
      if ((done + kRun) % kPanel == 0) a += p.a_stride - kPanel;
      scale_sums(done / kRun);
      if (done + kRun >= p.depth) break;
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
        for (int v = 0; v < kVectors; ++v) {
          O::store(c + r * p.c_stride + v * O::kWidth, sum[r][v]);
          sum[r][v] = O::zero();
        }
      }
    } else {
      a += p.a_stride;
    }
  }
  if constexpr (kIsScaled<Element> && !kIsGrouped && Stored::kTiles == 1) {
    if (p.scales != nullptr) scale_sums(0);
  }

#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
    for (int v = 0; v < kVectors; ++v) {
      if (has_column(v)) O::store(c + r * p.c_stride + v * O::kWidth, sum[r][v]);
    }
  }
}

/// Tiles [tile, tile_end) for `kRows` rows: as many side by side as the registers hold, then fewer.
template <class Isa, bool kFetch, int kRows, class Element>
void multiply_rows(const TileProduct<Element>& p, int row, int tile, int tile_end) noexcept {
  constexpr int kMost = max_block_tiles<Isa, Element, kRows>();
  for (; tile + kMost <= tile_end; tile += kMost) {
    multiply_block<Isa, kFetch, kRows, kMost>(p, row, tile);
  }
  if constexpr (kMost > 2) {
    for (; tile + 2 <= tile_end; tile += 2) multiply_block<Isa, kFetch, kRows, 2>(p, row, tile);
  }
  if constexpr (kMost > 1) {
    for (; tile < tile_end; ++tile) multiply_block<Isa, kFetch, kRows, 1>(p, row, tile);
  }
}

/// Turns a run-time number of rows in [1, kRows] into a template argument.
template <class Isa, bool kFetch, int kRows, class Element>
HEADWISE_ALWAYS_INLINE void multiply_num_rows(const TileProduct<Element>& p, int row, int num_rows,
                                              int tile, int tile_end) noexcept {
  if (num_rows == kRows) {
    multiply_rows<Isa, kFetch, kRows>(p, row, tile, tile_end);
  } else if constexpr (kRows > 1) {
    multiply_num_rows<Isa, kFetch, kRows - 1>(p, row, num_rows, tile, tile_end);
  }
}

/// Few rows: every tile is read once. Many rows: a panel of tiles that fits the nearest cache
/// beside a block of rows is kept there while all rows pass by.
template <class Isa, bool kFetch, class Element>
void multiply_tiles(const TileProduct<Element>& p) noexcept {
  constexpr int kMostRows = kMaxBlockRows<Isa, Element>;
  const int blocks = (p.num_rows + kMostRows - 1) / kMostRows;
  const int panel = blocks == 1 ? p.num_tiles : max_block_tiles<Isa, Element, kMostRows>();
  for (int tile = 0; tile < p.num_tiles; tile += panel) {
    const int tile_end = std::min(tile + panel, p.num_tiles);
    for (int block = 0; block < blocks; ++block) {
      // Rows are shared out evenly: 9 are 4 + 5, not 8 + 1.
      const int row = block * p.num_rows / blocks;
      const int row_end = (block + 1) * p.num_rows / blocks;
      multiply_num_rows<Isa, kFetch, kMostRows>(p, row, row_end - row, tile, tile_end);
    }
  }
}

}  // namespace headwise::inline v0::detail

#ifdef __NVCC__
#pragma nv_diagnostic pop
#endif
