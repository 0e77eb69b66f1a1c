// SPDX-License-Identifier: MIT
/// @file splitmix64.hpp
/// A seeded random stream that is the same on every platform.
#pragma once

#include <cstdint>

namespace headwise::inline v0 {

/// Steele, Lea, Flood: Fast splittable pseudorandom number generators (OOPSLA 2014), with the
/// constants of Vigna's public-domain splitmix64.c. The standard library's distributions differ
/// from one implementation to the next, so that none is used.
class SplitMix64 {
 public:
  /// Equal seeds give equal streams.
  explicit constexpr SplitMix64(std::uint64_t seed) : state_(seed) {}

  /// The next 64 uniform bits.
  constexpr std::uint64_t next() {
    std::uint64_t z = (state_ += 0x9E3779B97F4A7C15U);  // 2^64 / golden ratio
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9U;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBU;
    return z ^ (z >> 31);
  }

  /// Uniform in [0, 1): a multiple of 2^-53, exact in a double.
  constexpr double next_unit() { return static_cast<double>(next() >> 11) * 0x1p-53; }

 private:
  std::uint64_t state_;
};

}  // namespace headwise::inline v0
