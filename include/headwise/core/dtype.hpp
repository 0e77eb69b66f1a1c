// SPDX-License-Identifier: MIT
/// @file dtype.hpp
/// Two-byte storage types and their exact conversions; fast conversions live in simd/.
#pragma once

#include <bit>
#include <concepts>
#include <cstdint>

#include "headwise/core/config.hpp"

namespace headwise::inline v0 {

/// IEEE binary32.
using f32 = float;

/// IEEE binary16 bits. Storage only: std::bit_cast to Eigen::half or __half where arithmetic is
/// due.
struct f16 {
  std::uint16_t bits = 0;  ///< sign, 5 bits of exponent, 10 of mantissa
  friend constexpr bool operator==(f16, f16) = default;
};

/// bfloat16 bits: the upper half of a float.
struct bf16 {
  std::uint16_t bits = 0;  ///< sign, 8 bits of exponent, 7 of mantissa
  friend constexpr bool operator==(bf16, bf16) = default;
};

/// What a K or V row may be made of.
template <class T>
concept RowElement = std::same_as<T, f32> || std::same_as<T, f16> || std::same_as<T, bf16>;

/// The value as a float: exact for every row type.
constexpr float to_float(f32 x) { return x; }

/// The value as a float: exact for every row type.
constexpr float to_float(bf16 x) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(x.bits) << 16);
}

/// The value as a float: exact for every row type.
constexpr float to_float(f16 x) {
  const std::uint32_t sign = static_cast<std::uint32_t>(x.bits & 0x8000U) << 16;
  const std::uint32_t exponent = (x.bits >> 10) & 0x1FU;
  const std::uint32_t mantissa = x.bits & 0x3FFU;
  if (exponent == 0x1FU) return std::bit_cast<float>(sign | 0x7F800000U | (mantissa << 13));
  if (exponent != 0) {
    return std::bit_cast<float>(sign | ((exponent + 112U) << 23) | (mantissa << 13));  // 127 - 15
  }
  const float magnitude = static_cast<float>(mantissa) * 0x1p-24F;  // subnormal: exact in float
  return std::bit_cast<float>(sign | std::bit_cast<std::uint32_t>(magnitude));
}

/// Nearest representable value, ties to even; overflow to infinity; NaN stays NaN.
template <RowElement T>
constexpr T from_float(const float& x) {  // not by value: see bits.hpp
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
  const bool is_nan = (bits & 0x7FFFFFFFU) > 0x7F800000U;
  if constexpr (std::same_as<T, f32>) {
    return x;
  } else if constexpr (std::same_as<T, bf16>) {
    if (is_nan) return {static_cast<std::uint16_t>((bits >> 16) | 0x40U)};
    return {static_cast<std::uint16_t>((bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16)};
  } else {
    const auto sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000U);
    const std::uint32_t magnitude = bits & 0x7FFFFFFFU;
    if (is_nan) return {static_cast<std::uint16_t>(sign | 0x7E00U)};
    if (magnitude >= 0x477FF000U) return {static_cast<std::uint16_t>(sign | 0x7C00U)};  // >= 65520
    if (magnitude < 0x38800000U) {  // below 2^-14: a multiple of 2^-24, rounded by the adder
      const float shifted = std::bit_cast<float>(magnitude) + 0.5F;
      return {static_cast<std::uint16_t>(sign | (std::bit_cast<std::uint32_t>(shifted) & 0x7FFU))};
    }
    const std::uint32_t rounded = magnitude + 0xFFFU + ((magnitude >> 13) & 1U);
    return {static_cast<std::uint16_t>(sign | ((rounded - 0x38000000U) >> 13))};  // 112 << 23
  }
}

}  // namespace headwise::inline v0
