// SPDX-License-Identifier: MIT
/// @file avx512.hpp
/// Sixteen floats: x86-64 with AVX-512 F, BW, DQ and VL (-march=x86-64-v4).
#pragma once

#include "headwise/core/config.hpp"
#include "headwise/core/dtype.hpp"
#include "headwise/simd/isa.hpp"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include <immintrin.h>

#include <concepts>
#include <cstdint>

// Without optimisation g++ has some intrinsics as macros, whose casts would warn here.
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wsign-conversion"

namespace headwise::inline v0::simd {

template <>
struct Ops<Avx512> {
  using V = __m512;
  static constexpr int kWidth = 16;
  /// g++ 12 warns that the plain forms of some intrinsics read something uninitialised; with a full
  /// mask they are the same instructions.
  static constexpr __mmask16 kAll = 0xFFFF;

  static HEADWISE_ALWAYS_INLINE V zero() { return _mm512_setzero_ps(); }
  static HEADWISE_ALWAYS_INLINE V broadcast(float x) { return _mm512_set1_ps(x); }
  static HEADWISE_ALWAYS_INLINE V load(const float* p) { return _mm512_loadu_ps(p); }
  static HEADWISE_ALWAYS_INLINE V load(const f16* p) {
    return _mm512_maskz_cvtph_ps(kAll, load_16x16(p));
  }
  static HEADWISE_ALWAYS_INLINE V load(const bf16* p) { return widen(load_16x16(p)); }
  static HEADWISE_ALWAYS_INLINE V load(const std::int8_t* p) {
    const __m128i bytes = _mm_loadu_si128(static_cast<const __m128i*>(static_cast<const void*>(p)));
    return _mm512_maskz_cvtepi32_ps(kAll, _mm512_maskz_cvtepi8_epi32(kAll, bytes));
  }
  /// A permutation looks at the low four bits of an index: a table of 16 floats.
  static HEADWISE_ALWAYS_INLINE void load_int4(const std::uint8_t* p, V& low, V& high) {
    const V table = _mm512_setr_ps(0.0F, 1.0F, 2.0F, 3.0F, 4.0F, 5.0F, 6.0F, 7.0F, -8.0F, -7.0F,
                                   -6.0F, -5.0F, -4.0F, -3.0F, -2.0F, -1.0F);
    const __m512i bytes = _mm512_maskz_cvtepu8_epi32(
        kAll, _mm_loadu_si128(static_cast<const __m128i*>(static_cast<const void*>(p))));
    low = _mm512_maskz_permutexvar_ps(kAll, bytes, table);
    high = _mm512_maskz_permutexvar_ps(kAll, _mm512_maskz_srli_epi32(kAll, bytes, 4), table);
  }
  static HEADWISE_ALWAYS_INLINE void store(float* p, V v) { _mm512_storeu_ps(p, v); }
  static HEADWISE_ALWAYS_INLINE void store(f16* p, V v) { store_16x16(p, to_f16(v)); }
  static HEADWISE_ALWAYS_INLINE void store(bf16* p, V v) { store_16x16(p, to_bf16(v)); }

  static HEADWISE_ALWAYS_INLINE V add(V a, V b) { return _mm512_add_ps(a, b); }
  static HEADWISE_ALWAYS_INLINE V sub(V a, V b) { return _mm512_sub_ps(a, b); }
  static HEADWISE_ALWAYS_INLINE V mul(V a, V b) { return _mm512_mul_ps(a, b); }
  static HEADWISE_ALWAYS_INLINE V div(V a, V b) { return _mm512_div_ps(a, b); }
  static HEADWISE_ALWAYS_INLINE V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
  static HEADWISE_ALWAYS_INLINE V max(V a, V b) { return _mm512_maskz_max_ps(kAll, a, b); }

  static HEADWISE_ALWAYS_INLINE bool any_above(V a, V b) {
    return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ) != 0;
  }
  static HEADWISE_ALWAYS_INLINE float reduce_add(V v) {
    const __m256 halves = _mm256_add_ps(half<0>(v), half<1>(v));
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
  }
  static HEADWISE_ALWAYS_INLINE float reduce_max(V v) {
    const __m256 halves = _mm256_max_ps(half<0>(v), half<1>(v));
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
  }

