// SPDX-License-Identifier: MIT
/// @file bits.hpp
/// Infinities and NaNs that survive a consumer's -ffast-math: told apart by bits, made from bits.
///
/// Under -ffinite-math-only a compiler may take every float for a finite one: a parameter, the
/// result of arithmetic, a constant that it can see. What it cannot see through is a volatile.
#pragma once

#include <bit>
#include <concepts>
#include <cstdint>
#include <type_traits>

#include "headwise/core/config.hpp"

namespace headwise::inline v0 {

/// The unsigned integer as wide as a floating-point type.
template <std::floating_point T>
using FloatBits = std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>;

/// The bits of x, whatever the compiler believes of it.
/// @param x  by reference: clang 19 takes a parameter of a floating-point type for finite
template <std::floating_point T>
FloatBits<T> opaque_bits(const T& x) noexcept {
  FloatBits<T> bits = std::bit_cast<FloatBits<T>>(x);
  if constexpr (__FINITE_MATH_ONLY__ != 0) {
    const volatile FloatBits<T> opaque = bits;  // else their comparison becomes one of floats
    bits = opaque;
  }
  return bits;
}

/// The float of these bits, unknown to the compiler: a branch that yields a NaN that it knows of
/// counts as never reached.
inline float opaque_float(std::uint32_t bits) noexcept {
  const volatile std::uint32_t opaque = bits;
  return std::bit_cast<float>(std::uint32_t{opaque});
}

/// Bits of an infinity, or the exponent's mask.
template <std::floating_point T>
inline constexpr FloatBits<T> kInfinityBits = [] {
  if constexpr (sizeof(T) == 4) {
    return 0x7F80'0000U;
  } else {
    return 0x7FF0'0000'0000'0000ULL;
  }
}();

/// Neither infinite nor NaN.
template <std::floating_point T>
bool is_finite(const T& x) noexcept {
  return (opaque_bits(x) & kInfinityBits<T>) != kInfinityBits<T>;
}

/// NaN, of either sign.
template <std::floating_point T>
bool is_nan(const T& x) noexcept {
  return static_cast<FloatBits<T>>(opaque_bits(x) << 1U) >
         static_cast<FloatBits<T>>(kInfinityBits<T> << 1U);
}

/// -infinity: a score that is no row's.
template <std::floating_point T>
bool is_minus_infinity(const T& x) noexcept {
  return opaque_bits(x) == (kInfinityBits<T> | ~(static_cast<FloatBits<T>>(-1) >> 1U));
}

/// 0 or -0, and no NaN.
template <std::floating_point T>
bool is_zero(const T& x) noexcept {
  return static_cast<FloatBits<T>>(opaque_bits(x) << 1U) == 0;
}

}  // namespace headwise::inline v0
