// SPDX-License-Identifier: MIT
/// @file format.hpp
/// RowFormat: what a K and V row is inside a page. One file a format, and nothing else knows.
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>

#include "headwise/core/dtype.hpp"
#include "headwise/core/page_shape.hpp"
#include "headwise/simd/isa.hpp"

namespace headwise::inline v0 {

/// Pages of any format whose K and V lie in one piece.
struct PagedMemory {
  const std::byte* pages = nullptr;  ///< page 0; 64-byte aligned
  std::size_t page_stride = 0;       ///< bytes from one page to the next

  /// @see KvView::over_pages
  static constexpr PagedMemory over_pages(const std::byte* pages, std::size_t page_stride,
                                          const PageShape&) {
    return {pages, page_stride};
  }
  /// First byte of a page.
  const std::byte* page(std::int64_t index) const {
    return pages + static_cast<std::size_t>(index) * page_stride;
  }
};

/// What a row format offers. A format is a type without objects.
///
///     Memory            where pages lie: over_pages(), page(index)
///     Page              one page, as Memory::page() gives it and as made of a `const std::byte*`
///     name()            for people and test names
///     page_bytes(shape) bytes of a page, a multiple of 64
///     encode<Isa>(page, shape, row, k, v)
///                       stores a token's K [k_dim] and V [v_dim]; returns how many of its finite
///                       elements became infinite
///     count_overflows<Isa>(row, dim)
///                       the same of one K or V row that is not stored
///     add_rows<Isa>(page, shape, first, last, k_sum, v_sum)
///                       adds rows [first, last), as read, to sums in double
///     read_row(page, shape, row, k, v)
///                       one row as floats
///     copy_rows(from, rows, to, to_row, shape)
///                       rows `rows` of a page, ascending, to rows [to_row, to_row + rows.size())
///                       of another, bit for bit; or of the same, where none moves down
///     round_row(from, dim, to)
///                       what storing a K or V row and reading it would give, bit for bit
///     pack<Isa>(page, shape, row, count, k, v)
///                       rows [row, row + count), within 64 that begin at a multiple of 64, to
///                       tiles of floats (tiles.hpp); returns the tiles' row that the first one
///                       became
///     pack_own_k<Isa>(rows, stride, count, dim, tiles), pack_own_v<Isa>(...)
///                       rows that a step has yet to store, rounded like round_row, likewise
///
/// A format whose elements lie in tiles already and need no scale also has `Element` and
/// `tiles(page, shape, row)`: decode then reads the 64 rows around `row` where they are.
template <class F>
concept RowFormat = requires(std::byte* page, typename F::Page stored, const PageShape& shape,
                             std::size_t row, const float* from, float* to, double* sums,
                             std::ptrdiff_t stride, int n, std::span<const std::int32_t> rows) {
  typename F::Memory;
  { F::name() } -> std::convertible_to<const char*>;
  { F::page_bytes(shape) } -> std::same_as<std::size_t>;
  { F::template encode<simd::Scalar>(page, shape, row, from, from) } -> std::same_as<std::int64_t>;
  { F::template count_overflows<simd::Scalar>(from, n) } -> std::same_as<std::int64_t>;
  F::template add_rows<simd::Scalar>(page, shape, row, row, sums, sums);
  F::read_row(stored, shape, row, to, to);
  F::copy_rows(static_cast<const std::byte*>(page), rows, page, row, shape);
  F::round_row(from, n, to);
  { F::template pack<simd::Scalar>(stored, shape, row, n, to, to) } -> std::same_as<int>;
  F::template pack_own_k<simd::Scalar>(from, stride, n, n, to);
  F::template pack_own_v<simd::Scalar>(from, stride, n, n, to);
};

/// A format that the decode kernel reads without packing.
template <class F>
concept TiledInPlace = requires(typename F::Page page, const PageShape& shape, std::size_t row) {
  typename F::Element;
  F::tiles(page, shape, row);
};

template <RowElement E>
struct TiledRows;

namespace detail {
template <class T>
struct FormatOfTrait {
  using type = T;
};
template <RowElement E>
struct FormatOfTrait<E> {
  using type = TiledRows<E>;
};
}  // namespace detail

/// The format that a cache's argument names: an element type names the one that the CPU kernels
/// read fastest, a format itself. KvCache<f16> keeps TiledRows<f16>.
template <class T>
using FormatOf = typename detail::FormatOfTrait<T>::type;

}  // namespace headwise::inline v0
