// SPDX-License-Identifier: MIT
#include "headwise/heads/numbers.hpp"

#include <gtest/gtest.h>

#include <cfenv>
#include <limits>

namespace headwise {
namespace {

TEST(RoundHalfEven, SendsHalvesToTheEvenNeighbour) {
  EXPECT_EQ(round_half_even(0.5), 0.0);
  EXPECT_EQ(round_half_even(1.5), 2.0);
  EXPECT_EQ(round_half_even(2.5), 2.0);
  EXPECT_EQ(round_half_even(3.5), 4.0);
  EXPECT_EQ(round_half_even(2.4999), 2.0);
  EXPECT_EQ(round_half_even(2.5001), 3.0);
  EXPECT_EQ(round_half_even(35.84), 36.0);
  EXPECT_EQ(round_half_even(-1.5), -2.0);
  EXPECT_EQ(round_half_even(-0.5), 0.0);
  EXPECT_EQ(round_half_even(0.49999999999999994), 0.0);  // x + 0.5 would round to 1
}

TEST(RoundHalfEven, IgnoresTheRoundingMode) {
  std::fesetround(FE_UPWARD);
  EXPECT_EQ(round_half_even(2.5), 2.0);
  EXPECT_EQ(round_half_even(2.1), 2.0);
  std::fesetround(FE_TONEAREST);
}

}  // namespace
}  // namespace headwise
