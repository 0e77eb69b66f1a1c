// SPDX-License-Identifier: MIT
// That -ffast-math changes none of this is the consumer's to show (tests/flags).
#include "headwise/core/bits.hpp"

#include <gtest/gtest.h>

#include <limits>

namespace headwise {
namespace {

template <class T>
class Bits : public ::testing::Test {};
using Floats = ::testing::Types<float, double>;
TYPED_TEST_SUITE(Bits, Floats);

TYPED_TEST(Bits, TellNumbersFromWhatIsNone) {
  using Limits = std::numeric_limits<TypeParam>;
  constexpr TypeParam kOne = 1;
  for (const TypeParam x :
       {TypeParam{0}, -TypeParam{0}, kOne, Limits::max(), Limits::lowest(), Limits::denorm_min()}) {
    EXPECT_TRUE(is_finite(x)) << x;
    EXPECT_FALSE(is_nan(x)) << x;
    EXPECT_FALSE(is_minus_infinity(x)) << x;
    EXPECT_EQ(is_zero(x), x == 0) << x;
  }
  for (const TypeParam x : {Limits::quiet_NaN(), -Limits::quiet_NaN(), Limits::signaling_NaN()}) {
    EXPECT_FALSE(is_finite(x));
    EXPECT_TRUE(is_nan(x));
    EXPECT_FALSE(is_minus_infinity(x));
    EXPECT_FALSE(is_zero(x));
  }
  for (const TypeParam x : {Limits::infinity(), -Limits::infinity()}) {
    EXPECT_FALSE(is_finite(x));
    EXPECT_FALSE(is_nan(x));
    EXPECT_FALSE(is_zero(x));
    EXPECT_EQ(is_minus_infinity(x), x < 0);
  }
}

TEST(OpaqueFloat, HasTheBitsAskedFor) {
  EXPECT_EQ(opaque_bits(opaque_float(0xFF800000U)), 0xFF800000U);
  EXPECT_EQ(opaque_bits(opaque_float(0x7FC00000U)), 0x7FC00000U);
}

}  // namespace
}  // namespace headwise
