// SPDX-License-Identifier: MIT
/// @file tiled_rows.hpp
/// TiledRows: elements in the order in which the CPU kernels read them.
#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>

#include "headwise/cache/rows/element_rows.hpp"
#include "headwise/cache/rows/format.hpp"
#include "headwise/cache/rows/tiles.hpp"

namespace headwise::inline v0 {

/// K [page_tokens / 16][k_dim][16 tokens], V [v_dim / 16][page_tokens][16 dims].
///
/// One K load serves 16 tokens of one dimension, so q.k needs no horizontal sums, and a tile is
/// already the packed operand of prefill's matrix product. Reads 1.4-1.6x faster than plain rows.
/// @tparam E  what elements are rounded to, to nearest even: f32, f16 or bf16.
template <RowElement E>
struct TiledRows : detail::ElementRows<E> {
  using Memory = PagedMemory;
  using Page = const std::byte*;

  static constexpr const char* name() {
    if constexpr (std::same_as<E, f32>) return "f32_tiled";
    if constexpr (std::same_as<E, f16>) return "f16_tiled";
    if constexpr (std::same_as<E, bf16>) return "bf16_tiled";
  }

  /// Elements from the page's begin to element `dim` of K row `row`.
  static constexpr std::size_t k_offset(const PageShape& shape, std::size_t row, std::size_t dim) {
    return row / kRows * kRows * static_cast<std::size_t>(shape.k_dim) + dim * kRows + row % kRows;
  }
  /// Elements from the page's begin to element `dim` of V row `row`.
  static constexpr std::size_t v_offset(const PageShape& shape, std::size_t row, std::size_t dim) {
    const auto page_tokens = static_cast<std::size_t>(shape.page_tokens);
    return page_tokens * static_cast<std::size_t>(shape.k_dim) + dim / kRows * kRows * page_tokens +
           row * kRows + dim % kRows;
  }

  template <class Isa>
  static std::int64_t encode(std::byte* page, const PageShape& shape, std::size_t row,
                             const float* k, const float* v) {
    E* elements = reinterpret_cast<E*>(page);
    Squares<Isa> squares;
    for (std::size_t dim = 0; dim < static_cast<std::size_t>(shape.k_dim); dim += kRows) {
      alignas(64) E strip[kRows];
      detail::convert_strip<Isa>(k + dim, strip);
      detail::scatter_strip(strip, elements + k_offset(shape, row, dim));
      squares.add_strip(0, k + dim);
    }
    for (std::size_t dim = 0; dim < static_cast<std::size_t>(shape.v_dim); dim += kRows) {
      detail::convert_strip<Isa>(v + dim, elements + v_offset(shape, row, dim));
      squares.add_strip(1, v + dim);
    }
    if (squares.are_little()) return 0;
    return TiledRows::template count_overflows<Isa>(shape, k, v);
  }

  /// encode() of 16 tokens that fill a tile: squares of them are turned in registers, and lines are
  /// written whole.
  /// @param row  a multiple of 16
  /// @param k,v  the first token's; strides in floats from one to the next
  template <class Isa>
  static std::int64_t encode_tile(std::byte* page, const PageShape& shape, std::size_t row,
                                  const float* k, std::ptrdiff_t k_stride, const float* v,
                                  std::ptrdiff_t v_stride) {
    using O = simd::Ops<Isa>;
    constexpr int kWidth = O::kWidth;
    constexpr int kSums = Squares<Isa>::kSums;
    E* elements = reinterpret_cast<E*>(page);
    Squares<Isa> squares;
    E* tile = elements + k_offset(shape, row, 0);
    for (int token = 0; token < detail::kTile; token += kWidth) {
      for (int d = 0; d < shape.k_dim; d += kWidth) {
        typename O::V square[std::size_t{kWidth}];
        for (int i = 0; i < kWidth; ++i) {
          square[i] = O::load(k + (token + i) * k_stride + d);
          squares.add(i % kSums, square[i]);
        }
        O::transpose(square);
        for (int i = 0; i < kWidth; ++i)
          O::store(tile + (d + i) * detail::kTile + token, square[i]);
      }
    }
    for (int d = 0; d < shape.v_dim; d += detail::kTile) {
      E* strip = elements + v_offset(shape, row, static_cast<std::size_t>(d));
      for (int i = 0; i < detail::kTile; ++i) {
        detail::convert_strip<Isa>(v + i * v_stride + d, strip + i * detail::kTile);
        squares.add_strip(i % kSums, v + i * v_stride + d);
      }
    }
    std::int64_t overflows = 0;
    for (int i = 0; i < detail::kTile && !squares.are_little(); ++i) {
      overflows +=
          TiledRows::template count_overflows<Isa>(shape, k + i * k_stride, v + i * v_stride);
    }
    return overflows;
  }

