// SPDX-License-Identifier: MIT
/// @file scaled_rows.hpp
/// What all formats share whose elements are integers times a scale.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>

#include "headwise/cache/rows/format.hpp"
#include "headwise/cache/rows/tiles.hpp"
#include "headwise/core/bits.hpp"
#include "headwise/core/config.hpp"
#include "headwise/core/dtype.hpp"
#include "headwise/core/page_shape.hpp"
#include "headwise/simd/simd.hpp"

namespace headwise::inline v0::detail {

/// A scale's magnitude, rounded up lest integers end before the elements do, to at most `most`: an
/// integer times it is finite.
inline std::uint16_t scale_bits(const float& scale, std::uint32_t most) {
  return static_cast<std::uint16_t>(
      std::min((std::bit_cast<std::uint32_t>(scale) + 0xFFFFU) >> 16, most));
}

/// A RowFormat (format.hpp) of integers with scales. A page is K [page_tokens / 16][k_dim][16
/// tokens] and V [v_dim / 16][page_tokens][16 dims] in integers, as tiles have them, then K's
/// scales [groups][page_tokens] and V's.
///
/// @tparam Integers  what an integer is:
///     KElement, VElement   of tiles (tiles.hpp)
///     kLeast, kMost        its range
///     scale_of(low, high)  the scale of a group of elements from -low to high, not both tiny
template <class Integers>
struct ScaledRows {
  using Memory = PagedMemory;
  using Page = const std::byte*;

  static constexpr std::size_t page_bytes(const PageShape& shape) {
    const auto scales = static_cast<std::size_t>(groups(shape.k_dim) + groups(shape.v_dim));
    return (scales_offset(shape) + scales * tokens(shape) * sizeof(bf16) + 63) / 64 * 64;
  }

  /// Scales reach as far as floats do: nothing finite becomes infinite.
  template <class Isa>
  static constexpr std::int64_t count_overflows(const PageShape&, const float*, const float*) {
    return 0;
  }

  template <class Isa>
  static std::int64_t encode(std::byte* page, const PageShape& shape, std::size_t row,
                             const float* k, const float* v) {
    auto* bytes = reinterpret_cast<std::uint8_t*>(page);
    bf16* scales = reinterpret_cast<bf16*>(page + scales_offset(shape)) + row;
    for_each_strip<Isa>(k, shape.k_dim, [&](std::size_t d, bf16 scale, const std::int8_t* strip) {
      scales[group_of(d) * tokens(shape)] = scale;
      for (std::size_t i = 0; i < kRows; ++i) {
        put(bytes[k_offset(shape, row, d + i)], (d + i) % kKPerByte, kKPerByte, strip[i]);
      }
    });
    scales += static_cast<std::size_t>(groups(shape.k_dim)) * tokens(shape);
    for_each_strip<Isa>(v, shape.v_dim, [&](std::size_t d, bf16 scale, const std::int8_t* strip) {
      scales[group_of(d) * tokens(shape)] = scale;
      std::uint8_t* to = bytes + v_offset(shape, row, d);
      const std::size_t half = d / kRows % kVPerByte;
      // A last strip may have its bytes alone: their other halves are 0, not what the page had.
      if (half == 0) std::fill_n(to, kRows, std::uint8_t{0});
      for (std::size_t i = 0; i < kRows; ++i) put(to[i], half, kVPerByte, strip[i]);
    });
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
    const PageShape bytes{shape.page_tokens, shape.k_dim / kKPerByte,
                          static_cast<int>(v_strips(shape)) * kTile};
    copy_tiled_rows(reinterpret_cast<const std::uint8_t*>(from), rows,
                    reinterpret_cast<std::uint8_t*>(to), to_row, bytes);
    const bf16* old_scales = reinterpret_cast<const bf16*>(from + scales_offset(shape));
    bf16* new_scales = reinterpret_cast<bf16*>(to + scales_offset(shape));
    for (int group = 0; group < groups(shape.k_dim) + groups(shape.v_dim); ++group) {
      for (std::size_t i = rows.size(); i > 0; --i) {
        new_scales[to_row + i - 1] = old_scales[static_cast<std::size_t>(rows[i - 1])];
      }
      old_scales += tokens(shape);
      new_scales += tokens(shape);
    }
  }

