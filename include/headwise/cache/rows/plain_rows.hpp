// SPDX-License-Identifier: MIT
/// @file plain_rows.hpp
/// PlainRows: one row after the other, as CUDA, foreign kernels and engines' own arrays have them.
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

#include "headwise/cache/rows/element_rows.hpp"
#include "headwise/cache/rows/format.hpp"
#include "headwise/cache/rows/tiles.hpp"

namespace headwise::inline v0 {

/// K [page_tokens][k_dim], V [page_tokens][v_dim]. In memory of an engine's own, K and V may also
/// lie apart and rows at any distance: see KvView::over_rows.
/// @tparam E  what elements are rounded to, to nearest even: f32, f16 or bf16.
template <RowElement E>
struct PlainRows : detail::ElementRows<E> {
  /// Some rows of K and of V.
  struct Page {
    const E* k = nullptr;         ///< K row 0
    const E* v = nullptr;         ///< V row 0
    std::ptrdiff_t k_stride = 0;  ///< elements from one K row to the next
    std::ptrdiff_t v_stride = 0;  ///< elements from one V row to the next
  };

  /// Equally spaced pages.
  struct Memory {
    const std::byte* k = nullptr;   ///< K of page 0
    const std::byte* v = nullptr;   ///< V of page 0
    std::size_t k_page_stride = 0;  ///< bytes from one page's K to the next's
    std::size_t v_page_stride = 0;  ///< bytes from one page's V to the next's
    std::ptrdiff_t k_stride = 0;    ///< elements from one K row of a page to the next
    std::ptrdiff_t v_stride = 0;    ///< elements from one V row of a page to the next

    /// @see KvView::over_pages
    static Memory over_pages(const std::byte* pages, std::size_t page_stride,
                             const PageShape& shape) {
      return {pages,       pages + v_offset(shape, 0, 0) * sizeof(E),
              page_stride, page_stride,
              shape.k_dim, shape.v_dim};
    }
    /// @see KvView::over_rows
    static Memory over_rows(const E* k, const E* v, std::ptrdiff_t k_stride,
                            std::ptrdiff_t v_stride, const PageShape& shape) {
      const auto page_bytes = [&](std::ptrdiff_t stride) {
        return static_cast<std::size_t>(shape.page_tokens * stride) * sizeof(E);
      };
      return {reinterpret_cast<const std::byte*>(k),
              reinterpret_cast<const std::byte*>(v),
              page_bytes(k_stride),
              page_bytes(v_stride),
              k_stride,
              v_stride};
    }
    Page page(std::int64_t index) const {
      const auto at = [&](const std::byte* first, std::size_t stride) {
        return reinterpret_cast<const E*>(first + static_cast<std::size_t>(index) * stride);
      };
      return {at(k, k_page_stride), at(v, v_page_stride), k_stride, v_stride};
    }
  };

  static constexpr const char* name() {
    if constexpr (std::same_as<E, f32>) return "f32_plain";
    if constexpr (std::same_as<E, f16>) return "f16_plain";
    if constexpr (std::same_as<E, bf16>) return "bf16_plain";
  }

  /// Elements from the page's begin to element `dim` of K row `row`.
  static constexpr std::size_t k_offset(const PageShape& shape, std::size_t row, std::size_t dim) {
    return row * static_cast<std::size_t>(shape.k_dim) + dim;
  }
  /// Elements from the page's begin to element `dim` of V row `row`.
  static constexpr std::size_t v_offset(const PageShape& shape, std::size_t row, std::size_t dim) {
    return static_cast<std::size_t>(shape.page_tokens) * static_cast<std::size_t>(shape.k_dim) +
           row * static_cast<std::size_t>(shape.v_dim) + dim;
  }

