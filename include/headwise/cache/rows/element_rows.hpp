// SPDX-License-Identifier: MIT
/// @file element_rows.hpp
/// What all formats share whose rows are nothing but elements, each rounded by itself.
#pragma once

#include <algorithm>
#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>

#include "headwise/cache/rows/tiles.hpp"
#include "headwise/core/dtype.hpp"
#include "headwise/core/page_shape.hpp"
#include "headwise/simd/simd.hpp"

namespace headwise::inline v0::detail {

/// The parts of a RowFormat (format.hpp) that do not depend on where elements lie.
template <RowElement E>
struct ElementRows {
  /// What an element is stored as.
  using Element = E;

  static constexpr std::size_t page_bytes(const PageShape& shape) {
    const std::size_t elements = static_cast<std::size_t>(shape.page_tokens) *
                                 static_cast<std::size_t>(shape.k_dim + shape.v_dim);
    return (elements * sizeof(E) + 63) / 64 * 64;
  }

  template <class Isa>
  static std::int64_t count_overflows(const PageShape& shape, const float* k, const float* v) {
    Squares<Isa> squares;
    for (int d = 0; d < shape.k_dim; d += kTile) squares.add_strip(0, k + d);
    for (int d = 0; d < shape.v_dim; d += kTile) squares.add_strip(1, v + d);
    if (squares.are_little()) return 0;
    return count_row_overflows(k, shape.k_dim) + count_row_overflows(v, shape.v_dim);
  }

  /// Of tokens' K and V, summed up while they are stored: nearly always they say that no element
  /// is too large, in less time than looking at each.
  template <class Isa>
  class Squares {
    using O = simd::Ops<Isa>;
    using V = typename O::V;

   public:
    /// Sums that run side by side: each waits for its last addition.
    static constexpr int kSums = 4;

    /// @param sum  in [0, kSums)
    HEADWISE_ALWAYS_INLINE void add(int sum, V x) {
      if constexpr (!std::same_as<E, f32>) sums_[sum] = O::fma(x, x, sums_[sum]);
    }
    /// @param strip  16 elements
    HEADWISE_ALWAYS_INLINE void add_strip(int sum, const float* strip) {
      for (int i = 0; i < kTile; i += O::kWidth) add(sum, O::load(strip + i));
    }
    /// Whether no element can have been rounded to infinity.
    HEADWISE_ALWAYS_INLINE bool are_little() const {
      if constexpr (std::same_as<E, f32>) return true;
      // NaNs and infinities have larger bits than any bound, also to -ffast-math.
      constexpr float kLittle = std::same_as<E, f16> ? 65504.0F * 65504.0F : 1e38F;
      const V sum = O::add(O::add(sums_[0], sums_[1]), O::add(sums_[2], sums_[3]));
      return magnitude(O::reduce_add(sum)) < magnitude(kLittle);
    }

   private:
    V sums_[kSums] = {O::zero(), O::zero(), O::zero(), O::zero()};
  };

  static void round_row(const PageShape& shape, const float* k, const float* v, float* to_k,
                        float* to_v) {
    for (int d = 0; d < shape.k_dim; ++d) to_k[d] = to_float(from_float<E>(k[d]));
    for (int d = 0; d < shape.v_dim; ++d) to_v[d] = to_float(from_float<E>(v[d]));
  }

  /// Finite floats of a row that rounding makes infinite.
  static std::int64_t count_row_overflows(const float* row, int dim) {
    constexpr std::uint32_t kFirst =  // bits of the smallest float that rounds to infinity
        std::same_as<E, f16> ? 0x477FF000U : 0x7F7F8000U;
    return std::count_if(row, row + dim, [](float x) {
      return magnitude(x) >= kFirst && magnitude(x) < 0x7F800000U;
    });
  }

  template <class Isa>
  static void pack_own_k(const float* rows, std::ptrdiff_t stride, int count, int dim,
                         float* tiles) noexcept {
    using O = simd::Ops<Isa>;
    pack_k<Isa>(count, dim, tiles, [&](int row, int d) {
      return O::template round_to<E>(O::load(rows + row * stride + d));
    });
  }

  template <class Isa>
  static void pack_own_v(const float* rows, std::ptrdiff_t stride, int count, int dim,
                         float* strips) noexcept {
    using O = simd::Ops<Isa>;
    pack_v<Isa>(count, dim, strips, [&](int row, int d) {
      return O::template round_to<E>(O::load(rows + row * stride + d));
    });
  }

 private:
  static std::uint32_t magnitude(const float& x) {
    return std::bit_cast<std::uint32_t>(x) & 0x7FFFFFFFU;
  }
};

/// Adds 16 elements to 16 sums.
template <class Isa, RowElement E>
void add_strip(const E* from, double* sums) {
  alignas(64) float strip[kTile];
  convert_strip<Isa>(from, strip);
  for (int i = 0; i < kTile; ++i) sums[i] += static_cast<double>(strip[i]);
}

}  // namespace headwise::inline v0::detail
