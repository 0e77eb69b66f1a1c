// SPDX-License-Identifier: MIT
/// @file avx2.hpp
/// Eight floats: x86-64 with AVX2, FMA and F16C (-march=x86-64-v3).
#pragma once

#include "headwise/core/config.hpp"
#include "headwise/core/dtype.hpp"
#include "headwise/simd/isa.hpp"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>

#include <concepts>
#include <cstdint>

namespace headwise::inline v0::simd {

template <>
struct Ops<Avx2> {
  using V = __m256;
  static constexpr int kWidth = 8;

  static HEADWISE_ALWAYS_INLINE V zero() { return _mm256_setzero_ps(); }
  static HEADWISE_ALWAYS_INLINE V broadcast(float x) { return _mm256_set1_ps(x); }
  static HEADWISE_ALWAYS_INLINE V load(const float* p) { return _mm256_loadu_ps(p); }
  static HEADWISE_ALWAYS_INLINE V load(const f16* p) { return _mm256_cvtph_ps(load_8x16(p)); }
  static HEADWISE_ALWAYS_INLINE V load(const bf16* p) { return widen(load_8x16(p)); }
  static HEADWISE_ALWAYS_INLINE V load(const std::int8_t* p) {
    const __m128i bytes = _mm_loadl_epi64(static_cast<const __m128i*>(static_cast<const void*>(p)));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
  }
  static HEADWISE_ALWAYS_INLINE void load_int4(const std::uint8_t* p, V& low, V& high) {
    const __m256i bytes = _mm256_cvtepi8_epi32(
        _mm_loadl_epi64(static_cast<const __m128i*>(static_cast<const void*>(p))));
    low = _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(bytes, 28), 28));
    high = _mm256_cvtepi32_ps(_mm256_srai_epi32(bytes, 4));
  }
  static HEADWISE_ALWAYS_INLINE void store(float* p, V v) { _mm256_storeu_ps(p, v); }
  static HEADWISE_ALWAYS_INLINE void store(f16* p, V v) { store_8x16(p, to_f16(v)); }
  static HEADWISE_ALWAYS_INLINE void store(bf16* p, V v) { store_8x16(p, to_bf16(v)); }

  static HEADWISE_ALWAYS_INLINE V add(V a, V b) { return _mm256_add_ps(a, b); }
  static HEADWISE_ALWAYS_INLINE V sub(V a, V b) { return _mm256_sub_ps(a, b); }
  static HEADWISE_ALWAYS_INLINE V mul(V a, V b) { return _mm256_mul_ps(a, b); }
  static HEADWISE_ALWAYS_INLINE V div(V a, V b) { return _mm256_div_ps(a, b); }
  static HEADWISE_ALWAYS_INLINE V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
  static HEADWISE_ALWAYS_INLINE V max(V a, V b) { return _mm256_max_ps(a, b); }

  static HEADWISE_ALWAYS_INLINE bool any_above(V a, V b) {
    return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)) != 0;
  }
  static HEADWISE_ALWAYS_INLINE float reduce_add(V v) {
    __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_add_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_add_ss(x, _mm_movehdup_ps(x)));
  }
  static HEADWISE_ALWAYS_INLINE float reduce_max(V v) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
  }

  static HEADWISE_ALWAYS_INLINE V round(V v) {
    return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static HEADWISE_ALWAYS_INLINE V scale_by_exp2(V v, V n) {
    const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_mul_ps(v, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
  }
  static HEADWISE_ALWAYS_INLINE V zero_below(V v, V x, float low) {
    return _mm256_andnot_ps(_mm256_cmp_ps(x, _mm256_set1_ps(low), _CMP_LT_OQ), v);
  }
  template <RowElement Row>
  static HEADWISE_ALWAYS_INLINE V round_to(V v) {
    if constexpr (std::same_as<Row, f16>) return _mm256_cvtph_ps(to_f16(v));
    if constexpr (std::same_as<Row, bf16>) return widen(to_bf16(v));
    if constexpr (std::same_as<Row, f32>) return v;
  }

  static HEADWISE_ALWAYS_INLINE void transpose(V (&rows)[kWidth]) {
    V pairs[8];  // of rows, element by element
    for (int i = 0; i < 8; i += 2) {
      pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
      pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
    }
    V quads[8];
    for (int i = 0; i < 8; i += 4) {
      quads[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
      quads[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xEE);
      quads[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
      quads[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xEE);
    }
    for (int i = 0; i < 4; ++i) {
      rows[i] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20);
      rows[i + 4] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31);
    }
  }

 private:
  static HEADWISE_ALWAYS_INLINE __m128i load_8x16(const void* p) {
    return _mm_loadu_si128(static_cast<const __m128i*>(p));
  }
  static HEADWISE_ALWAYS_INLINE void store_8x16(void* p, __m128i x) {
    _mm_storeu_si128(static_cast<__m128i*>(p), x);
  }
  static HEADWISE_ALWAYS_INLINE V widen(__m128i bf16_bits) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bf16_bits), 16));
  }
  static HEADWISE_ALWAYS_INLINE __m128i to_f16(V v) {
    return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  static HEADWISE_ALWAYS_INLINE __m128i to_bf16(V v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded =
        _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), odd);
    const __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(0x7FFFFFFF));
    const __m256i is_nan = _mm256_cmpgt_epi32(magnitude, _mm256_set1_epi32(0x7F800000));
    const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x00400000));
    const __m256i upper = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, is_nan), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(upper, upper), 0x08);
    return _mm256_castsi256_si128(packed);
  }
};
static_assert(CompiledIsa<Avx2>);

}  // namespace headwise::inline v0::simd
#endif
