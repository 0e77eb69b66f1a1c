// SPDX-License-Identifier: MIT
/// @file checked.hpp
/// Integers from outside: refused at the entrance, with value and limit, before they can overflow.
#pragma once

#include <concepts>
#include <cstdint>
#include <limits>
#include <string_view>
#include <type_traits>
#include <utility>

#include "headwise/core/check.hpp"

namespace headwise::inline v0 {

/// The longest context, in tokens, that any part of the library takes: a row of 2^17 elements of
/// four bytes a token still leaves four bits of an int64.
inline constexpr std::int64_t kMaxTokens = std::int64_t{1} << 40;

}  // namespace headwise::inline v0

namespace headwise::inline v0::detail {

/// a + b. @param what  what the sum is, in words.
/// @throws ConfigError with `what` and both values when T cannot hold it.
template <std::integral T>
constexpr T checked_add(T a, T b, std::string_view what) {
  using Limits = std::numeric_limits<T>;
  if (b > 0 ? a > Limits::max() - b : a < Limits::min() - b) {
    fail<ConfigError>(what, ": ", a, " + ", b, " does not fit ", sizeof(T) * 8, " bits");
  }
  return static_cast<T>(a + b);
}

/// a * b, as checked_add().
template <std::integral T>
constexpr T checked_mul(T a, T b, std::string_view what) {
  using Limits = std::numeric_limits<T>;
  bool fits = true;
  if (a > 0 && b > 0) fits = a <= Limits::max() / b;
  if constexpr (std::signed_integral<T>) {
    // Quotients round to zero, and so to the last factor that fits.
    if (a > 0 && b < 0) fits = b >= Limits::min() / a;
    if (a < 0 && b > 0) fits = a >= Limits::min() / b;
    if (a < 0 && b < 0) fits = a >= Limits::max() / b;
  }
  if (!fits) fail<ConfigError>(what, ": ", a, " * ", b, " does not fit ", sizeof(T) * 8, " bits");
  return static_cast<T>(a * b);
}

/// `value` as a `To`, which may be narrower or of the other sign.
/// @throws ConfigError with `what`, value and limits when it is not the same number there.
template <std::integral To, std::integral From>
constexpr To checked_cast(From value, std::string_view what) {
  if (!std::in_range<To>(value)) {
    fail<ConfigError>(what, " must be in [", std::numeric_limits<To>::min(), ", ",
                      std::numeric_limits<To>::max(), "], got ", value);
  }
  return static_cast<To>(value);
}

/// `value`, when it lies in [least, most].
/// @throws ConfigError with `what`, value and limits when it does not.
template <std::integral T>
constexpr T checked_range(T value, std::type_identity_t<T> least, std::type_identity_t<T> most,
                          std::string_view what) {
  if (value < least || value > most) {
    fail<ConfigError>(what, " must be in [", least, ", ", most, "], got ", value);
  }
  return value;
}

}  // namespace headwise::inline v0::detail
