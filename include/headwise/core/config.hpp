// SPDX-License-Identifier: MIT
/// @file config.hpp
/// Every macro a consumer may set, and what follows from the compiler's own macros.
#pragma once

/// 1: caller's bugs are caught by HEADWISE_ASSERT and freed rows are poisoned with NaN.
/// Default: on in debug builds. Results are the same either way.
#ifndef HEADWISE_HARDENED
#ifdef NDEBUG
#define HEADWISE_HARDENED 0
#else
#define HEADWISE_HARDENED 1
#endif
#endif

/// Called with a `const char*` where an error cannot be thrown (-fno-exceptions) and by a failed
/// HEADWISE_ASSERT. Must not return. Define it before the first include to route it elsewhere.
#ifndef HEADWISE_FATAL
#define HEADWISE_FATAL(message) ::headwise::detail::fatal(message)
#endif

/// @def HEADWISE_HAS_EXCEPTIONS
/// 1 where errors at set-up are thrown; 0: HEADWISE_FATAL is called instead. Follows the compiler.
#if defined(__cpp_exceptions) || defined(__EXCEPTIONS) || defined(_CPPUNWIND)
#define HEADWISE_HAS_EXCEPTIONS 1
#else
#define HEADWISE_HAS_EXCEPTIONS 0
#endif

/// @def HEADWISE_ALWAYS_INLINE
/// Inlined even where the compiler would not: kernels keep their sums in registers.
/// @def HEADWISE_NEVER_INLINE
/// Kept out of line: a rare path beside a hot one, or code that must round alike wherever called.
/// @def HEADWISE_RESTRICT
/// The pointer's memory is reached through no other pointer.
#if defined(__GNUC__) || defined(__clang__)
#define HEADWISE_ALWAYS_INLINE inline __attribute__((always_inline))
#define HEADWISE_NEVER_INLINE __attribute__((noinline))
#define HEADWISE_RESTRICT __restrict__
#else
#define HEADWISE_ALWAYS_INLINE inline
#define HEADWISE_NEVER_INLINE
#define HEADWISE_RESTRICT
#endif