  template <class Isa>
  static void add_rows(const std::byte* page, const PageShape& shape, std::size_t first,
                       std::size_t last, double* k_sum, double* v_sum) {
    const E* elements = elements_of(page);
    for (std::size_t dim = 0; dim < static_cast<std::size_t>(shape.v_dim); dim += kRows) {
      for (std::size_t row = first; row < last; ++row) {
        detail::add_strip<Isa>(elements + v_offset(shape, row, dim), v_sum + dim);
      }
    }
    for (std::size_t dim = 0; dim < static_cast<std::size_t>(shape.k_dim); ++dim) {
      for (std::size_t row = first; row < last;) {  // one dimension of up to 16 tokens at a time
        const std::size_t lane = row % kRows;
        const std::size_t lanes = std::min(kRows - lane, last - row);
        alignas(64) float tokens[kRows];
        detail::convert_strip<Isa>(elements + k_offset(shape, row - lane, dim), tokens);
        for (std::size_t i = 0; i < lanes; ++i) {
          k_sum[dim] += static_cast<double>(tokens[lane + i]);
        }
        row += lanes;
      }
    }
  }

  static void read_row(Page page, const PageShape& shape, std::size_t row, float* k, float* v) {
    const E* elements = elements_of(page);
    for (std::size_t d = 0; d < static_cast<std::size_t>(shape.k_dim); ++d) {
      k[d] = to_float(elements[k_offset(shape, row, d)]);
    }
    for (std::size_t d = 0; d < static_cast<std::size_t>(shape.v_dim); ++d) {
      v[d] = to_float(elements[v_offset(shape, row, d)]);
    }
  }

  static void copy_rows(const std::byte* from, std::span<const std::int32_t> rows, std::byte* to,
                        std::size_t to_row, const PageShape& shape) {
    detail::copy_tiled_rows(elements_of(from), rows, reinterpret_cast<E*>(to), to_row, shape);
  }

  /// The 64 rows around `row` (as many as the page has), where they lie.
  HEADWISE_ALWAYS_INLINE static detail::RowTiles<E> tiles(Page page, const PageShape& shape,
                                                          std::size_t row) {
    const std::size_t block = row / detail::kBlockRows * detail::kBlockRows;
    const E* elements = elements_of(page);
    return {{elements + k_offset(shape, block, 0),
             static_cast<std::ptrdiff_t>(shape.k_dim) * detail::kTile},
            {elements + v_offset(shape, block, 0),
             static_cast<std::ptrdiff_t>(shape.page_tokens) * detail::kTile}};
  }

  template <class Isa>
  static int pack(Page page, const PageShape& shape, std::size_t row, int count, float* k,
                  float* v) noexcept {
    const detail::RowTiles<E> stored = tiles(page, shape, row);
    const int first = static_cast<int>(row % detail::kBlockRows);
    const std::ptrdiff_t k_begin = first / detail::kTile * stored.k.stride;
    const std::ptrdiff_t k_end =
        (first + count + detail::kTile - 1) / detail::kTile * stored.k.stride;
    widen<Isa>(stored.k.data + k_begin, k_end - k_begin, k + k_begin);
    for (int strip = 0; strip < shape.v_dim / detail::kTile; ++strip) {
      widen<Isa>(stored.v.data + strip * stored.v.stride + first * detail::kTile,
                 static_cast<std::ptrdiff_t>(count) * detail::kTile,
                 v + (strip * detail::kBlockRows + first) * detail::kTile);
    }
    return first;
  }

 private:
  template <class Isa>
  using Squares = typename detail::ElementRows<E>::template Squares<Isa>;
  static constexpr std::size_t kRows = detail::kTile;

  static const E* elements_of(const std::byte* page) { return reinterpret_cast<const E*>(page); }

  template <class Isa>
  static void widen(const E* from, std::ptrdiff_t count, float* to) noexcept {
    using O = simd::Ops<Isa>;
    for (std::ptrdiff_t i = 0; i < count; i += O::kWidth) O::store(to + i, O::load(from + i));
  }
};

}  // namespace headwise::inline v0
