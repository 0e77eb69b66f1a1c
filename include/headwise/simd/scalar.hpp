// SPDX-License-Identifier: MIT
/// @file scalar.hpp
/// One float at a time: the portable instruction set, and the plainest statement of each operation.
#pragma once

#include <bit>
#include <cstdint>

#include "headwise/core/config.hpp"
#include "headwise/core/dtype.hpp"
#include "headwise/simd/isa.hpp"

namespace headwise::inline v0::simd {

template <>
struct Ops<Scalar> {
  using V = float;
  static constexpr int kWidth = 1;

  static HEADWISE_ALWAYS_INLINE V zero() { return 0.0F; }
  static HEADWISE_ALWAYS_INLINE V broadcast(float x) { return x; }
  static HEADWISE_ALWAYS_INLINE V load(const float* p) { return *p; }
  static HEADWISE_ALWAYS_INLINE V load(const f16* p) { return to_float(*p); }
  static HEADWISE_ALWAYS_INLINE V load(const bf16* p) { return to_float(*p); }
  static HEADWISE_ALWAYS_INLINE V load(const std::int8_t* p) { return *p; }
  static HEADWISE_ALWAYS_INLINE void load_int4(const std::uint8_t* p, V& low, V& high) {
    low = static_cast<float>((*p & 15) - (*p & 8) * 2);
    high = static_cast<float>((*p >> 4) - (*p & 128) / 8);
  }
  static HEADWISE_ALWAYS_INLINE void store(float* p, V v) { *p = v; }
  static HEADWISE_ALWAYS_INLINE void store(f16* p, V v) { *p = from_float<f16>(v); }
  static HEADWISE_ALWAYS_INLINE void store(bf16* p, V v) { *p = from_float<bf16>(v); }

  static HEADWISE_ALWAYS_INLINE V add(V a, V b) { return a + b; }
  static HEADWISE_ALWAYS_INLINE V sub(V a, V b) { return a - b; }
  static HEADWISE_ALWAYS_INLINE V mul(V a, V b) { return a * b; }
  static HEADWISE_ALWAYS_INLINE V div(V a, V b) { return a / b; }
  /// Two roundings: std::fma is a library call where there is no instruction for it.
  static HEADWISE_ALWAYS_INLINE V fma(V a, V b, V c) { return a * b + c; }
  static HEADWISE_ALWAYS_INLINE V max(V a, V b) { return a > b ? a : b; }
  static HEADWISE_ALWAYS_INLINE bool any_above(V a, V b) { return a > b; }
  static HEADWISE_ALWAYS_INLINE float reduce_add(V v) { return v; }
  static HEADWISE_ALWAYS_INLINE float reduce_max(V v) { return v; }

  static HEADWISE_ALWAYS_INLINE V round(V v) {
    return static_cast<float>(static_cast<std::int32_t>(v < 0.0F ? v - 0.5F : v + 0.5F));
  }
  static HEADWISE_ALWAYS_INLINE V scale_by_exp2(V v, V n) {
    const auto exponent = static_cast<std::uint32_t>(static_cast<std::int32_t>(n) + 127);
    return v * std::bit_cast<float>(exponent << 23);
  }
  static HEADWISE_ALWAYS_INLINE V zero_below(V v, V x, float low) { return x < low ? 0.0F : v; }
  template <RowElement Row>
  static HEADWISE_ALWAYS_INLINE V round_to(V v) {
    return to_float(from_float<Row>(v));
  }
  static HEADWISE_ALWAYS_INLINE void transpose(V (&)[kWidth]) {}
};
static_assert(CompiledIsa<Scalar>);

}  // namespace headwise::inline v0::simd
