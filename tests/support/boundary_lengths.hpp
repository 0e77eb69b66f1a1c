// SPDX-License-Identifier: MIT
/// @file boundary_lengths.hpp
/// The lengths at which windowed caches go wrong in the field, once for all tests.
#pragma once

#include <cstdint>
#include <set>
#include <vector>

namespace headwise::test {

/// Lengths around a window's, a store's and a page's boundaries, in order.
/// @param capacity  rows that the store holds before it wraps
inline std::vector<std::int64_t> boundary_lengths(std::int64_t sink, std::int64_t recent,
                                                  std::int64_t capacity, std::int64_t page_tokens) {
  std::set<std::int64_t> lengths{0, 1, 127, 128, 129, 130, 255, 256, 257, 511, 512, 513};
  for (const std::int64_t middle : {sink, recent, sink + recent, capacity, 2 * capacity + 1,
                                    page_tokens, 2 * page_tokens, 5 * page_tokens}) {
    for (const std::int64_t length : {middle - 1, middle, middle + 1}) {
      if (length >= 0) lengths.insert(length);
    }
  }
  return {lengths.begin(), lengths.end()};
}

}  // namespace headwise::test
