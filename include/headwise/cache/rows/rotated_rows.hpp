// SPDX-License-Identifier: MIT
/// @file rotated_rows.hpp
/// RotatedRows: K turned by a Hadamard matrix before another format stores it, and q with it.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "headwise/cache/rows/format.hpp"
#include "headwise/cache/rows/tiles.hpp"
#include "headwise/core/bits.hpp"
#include "headwise/core/check.hpp"
#include "headwise/core/config.hpp"
#include "headwise/core/page_shape.hpp"

namespace headwise::inline v0 {

namespace detail {

/// Widest K that is rotated: a tile of 16 such rows is on the stack.
inline constexpr int kMaxRotatedDim = 512;

/// Dimensions that are mixed: the largest power of two that divides the width.
constexpr int rotation_block(int dim) { return dim & -dim; }

/// A fixed sign for each dimension, without which a vector of equal elements would become one large
/// one.
constexpr bool is_flipped(int d) {
  return (std::popcount(static_cast<std::uint32_t>(d) * 0x9E3779B9U >> 16) & 1) != 0;
}

/// The orthonormal Hadamard matrix times each block of `x`. Its own inverse.
inline void multiply_hadamard(float* x, int dim) {
  const int block = rotation_block(dim);
  const float scale = 1.0F / std::sqrt(static_cast<float>(block));
  for (int d = 0; d < dim; ++d) x[d] *= scale;
  for (int half = 1; half < block; half *= 2) {
    for (int begin = 0; begin < dim; begin += 2 * half) {
      for (int d = begin; d < begin + half; ++d) {
        const float a = x[d], b = x[d + half];
        x[d] = a + b;
        x[d + half] = a - b;
      }
    }
  }
}

/// Never inlined, like rotate_back(): storing a row and rounding it turn it by the very same
/// instructions.
/// @param from,to  [dim], apart
/// @return to
HEADWISE_NEVER_INLINE inline const float* rotate(const float* from, int dim, float* to) {
  for (int d = 0; d < dim; ++d) to[d] = is_flipped(d) ? -from[d] : from[d];
  multiply_hadamard(to, dim);
  return to;
}

/// The inverse of rotate(), in place.
HEADWISE_NEVER_INLINE inline void rotate_back(float* x, int dim) {
  multiply_hadamard(x, dim);
  for (int d = 0; d < dim; ++d) x[d] = is_flipped(d) ? -x[d] : x[d];
}

}  // namespace detail

/// K multiplied by a Hadamard matrix (with fixed signs, in blocks of the largest power of two that
/// divides k_dim) and stored in another format; attention turns q as well, so that q.k is the same.
/// Channels of K that are 20 times larger than others, as real models have, are spread over all
/// dimensions: without it they take the scale, and the others' digits, of integer formats. V is
/// stored as it is. Rows are read, and summed, turned back.
///
/// What spreads no better is a channel's mean over the tokens. Attention cannot see one vector that
/// is subtracted from all keys of a head, so an engine that has it, say the mean key of a
/// calibration text, may subtract it before attend() (but not where the softmax has a learned
/// sink).
///
/// K above 3.4e38 / sqrt(k_dim) may overflow, which is counted as a format's own overflows are.
/// Costs 2 k_dim log2(k_dim) flop a stored row and query row and part of the work.
/// @tparam Rows  a row format whose pages lie in one piece: Int8Rows, Int4Rows, KvRows<...>
/// @see Ashkboos et al., QuaRot, arXiv:2404.00456, section 4 (keys); signs as in Chee et al., QuIP,
///   arXiv:2307.13304
template <class Rows>
  requires(std::same_as<typename FormatOf<Rows>::Memory, PagedMemory> && !RotatesK<FormatOf<Rows>>)
struct RotatedRows {
  using Turned = FormatOf<Rows>;  ///< what keeps the rows
  using Memory = PagedMemory;
  using Page = const std::byte*;

  static constexpr const char* name() { return kName.data(); }

  /// @throws ConfigError for a K wider than 512
  static constexpr std::size_t page_bytes(const PageShape& shape) {
    if (shape.k_dim > detail::kMaxRotatedDim) {
      fail<ConfigError>("K of RotatedRows has at most ", detail::kMaxRotatedDim,
                        " dimensions, got ", shape.k_dim);
    }
    return Turned::page_bytes(shape);
  }

  /// K, q or a mean of K as kernels compare it with stored rows.
  /// @param x  [k_dim]
  /// @param to  [k_dim], written
  /// @return to
  static const float* rotate_k(const float* x, int k_dim, float* to) {
    return detail::rotate(x, k_dim, to);
  }

