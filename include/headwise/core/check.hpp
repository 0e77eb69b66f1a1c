// SPDX-License-Identifier: MIT
/// @file check.hpp
/// The three tiers of errors: exceptions at set-up, statuses in service, assertions for bugs.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>

#include "headwise/core/config.hpp"

namespace headwise::inline v0 {

/// A value given at set-up is out of its range; what() names the value and the limit.
class ConfigError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// A parsed file is not what its format says; what() names file, line (or key) and value.
class FormatError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

}  // namespace headwise::inline v0

namespace headwise::inline v0::detail {

[[noreturn]] inline void fatal(const char* message) {
  std::fprintf(stderr, "headwise: %s\n", message);
  std::abort();
}

inline void append_part(std::string& text, std::string_view part) { text += part; }
template <class Number>
  requires std::is_arithmetic_v<Number>
void append_part(std::string& text, Number part) {
  if constexpr (std::is_floating_point_v<Number>) {
    char digits[32];
    std::snprintf(digits, sizeof digits, "%.9g", static_cast<double>(part));
    text += digits;
  } else {
    text += std::to_string(part);
  }
}

}  // namespace headwise::inline v0::detail

namespace headwise::inline v0 {

/// Throws `Error` with the parts (strings and numbers) joined; without exceptions it calls
/// HEADWISE_FATAL with the same text.
template <class Error, class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::string text;
  (detail::append_part(text, parts), ...);
#if HEADWISE_HAS_EXCEPTIONS
  throw Error(text);
#else
  HEADWISE_FATAL(text.c_str());
  std::abort();  // a replaced handler that returns must not let the caller go on
#endif
}

}  // namespace headwise::inline v0

/// A caller's bug: checked in hardened builds only, never part of the library's behaviour.
#if HEADWISE_HARDENED
#define HEADWISE_ASSERT(condition, message) \
  ((condition) ? void(0) : HEADWISE_FATAL("assertion failed: " #condition ": " message))
#else
#define HEADWISE_ASSERT(condition, message) void(0)
#endif
