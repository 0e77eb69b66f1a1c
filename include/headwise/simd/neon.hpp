// SPDX-License-Identifier: MIT
/// @file neon.hpp
/// Four floats: AArch64 Advanced SIMD, with the half-precision conversions of the base
/// architecture.
#pragma once

#include "headwise/core/config.hpp"
#include "headwise/core/dtype.hpp"
#include "headwise/simd/isa.hpp"

#if defined(__aarch64__) && defined(__ARM_NEON)
#include <arm_neon.h>

#include <concepts>
#include <cstdint>
#include <cstring>

namespace headwise::inline v0::simd {

template <>
struct Ops<Neon> {
  using V = float32x4_t;
  static constexpr int kWidth = 4;

  static HEADWISE_ALWAYS_INLINE V zero() { return vdupq_n_f32(0.0F); }
  static HEADWISE_ALWAYS_INLINE V broadcast(float x) { return vdupq_n_f32(x); }
  static HEADWISE_ALWAYS_INLINE V load(const float* p) { return vld1q_f32(p); }
  static HEADWISE_ALWAYS_INLINE V load(const f16* p) { return widen_f16(load_4x16(p)); }
  static HEADWISE_ALWAYS_INLINE V load(const bf16* p) { return widen_bf16(load_4x16(p)); }
  static HEADWISE_ALWAYS_INLINE V load(const std::int8_t* p) {
    std::int8_t bytes[8] = {};
    std::memcpy(bytes, p, 4);
    return widen_bytes(vld1_s8(bytes));
  }
  static HEADWISE_ALWAYS_INLINE void load_int4(const std::uint8_t* p, V& low, V& high) {
    std::int8_t bytes[8] = {};
    std::memcpy(bytes, p, 4);
    const int8x8_t both = vld1_s8(bytes);
    low = widen_bytes(vshr_n_s8(vshl_n_s8(both, 4), 4));
    high = widen_bytes(vshr_n_s8(both, 4));
  }
  static HEADWISE_ALWAYS_INLINE void store(float* p, V v) { vst1q_f32(p, v); }
  static HEADWISE_ALWAYS_INLINE void store(f16* p, V v) { store_4x16(p, to_f16(v)); }
  static HEADWISE_ALWAYS_INLINE void store(bf16* p, V v) { store_4x16(p, to_bf16(v)); }

  static HEADWISE_ALWAYS_INLINE V add(V a, V b) { return vaddq_f32(a, b); }
  static HEADWISE_ALWAYS_INLINE V sub(V a, V b) { return vsubq_f32(a, b); }
  static HEADWISE_ALWAYS_INLINE V mul(V a, V b) { return vmulq_f32(a, b); }
  static HEADWISE_ALWAYS_INLINE V div(V a, V b) { return vdivq_f32(a, b); }
  static HEADWISE_ALWAYS_INLINE V fma(V a, V b, V c) { return vfmaq_f32(c, a, b); }
  static HEADWISE_ALWAYS_INLINE V max(V a, V b) { return vmaxq_f32(a, b); }
  static HEADWISE_ALWAYS_INLINE bool any_above(V a, V b) {
    return vmaxvq_u32(vcgtq_f32(a, b)) != 0;
  }
  static HEADWISE_ALWAYS_INLINE float reduce_add(V v) { return vaddvq_f32(v); }
  static HEADWISE_ALWAYS_INLINE float reduce_max(V v) { return vmaxvq_f32(v); }

  static HEADWISE_ALWAYS_INLINE V round(V v) { return vrndnq_f32(v); }
  static HEADWISE_ALWAYS_INLINE V scale_by_exp2(V v, V n) {
    const int32x4_t exponent = vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127));
    return vmulq_f32(v, vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23)));
  }
  static HEADWISE_ALWAYS_INLINE V zero_below(V v, V x, float low) {
    const uint32x4_t below = vcltq_f32(x, vdupq_n_f32(low));
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(v), below));
  }
  template <RowElement Row>
  static HEADWISE_ALWAYS_INLINE V round_to(V v) {
    if constexpr (std::same_as<Row, f16>) return widen_f16(to_f16(v));
    if constexpr (std::same_as<Row, bf16>) return widen_bf16(to_bf16(v));
    if constexpr (std::same_as<Row, f32>) return v;
  }

  static HEADWISE_ALWAYS_INLINE void transpose(V (&rows)[kWidth]) {
    const float32x4x2_t low = vtrnq_f32(rows[0], rows[1]);
    const float32x4x2_t high = vtrnq_f32(rows[2], rows[3]);
    rows[0] = vcombine_f32(vget_low_f32(low.val[0]), vget_low_f32(high.val[0]));
    rows[1] = vcombine_f32(vget_low_f32(low.val[1]), vget_low_f32(high.val[1]));
    rows[2] = vcombine_f32(vget_high_f32(low.val[0]), vget_high_f32(high.val[0]));
    rows[3] = vcombine_f32(vget_high_f32(low.val[1]), vget_high_f32(high.val[1]));
  }

 private:
  /// The first four.
  static HEADWISE_ALWAYS_INLINE V widen_bytes(int8x8_t bytes) {
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(bytes))));
  }
  static HEADWISE_ALWAYS_INLINE uint16x4_t load_4x16(const void* p) {
    std::uint16_t bits[4];
    std::memcpy(bits, p, sizeof bits);
    return vld1_u16(bits);
  }
  static HEADWISE_ALWAYS_INLINE void store_4x16(void* p, uint16x4_t x) {
    std::uint16_t bits[4];
    vst1_u16(bits, x);
    std::memcpy(p, bits, sizeof bits);
  }
  static HEADWISE_ALWAYS_INLINE V widen_f16(uint16x4_t bits) {
    return vcvt_f32_f16(vreinterpret_f16_u16(bits));
  }
  static HEADWISE_ALWAYS_INLINE V widen_bf16(uint16x4_t bits) {
    return vreinterpretq_f32_u32(vshll_n_u16(bits, 16));
  }
  static HEADWISE_ALWAYS_INLINE uint16x4_t to_f16(V v) {
    return vreinterpret_u16_f16(vcvt_f16_f32(v));
  }
  static HEADWISE_ALWAYS_INLINE uint16x4_t to_bf16(V v) {
    const uint32x4_t bits = vreinterpretq_u32_f32(v);
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t rounded = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7FFF)), odd);
    const uint32x4_t magnitude = vandq_u32(bits, vdupq_n_u32(0x7FFFFFFF));
    const uint32x4_t is_nan = vcgtq_u32(magnitude, vdupq_n_u32(0x7F800000));
    const uint32x4_t quiet = vorrq_u32(bits, vdupq_n_u32(0x00400000));
    return vshrn_n_u32(vbslq_u32(is_nan, quiet, rounded), 16);
  }
};
static_assert(CompiledIsa<Neon>);

}  // namespace headwise::inline v0::simd
#endif