  static void round_row(const PageShape& shape, const float* k, const float* v, float* to_k,
                        float* to_v) {
    round(k, shape.k_dim, to_k);
    round(v, shape.v_dim, to_v);
  }

  /// The 64 rows around `row` (as many as the page has), where they lie.
  HEADWISE_ALWAYS_INLINE static RowTiles<typename Integers::KElement, typename Integers::VElement>
  tiles(Page page, const PageShape& shape, std::size_t row) {
    const std::size_t block = row / kBlockRows * kBlockRows;
    const bf16* scales = reinterpret_cast<const bf16*>(page + scales_offset(shape)) + block;
    const auto stride = static_cast<std::ptrdiff_t>(shape.page_tokens);
    return {{reinterpret_cast<const typename Integers::KElement*>(page + k_offset(shape, block, 0)),
             shape.k_dim / kKPerByte * kTile, scales, stride},
            {reinterpret_cast<const typename Integers::VElement*>(page + v_offset(shape, block, 0)),
             stride * kTile, scales + groups(shape.k_dim) * stride, stride}};
  }

  template <class Isa>
  static int pack(Page page, const PageShape& shape, std::size_t row, int count, float* k,
                  float* v) noexcept {
    using O = simd::Ops<Isa>;
    const auto stored = tiles(page, shape, row);
    const int first = static_cast<int>(row % kBlockRows);
    for (int token = first / kTile * kTile; token < first + count; token += kTile) {
      const auto* from = stored.k.data + token / kTile * stored.k.stride;
      float* to = k + static_cast<std::ptrdiff_t>(token) * shape.k_dim;
      for (int lane = 0; lane < kTile; lane += O::kWidth) {
        for (int d = 0; d < shape.k_dim; d += kKPerByte) {
          const auto scale = O::load(
              stored.k.scales + static_cast<std::ptrdiff_t>(group_of(d)) * stored.k.scale_stride +
              token + lane);
          typename O::V values[std::size_t{kKPerByte}];
          load_values<Isa>(from + d / kKPerByte * kTile + lane, values);
          for (int i = 0; i < kKPerByte; ++i) {
            O::store(to + (d + i) * kTile + lane, O::mul(values[i], scale));
          }
        }
      }
    }
    for (int d = 0; d < shape.v_dim; d += kTile * kVPerByte) {
      const auto* from = stored.v.data + d / (kTile * kVPerByte) * stored.v.stride;
      const bf16* scales =
          stored.v.scales + static_cast<std::ptrdiff_t>(group_of(d)) * stored.v.scale_stride;
      const int strips = std::min(kVPerByte, (shape.v_dim - d) / kTile);
      float* to = v + static_cast<std::ptrdiff_t>(d) * kBlockRows;
      for (int token = first; token < first + count; ++token) {
        const auto scale = O::broadcast(to_float(scales[token]));
        for (int lane = 0; lane < kTile; lane += O::kWidth) {
          typename O::V values[std::size_t{kVPerByte}];
          load_values<Isa>(from + token * kTile + lane, values);
          for (int i = 0; i < strips; ++i) {
            O::store(to + (i * kBlockRows + token) * kTile + lane, O::mul(values[i], scale));
          }
        }
      }
    }
    return first;
  }

  template <class Isa>
  static void pack_own_k(const float* rows, std::ptrdiff_t stride, int count, int dim,
                         float* tiles) noexcept {
    const int lanes = (count + kTile - 1) / kTile * kTile;
    std::fill_n(tiles, static_cast<std::ptrdiff_t>(lanes) * dim, 0.0F);
    pack_own<Isa>(rows, stride, count, dim, [=](int row, int d) {
      return tiles + (row / kTile * dim + d) * kTile + row % kTile;
    });
  }

  template <class Isa>
  static void pack_own_v(const float* rows, std::ptrdiff_t stride, int count, int dim,
                         float* strips) noexcept {
    pack_own<Isa>(rows, stride, count, dim, [=](int row, int d) {
      return strips + d / kTile * kTile * kBlockRows + row * kTile + d % kTile;
    });
  }