  template <class Isa>
  static std::int64_t encode(std::byte* page, const PageShape& shape, std::size_t row,
                             const float* k, const float* v) {
    E* elements = reinterpret_cast<E*>(page);
    E* to_k = elements + k_offset(shape, row, 0);
    E* to_v = elements + v_offset(shape, row, 0);
    typename detail::ElementRows<E>::template Squares<Isa> squares;
    for (int d = 0; d < shape.k_dim; d += detail::kTile) {
      detail::convert_strip<Isa>(k + d, to_k + d);
      squares.add_strip(0, k + d);
    }
    for (int d = 0; d < shape.v_dim; d += detail::kTile) {
      detail::convert_strip<Isa>(v + d, to_v + d);
      squares.add_strip(1, v + d);
    }
    if (squares.are_little()) return 0;
    return PlainRows::template count_overflows<Isa>(shape, k, v);
  }

  template <class Isa>
  static void add_rows(const std::byte* page, const PageShape& shape, std::size_t first,
                       std::size_t last, double* k_sum, double* v_sum) {
    const E* elements = reinterpret_cast<const E*>(page);
    for (std::size_t row = first; row < last; ++row) {
      const E* k = elements + k_offset(shape, row, 0);
      const E* v = elements + v_offset(shape, row, 0);
      for (int d = 0; d < shape.k_dim; d += detail::kTile) {
        detail::add_strip<Isa>(k + d, k_sum + d);
      }
      for (int d = 0; d < shape.v_dim; d += detail::kTile) {
        detail::add_strip<Isa>(v + d, v_sum + d);
      }
    }
  }

  static void read_row(const Page& page, const PageShape& shape, std::size_t row, float* k,
                       float* v) {
    const auto r = static_cast<std::ptrdiff_t>(row);
    for (int d = 0; d < shape.k_dim; ++d) k[d] = to_float(page.k[r * page.k_stride + d]);
    for (int d = 0; d < shape.v_dim; ++d) v[d] = to_float(page.v[r * page.v_stride + d]);
  }

  static void copy_rows(const std::byte* from, std::span<const std::int32_t> rows, std::byte* to,
                        std::size_t to_row, const PageShape& shape) {
    const E* old_rows = reinterpret_cast<const E*>(from);
    E* new_rows = reinterpret_cast<E*>(to);
    const auto k_bytes = static_cast<std::size_t>(shape.k_dim) * sizeof(E);
    const auto v_bytes = static_cast<std::size_t>(shape.v_dim) * sizeof(E);
    for (std::size_t i = rows.size(); i > 0; --i) {
      const auto row = static_cast<std::size_t>(rows[i - 1]);
      if (i > 2) {  // rows lie anywhere: hardware does not find the next ones
        const auto ahead = static_cast<std::size_t>(rows[i - 3]);
        for (std::size_t d = 0; d < k_bytes; d += 64) {
          detail::prefetch(from + k_offset(shape, ahead, 0) * sizeof(E) + d);
        }
        for (std::size_t d = 0; d < v_bytes; d += 64) {
          detail::prefetch(from + v_offset(shape, ahead, 0) * sizeof(E) + d);
        }
      }
      std::memmove(new_rows + k_offset(shape, to_row + i - 1, 0),
                   old_rows + k_offset(shape, row, 0), k_bytes);
      std::memmove(new_rows + v_offset(shape, to_row + i - 1, 0),
                   old_rows + v_offset(shape, row, 0), v_bytes);
    }
  }

  template <class Isa>
  static int pack(const Page& page, const PageShape& shape, std::size_t row, int count,
                  float* k_tiles, float* v_strips) noexcept {
    using O = simd::Ops<Isa>;
    const E* k = page.k + static_cast<std::ptrdiff_t>(row) * page.k_stride;
    const E* v = page.v + static_cast<std::ptrdiff_t>(row) * page.v_stride;
    detail::pack_k<Isa>(count, shape.k_dim, k_tiles, [&, stride = page.k_stride](int r, int d) {
      return O::load(k + r * stride + d);
    });
    detail::pack_v<Isa>(count, shape.v_dim, v_strips, [&, stride = page.v_stride](int r, int d) {
      return O::load(v + r * stride + d);
    });
    return 0;
  }
};

}  // namespace headwise::inline v0
