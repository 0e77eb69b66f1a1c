// SPDX-License-Identifier: MIT
#include "headwise/simd/math.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "support/isa_types.hpp"

namespace headwise::test {
namespace {

template <class Isa>
float exp_of(float x) {
  using O = simd::Ops<Isa>;
  float y[16];
  O::store(y, simd::exp<Isa>(O::broadcast(x)));
  return y[0];
}

template <class Isa>
class SimdExp : public ::testing::Test {};
TYPED_TEST_SUITE(SimdExp, AllIsas, IsaNames);

TYPED_TEST(SimdExp, IsWithinTwoUlpUpToZero) {
  double worst = 0.0;
  for (double x = -87.3; x <= 0.0; x += 0.00037) {
    const auto rounded = static_cast<float>(x);
    const double truth = std::exp(static_cast<double>(rounded));
    const auto nearest = static_cast<float>(truth);
    const double ulp =
        static_cast<double>(std::nextafter(nearest, 2.0F)) - static_cast<double>(nearest);
    worst =
        std::max(worst, std::abs(static_cast<double>(exp_of<TypeParam>(rounded)) - truth) / ulp);
  }
  EXPECT_LE(worst, 2.0);
}

TYPED_TEST(SimdExp, IsOneAtZero) { EXPECT_EQ(exp_of<TypeParam>(0.0F), 1.0F); }

TYPED_TEST(SimdExp, IsExactlyZeroFarBelow) {
  EXPECT_EQ(exp_of<TypeParam>(-87.4F), 0.0F);
  EXPECT_EQ(exp_of<TypeParam>(-1e30F), 0.0F);
  EXPECT_EQ(exp_of<TypeParam>(std::numeric_limits<float>::lowest()), 0.0F);
  EXPECT_EQ(exp_of<TypeParam>(-std::numeric_limits<float>::infinity()), 0.0F);
}

TYPED_TEST(SimdExp, IsNeverSubnormal) {
  EXPECT_GE(exp_of<TypeParam>(-87.33F), std::numeric_limits<float>::min());
}

}  // namespace
}  // namespace headwise::test