 private:
  static constexpr std::size_t kRows = kTile;
  static constexpr int kKPerByte = TileElement<typename Integers::KElement>::kSteps;
  static constexpr int kVPerByte = TileElement<typename Integers::VElement>::kTiles;
  static constexpr int kGroup = TileElement<typename Integers::KElement>::kGroup;  // 0: a row
  static_assert(kGroup == TileElement<typename Integers::VElement>::kGroup && kGroup % kTile == 0);

  static constexpr std::size_t tokens(const PageShape& shape) {
    return static_cast<std::size_t>(shape.page_tokens);
  }
  /// Scales of a row of `dim` elements.
  static constexpr int groups(int dim) {
    if constexpr (kGroup == 0) return dim > 0 ? 1 : 0;
    return (dim + kGroup - 1) / std::max(1, kGroup);
  }
  template <class Dim>
  static constexpr Dim group_of(Dim d) {
    if constexpr (kGroup == 0) return 0;
    return d / static_cast<Dim>(std::max(1, kGroup));
  }

  /// Bytes from the page's begin to the one that holds element `dim` of K row `row`.
  static constexpr std::size_t k_offset(const PageShape& shape, std::size_t row, std::size_t dim) {
    return row / kRows * kRows * static_cast<std::size_t>(shape.k_dim / kKPerByte) +
           dim / kKPerByte * kRows + row % kRows;
  }
  /// The same of V row `row`.
  static constexpr std::size_t v_offset(const PageShape& shape, std::size_t row, std::size_t dim) {
    return tokens(shape) * static_cast<std::size_t>(shape.k_dim / kKPerByte) +
           dim / (kRows * kVPerByte) * kRows * tokens(shape) + row * kRows + dim % kRows;
  }
  /// Strips of V in bytes, of which each holds an element of kVPerByte strips.
  static constexpr std::size_t v_strips(const PageShape& shape) {
    constexpr std::size_t kStrip = kRows * kVPerByte;
    return (static_cast<std::size_t>(shape.v_dim) + kStrip - 1) / kStrip;
  }
  static constexpr std::size_t scales_offset(const PageShape& shape) {
    return tokens(shape) *
           (static_cast<std::size_t>(shape.k_dim / kKPerByte) + v_strips(shape) * kRows);
  }

  static void put(std::uint8_t& byte, std::size_t half, int per_byte, int integer) {
    const auto bits = static_cast<unsigned>(integer);
    if (per_byte == 1) {
      byte = static_cast<std::uint8_t>(bits);
    } else {
      // The lower half comes first, and leaves nothing of what was there.
      byte = static_cast<std::uint8_t>(half == 0 ? bits & 15U : (byte & 0x0FU) | (bits & 15U) << 4);
    }
  }
  static int get(std::uint8_t byte, std::size_t half, int per_byte) {
    if (per_byte == 1) return static_cast<std::int8_t>(byte);
    return static_cast<std::int8_t>(half == 0 ? byte << 4 : byte & 0xF0) / 16;
  }
  static float value(int integer, bf16 scale) {
    return static_cast<float>(integer) * to_float(scale);
  }

  /// NaN where an element is infinite or NaN, 0 where all are below 2^-100. By bits, which order
  /// floats of one sign: -ffinite-math-only must not lose a NaN.
  static bf16 scale_of(const float* x, int count) {
    std::int32_t above[kTile] = {};  // magnitudes of either sign
    std::int32_t below[kTile] = {};
    const auto look_at = [&](const float* strip, int width) {
      for (int i = 0; i < width; ++i) {
        const auto bits = std::bit_cast<std::uint32_t>(strip[i]);
        above[i] = std::max(above[i], static_cast<std::int32_t>(bits));
        below[i] = std::max(below[i], static_cast<std::int32_t>(bits ^ 0x80000000U));
      }
    };
    int d = 0;
    for (; d + kTile <= count; d += kTile) look_at(x + d, kTile);
    look_at(x + d, count - d);
    const std::int32_t high = *std::max_element(above, above + kTile);
    const std::int32_t low = *std::max_element(below, below + kTile);
    if (std::max(low, high) >= 0x7F800000) return {0x7FC0};
    if (std::max(low, high) < 0x0D800000) return {};  // 2^-100
    return Integers::scale_of(std::bit_cast<float>(low), std::bit_cast<float>(high));
  }

