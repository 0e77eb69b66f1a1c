// SPDX-License-Identifier: MIT
#include "headwise/core/rounding.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <limits>

namespace headwise {
namespace {

TEST(Rounding, IsUpToWholePages) {
  static_assert(ceil_div(0, 16) == 0 && ceil_div(1, 16) == 1 && ceil_div(16, 16) == 1);
  static_assert(round_up(0, 16) == 0 && round_up(1, 16) == 16 && round_up(17, 16) == 32);
  constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();
  static_assert(ceil_div(kMost, 16) == kMost / 16 + 1);
}

}  // namespace
}  // namespace headwise
