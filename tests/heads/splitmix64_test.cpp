// SPDX-License-Identifier: MIT
#include "headwise/heads/splitmix64.hpp"

#include <gtest/gtest.h>

namespace headwise {
namespace {

TEST(SplitMix64, IsTheReferenceStream) {
  SplitMix64 random(1234567);  // the values that ports of splitmix64.c are checked with
  EXPECT_EQ(random.next(), 6457827717110365317U);
  EXPECT_EQ(random.next(), 3203168211198807973U);
  EXPECT_EQ(random.next(), 9817491932198370423U);
  EXPECT_EQ(random.next(), 4593380528125082431U);
  EXPECT_EQ(random.next(), 16408922859458223821U);
}

TEST(SplitMix64, FillsTheUnitInterval) {
  SplitMix64 random(0);
  double sum = 0.0;
  for (int i = 0; i < 10000; ++i) {
    const double x = random.next_unit();
    ASSERT_GE(x, 0.0);
    ASSERT_LT(x, 1.0);
    sum += x;
  }
  EXPECT_NEAR(sum / 10000.0, 0.5, 0.01);
}

}  // namespace
}  // namespace headwise