  /// Never inlined: a step's own rows are rounded by the very instructions that store them, also
  /// where -ffast-math lets the compiler choose.
  /// @param from  [16]
  template <class Isa>
  HEADWISE_NEVER_INLINE static void quantise(const float* from, float scale, std::int8_t* to) {
    if ((std::bit_cast<std::uint32_t>(scale) & 0x7FFFFFFFU) - 1U >= kInfinityBits<float> - 1U) {
      std::fill_n(to, kTile, std::int8_t{0});  // zeros; or NaN, and then integers do not matter
      return;
    }
    std::int32_t integers[kTile];
    for (int i = 0; i < kTile; ++i) {
      // To nearest even by the adder: the last bits of 1.5 * 2^23 + x are those of the integer.
      const float shifted = from[i] / scale + 12582912.0F;
      integers[i] = std::clamp(std::bit_cast<std::int32_t>(shifted) - 0x4B400000, Integers::kLeast,
                               Integers::kMost);
    }
    for (int i = 0; i < kTile; ++i) to[i] = static_cast<std::int8_t>(integers[i]);
  }

  /// `fn(d, scale, strip)` for each 16 elements of a row, or as many as are left.
  template <class Isa, class Fn>
  static void for_each_strip(const float* row, int dim, Fn&& fn) {
    const int group = kGroup == 0 ? dim : kGroup;
    for (int first = 0; first < dim; first += group) {
      const int end = std::min(first + group, dim);
      const bf16 scale = scale_of(row + first, end - first);
      for (int d = first; d < end; d += kTile) {
        std::int8_t strip[kTile];
        if (d + kTile <= end) {
          quantise<Isa>(row + d, to_float(scale), strip);
        } else {
          float padded[kTile] = {};
          std::copy(row + d, row + end, padded);
          quantise<Isa>(padded, to_float(scale), strip);
        }
        fn(static_cast<std::size_t>(d), scale, strip);
      }
    }
  }

  /// at(row, d): where an element goes.
  template <class Isa, class At>
  static void pack_own(const float* rows, std::ptrdiff_t stride, int count, int dim, At&& at) {
    for (int row = 0; row < count; ++row, rows += stride) {
      for_each_strip<Isa>(rows, dim, [&](std::size_t d, bf16 scale, const std::int8_t* strip) {
        for (int i = 0; i < kTile; ++i) {
          *at(row, static_cast<int>(d) + i) = value(strip[i], scale);
        }
      });
    }
  }

  static void round(const float* from, int dim, float* to) {
    for_each_strip<simd::Scalar>(
        from, dim, [&](std::size_t d, bf16 scale, const std::int8_t* strip) {
          const std::size_t count = std::min(kRows, static_cast<std::size_t>(dim) - d);
          for (std::size_t i = 0; i < count; ++i) to[d + i] = value(strip[i], scale);
        });
  }

  template <class OnK, class OnV>
  static void for_each_element(const std::byte* page, const PageShape& shape, std::size_t row,
                               OnK&& on_k, OnV&& on_v) {
    const auto* bytes = reinterpret_cast<const std::uint8_t*>(page);
    const bf16* scales = reinterpret_cast<const bf16*>(page + scales_offset(shape)) + row;
    for (std::size_t d = 0; d < static_cast<std::size_t>(shape.k_dim); ++d) {
      const int integer = get(bytes[k_offset(shape, row, d)], d % kKPerByte, kKPerByte);
      on_k(d, value(integer, scales[group_of(d) * tokens(shape)]));
    }
    scales += static_cast<std::size_t>(groups(shape.k_dim)) * tokens(shape);
    for (std::size_t d = 0; d < static_cast<std::size_t>(shape.v_dim); ++d) {
      const int integer = get(bytes[v_offset(shape, row, d)], d / kRows % kVPerByte, kVPerByte);
      on_v(d, value(integer, scales[group_of(d) * tokens(shape)]));
    }
  }
};

}  // namespace headwise::inline v0::detail