  template <class Isa>
  static std::int64_t encode(std::byte* page, const PageShape& shape, std::size_t row,
                             const float* k, const float* v) {
    float turned[detail::kMaxRotatedDim];
    rotate_k(k, shape.k_dim, turned);
    return turn_overflows(k, turned, shape.k_dim) +
           Turned::template encode<Isa>(page, shape, row, turned, v);
  }

  template <class Isa>
  static std::int64_t count_overflows(const PageShape& shape, const float* k, const float* v) {
    float turned[detail::kMaxRotatedDim];
    rotate_k(k, shape.k_dim, turned);
    return turn_overflows(k, turned, shape.k_dim) +
           Turned::template count_overflows<Isa>(shape, turned, v);
  }

  template <class Isa>
  static void add_rows(const std::byte* page, const PageShape& shape, std::size_t first,
                       std::size_t last, double* k_sum, double* v_sum) {
    for (std::size_t row = first; row < last; ++row) {
      double turned[detail::kMaxRotatedDim] = {};
      Turned::template add_rows<Isa>(page, shape, row, row + 1, turned, v_sum);
      float k[detail::kMaxRotatedDim];
      for (int d = 0; d < shape.k_dim; ++d) k[d] = static_cast<float>(turned[d]);
      detail::rotate_back(k, shape.k_dim);
      for (int d = 0; d < shape.k_dim; ++d) k_sum[d] += static_cast<double>(k[d]);
    }
  }

  static void read_row(Page page, const PageShape& shape, std::size_t row, float* k, float* v) {
    Turned::read_row(page, shape, row, k, v);
    detail::rotate_back(k, shape.k_dim);
  }

  static void copy_rows(const std::byte* from, std::span<const std::int32_t> rows, std::byte* to,
                        std::size_t to_row, const PageShape& shape) {
    Turned::copy_rows(from, rows, to, to_row, shape);
  }

  static void round_row(const PageShape& shape, const float* k, const float* v, float* to_k,
                        float* to_v) {
    float turned[detail::kMaxRotatedDim];
    Turned::round_row(shape, rotate_k(k, shape.k_dim, turned), v, to_k, to_v);
    detail::rotate_back(to_k, shape.k_dim);
  }

  /// The 64 rows around `row` (as many as the page has), where they lie; K turned.
  HEADWISE_ALWAYS_INLINE static auto tiles(Page page, const PageShape& shape,
                                           std::size_t row) requires TiledInPlace<Turned> {
    return Turned::tiles(page, shape, row);
  }

  /// K stays turned.
  template <class Isa>
  static int pack(Page page, const PageShape& shape, std::size_t row, int count, float* k,
                  float* v) noexcept {
    return Turned::template pack<Isa>(page, shape, row, count, k, v);
  }

  /// K stays turned.
  template <class Isa>
  static void pack_own_k(const float* rows, std::ptrdiff_t stride, int count, int dim,
                         float* tiles) noexcept {
    float turned[detail::kTile * detail::kMaxRotatedDim];
    for (int first = 0; first < count; first += detail::kTile) {
      const int in_tile = std::min(detail::kTile, count - first);
      for (int row = 0; row < in_tile; ++row) {
        rotate_k(rows + (first + row) * stride, dim, turned + row * dim);
      }
      Turned::template pack_own_k<Isa>(turned, dim, in_tile, dim, tiles + first * dim);
    }
  }

  template <class Isa>
  static void pack_own_v(const float* rows, std::ptrdiff_t stride, int count, int dim,
                         float* strips) noexcept {
    Turned::template pack_own_v<Isa>(rows, stride, count, dim, strips);
  }

 private:
  /// Elements of a finite row that are infinite or NaN once it is turned: the stored format, which
  /// sees the turned row alone, takes them for the engine's own.
  static std::int64_t turn_overflows(const float* k, const float* turned, int k_dim) {
    const auto finite = [](float x) { return is_finite(x); };
    const std::int64_t lost = k_dim - std::count_if(turned, turned + k_dim, finite);
    return lost == 0 || !std::all_of(k, k + k_dim, finite) ? 0 : lost;
  }

  /// "int8_rotated"
  static constexpr auto kName = [] {
    constexpr std::string_view of = Turned::name(), rotated = "_rotated";
    std::array<char, of.size() + rotated.size() + 1> name{};
    auto* to = name.data();
    for (const std::string_view part : {of, rotated}) {
      for (const char c : part) *to++ = c;
    }
    return name;
  }();
};

}  // namespace headwise::inline v0
