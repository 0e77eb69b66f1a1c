// SPDX-License-Identifier: MIT
/// @file int8_rows.hpp
/// Int8Rows: a byte an element and a scale a row, K and V each with its own.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>

#include "headwise/cache/rows/format.hpp"
#include "headwise/cache/rows/tiled_rows.hpp"
#include "headwise/cache/rows/tiles.hpp"
#include "headwise/core/bits.hpp"
#include "headwise/core/config.hpp"

namespace headwise::inline v0 {

/// An element is round(x / scale) * scale, scale = max |x| / 127 over its row: off by at most
/// max |x| / 254, but for the roundings of float. A row whose elements are all below 2^-100 is
/// stored as zeros; one with an infinity or a NaN reads as NaN throughout.
///
/// A page is K [page_tokens / 16][k_dim][16 tokens] and V [v_dim / 16][page_tokens][16 dims] in
/// bytes, then a float a row: K's scales, then V's. Half the bytes of f16 rows.
struct Int8Rows {
  using Memory = PagedMemory;
  using Page = const std::byte*;

  static constexpr const char* name() { return "int8"; }

  static constexpr std::size_t page_bytes(const PageShape& shape) {
    const auto tokens = static_cast<std::size_t>(shape.page_tokens);
    return (scales_offset(shape) + 2 * tokens * sizeof(float) + 63) / 64 * 64;
  }

  /// Scales are floats: nothing finite becomes infinite.
  template <class Isa>
  static constexpr std::int64_t count_overflows(const float*, int) {
    return 0;
  }

  template <class Isa>
  static std::int64_t encode(std::byte* page, const PageShape& shape, std::size_t row,
                             const float* k, const float* v) {
    auto* bytes = reinterpret_cast<std::int8_t*>(page);
    float* scales = reinterpret_cast<float*>(page + scales_offset(shape)) + row;
    const float k_scale = scale_of<Isa>(k, shape.k_dim);
    const float v_scale = scale_of<Isa>(v, shape.v_dim);
    scales[0] = k_scale;
    scales[shape.page_tokens] = v_scale;
    for (std::size_t d = 0; d < static_cast<std::size_t>(shape.k_dim); d += kRows) {
      std::int8_t strip[kRows];
      quantise<Isa>(k + d, kRows, k_scale, strip);
      std::int8_t* to = bytes + k_offset(shape, row, d);
      for (std::size_t i = 0; i < kRows; ++i) to[i * kRows] = strip[i];
    }
    for (std::size_t d = 0; d < static_cast<std::size_t>(shape.v_dim); d += kRows) {
      quantise<Isa>(v + d, kRows, v_scale, bytes + v_offset(shape, row, d));
    }
    return 0;
  }

  template <class Isa>
  static void add_rows(const std::byte* page, const PageShape& shape, std::size_t first,
                       std::size_t last, double* k_sum, double* v_sum) {
    for (std::size_t row = first; row < last; ++row) {
      for_each_element(
          page, shape, row, [&](std::size_t d, float x) { k_sum[d] += static_cast<double>(x); },
          [&](std::size_t d, float x) { v_sum[d] += static_cast<double>(x); });
    }
  }

  static void read_row(Page page, const PageShape& shape, std::size_t row, float* k, float* v) {
    for_each_element(
        page, shape, row, [&](std::size_t d, float x) { k[d] = x; },
        [&](std::size_t d, float x) { v[d] = x; });
  }

  static void copy_rows(const std::byte* from, std::span<const std::int32_t> rows, std::byte* to,
                        std::size_t to_row, const PageShape& shape) {
    detail::copy_tiled_rows(reinterpret_cast<const std::int8_t*>(from), rows,
                            reinterpret_cast<std::int8_t*>(to), to_row, shape);
    const float* old_scales = scales_of(from, shape);
    float* new_scales = reinterpret_cast<float*>(to + scales_offset(shape));
    for (std::size_t i = rows.size(); i > 0; --i) {
      for (const std::size_t side : {std::size_t{0}, static_cast<std::size_t>(shape.page_tokens)}) {
        new_scales[side + to_row + i - 1] =
            old_scales[side + static_cast<std::size_t>(rows[i - 1])];
      }
    }
  }

  static void round_row(const float* from, int dim, float* to) {
    const float scale = scale_of<simd::Scalar>(from, dim);
    for (int d = 0; d < dim; ++d) {
      std::int8_t byte = 0;
      quantise<simd::Scalar>(from + d, 1, scale, &byte);
      to[d] = static_cast<float>(byte) * scale;
    }
  }

  template <class Isa>
  static int pack(Page page, const PageShape& shape, std::size_t row, int count, float* k,
                  float* v) noexcept {
    using O = simd::Ops<Isa>;
    const std::size_t block = row / detail::kBlockRows * detail::kBlockRows;
    const int first = static_cast<int>(row % detail::kBlockRows);
    const std::int8_t* bytes = reinterpret_cast<const std::int8_t*>(page);
    const float* k_scales = scales_of(page, shape) + block;
    const float* v_scales = k_scales + shape.page_tokens;
    const std::int8_t* k_bytes = bytes + k_offset(shape, block, 0);
    for (int token = first / detail::kTile * detail::kTile; token < first + count;
         token += detail::kTile) {
      const std::ptrdiff_t tile = static_cast<std::ptrdiff_t>(token) * shape.k_dim;
      for (int lane = 0; lane < detail::kTile; lane += O::kWidth) {
        const auto scale = O::load(k_scales + token + lane);
        for (std::ptrdiff_t d = 0; d < shape.k_dim; ++d) {
          const std::ptrdiff_t at = tile + d * detail::kTile + lane;
          O::store(k + at, O::mul(O::load(k_bytes + at), scale));
        }
      }
    }
    for (int d = 0; d < shape.v_dim; d += detail::kTile) {
      const std::int8_t* from = bytes + v_offset(shape, block, static_cast<std::size_t>(d));
      float* to = v + static_cast<std::ptrdiff_t>(d) * detail::kBlockRows;
      for (std::ptrdiff_t token = first; token < first + count; ++token) {
        const auto scale = O::broadcast(v_scales[token]);
        for (int lane = 0; lane < detail::kTile; lane += O::kWidth) {
          const std::ptrdiff_t at = token * detail::kTile + lane;
          O::store(to + at, O::mul(O::load(from + at), scale));
        }
      }
    }
    return first;
  }

