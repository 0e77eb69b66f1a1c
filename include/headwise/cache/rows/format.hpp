// SPDX-License-Identifier: MIT
/// @file format.hpp
/// RowFormat: what a K and V row is inside a page. One file a format, and nothing else knows.
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>
#include <type_traits>

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

/// What a row format offers. A format is a type without objects. Either width of a shape may be 0:
/// such a page has K, or V, alone.
///
///     Memory            where pages lie: over_pages(), page(index)
///     Page              one page, as Memory::page() gives it and as made of a `const std::byte*`
///     name()            for people and test names
///     page_bytes(shape) bytes of a page, a multiple of 64
///     encode<Isa>(page, shape, row, k, v)
///                       stores a token's K [k_dim] and V [v_dim]; returns how many of its finite
///                       elements became infinite
///     count_overflows<Isa>(shape, k, v)
///                       the same of a token that is not stored
///     add_rows<Isa>(page, shape, first, last, k_sum, v_sum)
///                       adds rows [first, last), as read, to sums in double
///     read_row(page, shape, row, k, v)
///                       one row as floats
///     copy_rows(from, rows, to, to_row, shape)
///                       rows `rows` of a page, ascending, to rows [to_row, to_row + rows.size())
///                       of another, bit for bit; or of the same, where none moves down
///     round_row(shape, k, v, to_k, to_v)
///                       what storing a token and reading it would give, bit for bit
///     pack<Isa>(page, shape, row, count, k, v)
///                       rows [row, row + count), within 64 that begin at a multiple of 64, to
///                       tiles of floats (tiles.hpp); returns the tiles' row that the first one
///                       became
///     pack_own_k<Isa>(rows, stride, count, dim, tiles), pack_own_v<Isa>(...)
///                       rows that a step has yet to store, rounded like round_row, likewise
///
/// A format that stores 16 tokens faster than one after the other also has
/// `encode_tile<Isa>(page, shape, row, k, k_stride, v, v_stride)`, `row` a multiple of 16.
///
/// A format whose elements lie in tiles already also has `tiles(page, shape, row)`: decode then
/// reads the 64 rows around `row` where they are, integers with their scales. One that stores K
/// turned has `rotate_k(x, k_dim, to)`, which turns q likewise.
template <class F>
concept RowFormat = requires(std::byte* page, typename F::Page stored, const PageShape& shape,
                             std::size_t row, const float* from, float* to, double* sums,
                             std::ptrdiff_t stride, int n, std::span<const std::int32_t> rows) {
  typename F::Memory;
  { F::name() } -> std::convertible_to<const char*>;
  { F::page_bytes(shape) } -> std::same_as<std::size_t>;
  { F::template encode<simd::Scalar>(page, shape, row, from, from) } -> std::same_as<std::int64_t>;
  { F::template count_overflows<simd::Scalar>(shape, from, from) } -> std::same_as<std::int64_t>;
  F::template add_rows<simd::Scalar>(page, shape, row, row, sums, sums);
  F::read_row(stored, shape, row, to, to);
  F::copy_rows(static_cast<const std::byte*>(page), rows, page, row, shape);
  F::round_row(shape, from, from, to, to);
  { F::template pack<simd::Scalar>(stored, shape, row, n, to, to) } -> std::same_as<int>;
  F::template pack_own_k<simd::Scalar>(from, stride, n, n, to);
  F::template pack_own_v<simd::Scalar>(from, stride, n, n, to);
};

/// A format that stores 16 tokens at once.
template <class F>
concept EncodesTiles = requires(std::byte* page, const PageShape& shape, const float* from) {
  F::template encode_tile<simd::Scalar>(page, shape, std::size_t{}, from, 0, from, 0);
};

/// A format that the decode kernel reads without packing.
template <class F>
concept TiledInPlace = requires(typename F::Page page, const PageShape& shape, std::size_t row) {
  F::tiles(page, shape, row);
};

/// A format whose stored K, as tiles and packed, has been turned: q has to be, too.
template <class F>
concept RotatesK = requires(const float* x, int dim, float* to) {
  { F::rotate_k(x, dim, to) } -> std::same_as<const float*>;
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

/// The few formats that one cache holds, each for some classes of its heads: see
/// CacheOptions::format_of. KvCache<Formats<Int4Rows, f16>> keeps retrieval heads as int4.
template <class... Rows>
  requires(sizeof...(Rows) > 0)
struct Formats {};

namespace detail {
template <class T>
struct FormatListTrait {
  using type = Formats<FormatOf<T>>;
};
template <class... Rows>
struct FormatListTrait<Formats<Rows...>> {
  using type = Formats<FormatOf<Rows>...>;
};

template <class List>
struct FormatListOf;
template <class First, class... Rest>
struct FormatListOf<Formats<First, Rest...>> {
  using Front = First;
  static constexpr int kCount = 1 + static_cast<int>(sizeof...(Rest));
  static constexpr bool kAreFormats = RowFormat<First> && (RowFormat<Rest> && ...);
  static constexpr std::size_t (*kPageBytes[])(const PageShape&) = {&First::page_bytes,
                                                                    &Rest::page_bytes...};

  /// `fn(std::type_identity<Format>)` of the one at `idx`, which exists.
  template <class Fn>
  static decltype(auto) visit([[maybe_unused]] int idx, Fn&& fn) {
    if constexpr (sizeof...(Rest) > 0) {
      if (idx > 0) return FormatListOf<Formats<Rest...>>::visit(idx - 1, fn);
    }
    return fn(std::type_identity<First>{});
  }
};
}  // namespace detail

/// The list that a cache's argument names: of one, or Formats' own.
template <class T>
using FormatList = detail::FormatListOf<typename detail::FormatListTrait<T>::type>;

}  // namespace headwise::inline v0