  static HEADWISE_ALWAYS_INLINE V round(V v) {
    return _mm512_maskz_cvtepi32_ps(
        kAll, _mm512_maskz_cvtps_epi32(kAll, v));  // in the default rounding mode
  }
  static HEADWISE_ALWAYS_INLINE V scale_by_exp2(V v, V n) {
    return _mm512_maskz_scalef_ps(kAll, v, n);
  }
  static HEADWISE_ALWAYS_INLINE V zero_below(V v, V x, float low) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(low), _CMP_NLT_UQ), v);
  }
  template <RowElement Row>
  static HEADWISE_ALWAYS_INLINE V round_to(V v) {
    if constexpr (std::same_as<Row, f16>) return _mm512_maskz_cvtph_ps(kAll, to_f16(v));
    if constexpr (std::same_as<Row, bf16>) return widen(to_bf16(v));
    if constexpr (std::same_as<Row, f32>) return v;
  }

  static HEADWISE_ALWAYS_INLINE void transpose(V (&rows)[kWidth]) {
    V pairs[16];  // of rows, element by element
    for (int i = 0; i < 16; i += 2) {
      pairs[i] = _mm512_maskz_unpacklo_ps(kAll, rows[i], rows[i + 1]);
      pairs[i + 1] = _mm512_maskz_unpackhi_ps(kAll, rows[i], rows[i + 1]);
    }
    V quads[16];
    for (int i = 0; i < 16; i += 4) {
      quads[i] = _mm512_maskz_shuffle_ps(kAll, pairs[i], pairs[i + 2], 0x44);
      quads[i + 1] = _mm512_maskz_shuffle_ps(kAll, pairs[i], pairs[i + 2], 0xEE);
      quads[i + 2] = _mm512_maskz_shuffle_ps(kAll, pairs[i + 1], pairs[i + 3], 0x44);
      quads[i + 3] = _mm512_maskz_shuffle_ps(kAll, pairs[i + 1], pairs[i + 3], 0xEE);
    }
    for (int i = 0; i < 4; ++i) {  // 128-bit lanes: a 4 x 4 matrix of quads
      const V even_low = _mm512_maskz_shuffle_f32x4(kAll, quads[i], quads[i + 4], 0x88);
      const V odd_low = _mm512_maskz_shuffle_f32x4(kAll, quads[i], quads[i + 4], 0xDD);
      const V even_high = _mm512_maskz_shuffle_f32x4(kAll, quads[i + 8], quads[i + 12], 0x88);
      const V odd_high = _mm512_maskz_shuffle_f32x4(kAll, quads[i + 8], quads[i + 12], 0xDD);
      rows[i] = _mm512_maskz_shuffle_f32x4(kAll, even_low, even_high, 0x88);
      rows[i + 4] = _mm512_maskz_shuffle_f32x4(kAll, odd_low, odd_high, 0x88);
      rows[i + 8] = _mm512_maskz_shuffle_f32x4(kAll, even_low, even_high, 0xDD);
      rows[i + 12] = _mm512_maskz_shuffle_f32x4(kAll, odd_low, odd_high, 0xDD);
    }
  }

 private:
  template <int kHalf>
  static HEADWISE_ALWAYS_INLINE __m256 half(V v) {
    return _mm512_maskz_extractf32x8_ps(0xFF, v, kHalf);
  }
  static HEADWISE_ALWAYS_INLINE __m256i load_16x16(const void* p) {
    return _mm256_loadu_si256(static_cast<const __m256i*>(p));
  }
  static HEADWISE_ALWAYS_INLINE void store_16x16(void* p, __m256i x) {
    _mm256_storeu_si256(static_cast<__m256i*>(p), x);
  }
  static HEADWISE_ALWAYS_INLINE V widen(__m256i bf16_bits) {
    return _mm512_castsi512_ps(
        _mm512_maskz_slli_epi32(kAll, _mm512_maskz_cvtepu16_epi32(kAll, bf16_bits), 16));
  }
  static HEADWISE_ALWAYS_INLINE __m256i to_f16(V v) {
    return _mm512_maskz_cvtps_ph(kAll, v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  /// Not VCVTNEPS2BF16, which flushes subnormals.
  static HEADWISE_ALWAYS_INLINE __m256i to_bf16(V v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd =
        _mm512_and_si512(_mm512_maskz_srli_epi32(kAll, bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded =
        _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd);
    const __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7FFFFFFF));
    const __mmask16 is_nan = _mm512_cmpgt_epi32_mask(magnitude, _mm512_set1_epi32(0x7F800000));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x00400000));
    const __m512i chosen = _mm512_mask_mov_epi32(rounded, is_nan, quiet);
    return _mm512_maskz_cvtepi32_epi16(kAll, _mm512_maskz_srli_epi32(kAll, chosen, 16));
  }
};
static_assert(CompiledIsa<Avx512>);

}  // namespace headwise::inline v0::simd
#pragma GCC diagnostic pop
#endif