  template <class Isa>
  static void pack_own_k(const float* rows, std::ptrdiff_t stride, int count, int dim,
                         float* tiles) noexcept {
    const int lanes = (count + detail::kTile - 1) / detail::kTile * detail::kTile;
    std::fill_n(tiles, static_cast<std::ptrdiff_t>(lanes) * dim, 0.0F);
    pack_own<Isa>(rows, stride, count, dim, [=](int row, int d) {
      return tiles + (row / detail::kTile * dim + d) * detail::kTile + row % detail::kTile;
    });
  }

  template <class Isa>
  static void pack_own_v(const float* rows, std::ptrdiff_t stride, int count, int dim,
                         float* strips) noexcept {
    pack_own<Isa>(rows, stride, count, dim, [=](int row, int d) {
      return strips + d / detail::kTile * detail::kTile * detail::kBlockRows + row * detail::kTile +
             d % detail::kTile;
    });
  }

 private:
  static constexpr std::size_t kRows = detail::kTile;

  static constexpr std::size_t k_offset(const PageShape& shape, std::size_t row, std::size_t dim) {
    return TiledRows<f32>::k_offset(shape, row, dim);
  }
  static constexpr std::size_t v_offset(const PageShape& shape, std::size_t row, std::size_t dim) {
    return TiledRows<f32>::v_offset(shape, row, dim);
  }
  static constexpr std::size_t scales_offset(const PageShape& shape) {
    return static_cast<std::size_t>(shape.page_tokens) *
           static_cast<std::size_t>(shape.k_dim + shape.v_dim);
  }
  /// [page_tokens] of K, then of V.
  static const float* scales_of(const std::byte* page, const PageShape& shape) {
    return reinterpret_cast<const float*>(page + scales_offset(shape));
  }

  /// By bits: -ffinite-math-only must not lose a NaN.
  template <class Isa>
  static float scale_of(const float* row, int dim) {
    std::uint32_t largest = 0;
    for (int d = 0; d < dim; ++d) {
      largest = std::max(largest, std::bit_cast<std::uint32_t>(row[d]) & 0x7FFFFFFFU);
    }
    if (largest >= 0x7F800000U) return opaque_float(0x7FC00000U);
    const float max = std::bit_cast<float>(largest);
    if (max < 0x1p-100F) return 0.0F;
    const float scale = max / 127.0F;
    // 127 times a scale that was rounded up may be more than the largest float.
    return max < 0x1p127F ? scale : std::bit_cast<float>(std::bit_cast<std::uint32_t>(scale) - 1);
  }

  /// Never inlined: a step's own rows are rounded by the very instructions that store them, also
  /// where -ffast-math lets the compiler choose.
  template <class Isa>
  HEADWISE_NEVER_INLINE static void quantise(const float* from, int count, float scale,
                                             std::int8_t* to) {
    if (!(scale > 0.0F)) {  // zeros; or NaN, and then bytes do not matter
      std::fill_n(to, count, std::int8_t{0});
      return;
    }
    for (int i = 0; i < count; ++i) {
      // To nearest even by the adder: the last bits of 1.5 * 2^23 + x are those of the integer.
      const float shifted = from[i] / scale + 12582912.0F;
      to[i] = static_cast<std::int8_t>(std::bit_cast<std::int32_t>(shifted) - 0x4B400000);
    }
  }

  /// at(row, d): where an element goes.
  template <class Isa, class At>
  static void pack_own(const float* rows, std::ptrdiff_t stride, int count, int dim, At&& at) {
    for (int row = 0; row < count; ++row, rows += stride) {
      const float scale = scale_of<Isa>(rows, dim);
      for (int d = 0; d < dim; d += detail::kTile) {
        std::int8_t strip[kRows];
        quantise<Isa>(rows + d, detail::kTile, scale, strip);
        for (int i = 0; i < detail::kTile; ++i) {
          *at(row, d + i) = static_cast<float>(strip[i]) * scale;
        }
      }
    }
  }

  template <class OnK, class OnV>
  static void for_each_element(const std::byte* page, const PageShape& shape, std::size_t row,
                               OnK&& on_k, OnV&& on_v) {
    const auto* bytes = reinterpret_cast<const std::int8_t*>(page);
    const float* scales = scales_of(page, shape) + row;
    for (std::size_t d = 0; d < static_cast<std::size_t>(shape.k_dim); ++d) {
      on_k(d, static_cast<float>(bytes[k_offset(shape, row, d)]) * scales[0]);
    }
    for (std::size_t d = 0; d < static_cast<std::size_t>(shape.v_dim); ++d) {
      on_v(d, static_cast<float>(bytes[v_offset(shape, row, d)]) * scales[shape.page_tokens]);
    }
  }
};

}  // namespace headwise::inline v0
