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

template <class Isa>
float tanh_of(float x) {
  using O = simd::Ops<Isa>;
  float y[16];
  O::store(y, simd::tanh<Isa>(O::broadcast(x)));
  return y[0];
}

template <class Isa>
class SimdTanh : public ::testing::Test {};
TYPED_TEST_SUITE(SimdTanh, AllIsas, IsaNames);

TYPED_TEST(SimdTanh, IsWithinFourUlp) {
  double worst = 0.0;
  const auto compare = [&](float x) {
    const double truth = std::tanh(static_cast<double>(x));
    const auto nearest = static_cast<float>(truth);
    const double ulp = static_cast<double>(std::nextafter(std::fabs(nearest), 2.0F)) -
                       std::fabs(static_cast<double>(nearest));
    const double error = std::fabs(static_cast<double>(tanh_of<TypeParam>(x)) - truth) / ulp;
    ASSERT_LE(error, 4.0) << x;
    worst = std::max(worst, error);
  };
  for (double x = -11.0; x <= 11.0; x += 0.00041) compare(static_cast<float>(x));
  for (float x = 1e-30F; x < 1.0F; x *= 1.07F) {
    compare(x);
    compare(-x);
  }
  for (const float x : {0.625F, std::nextafter(0.625F, 0.0F), std::nextafter(0.625F, 1.0F)}) {
    compare(x);
    compare(-x);
  }
  EXPECT_GT(worst, 0.0);
}

TYPED_TEST(SimdTanh, EndsAtOneAndKeepsNan) {
  const float inf = std::numeric_limits<float>::infinity();
  for (const float x : {20.0F, 1e30F, std::numeric_limits<float>::max(), inf}) {
    EXPECT_NEAR(tanh_of<TypeParam>(x), 1.0F, 1e-6F);
    EXPECT_NEAR(tanh_of<TypeParam>(-x), -1.0F, 1e-6F);
  }
  EXPECT_EQ(tanh_of<TypeParam>(0.0F), 0.0F);
  EXPECT_TRUE(std::isnan(tanh_of<TypeParam>(std::numeric_limits<float>::quiet_NaN())));
}

}  // namespace
}  // namespace headwise::test
