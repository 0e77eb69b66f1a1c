// SPDX-License-Identifier: MIT
#include "headwise/core/dtype.hpp"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <type_traits>

namespace headwise {
namespace {

/// A two-byte format by its definition: sign, exponent and mantissa as numbers.
template <class T>
struct Format;
template <>
struct Format<f16> {
  static constexpr int kMantissaBits = 10;
  static constexpr int kBias = 15;
};
template <>
struct Format<bf16> {
  static constexpr int kMantissaBits = 7;
  static constexpr int kBias = 127;
};

template <class T>
constexpr std::uint16_t kInfinityBits = static_cast<std::uint16_t>(
    ((1U << (15 - Format<T>::kMantissaBits)) - 1) << Format<T>::kMantissaBits);

/// The value of finite non-negative bits; for infinity the power of two that would come next.
template <class T>
double value_of(std::uint16_t magnitude) {
  const int exponent = magnitude >> Format<T>::kMantissaBits;
  const int mantissa = magnitude & ((1 << Format<T>::kMantissaBits) - 1);
  const int hidden = exponent == 0 ? 0 : 1 << Format<T>::kMantissaBits;
  const int power = (exponent == 0 ? 1 : exponent) - Format<T>::kBias - Format<T>::kMantissaBits;
  return std::ldexp(static_cast<double>(mantissa + hidden), power);
}

/// Rounds by looking for the two neighbours and taking the nearer, on a tie the even one.
template <class T>
std::uint16_t round_by_search(float x) {
  const double magnitude = std::fabs(static_cast<double>(x));
  const auto sign = static_cast<std::uint16_t>(std::signbit(x) ? 0x8000U : 0U);
  std::uint16_t low = 0;
  std::uint16_t high = kInfinityBits<T>;
  if (magnitude >= value_of<T>(high)) return static_cast<std::uint16_t>(sign | high);
  while (high - low > 1) {
    const auto middle = static_cast<std::uint16_t>((low + high) / 2);
    (value_of<T>(middle) <= magnitude ? low : high) = middle;
  }
  const double below = magnitude - value_of<T>(low);
  const double above = value_of<T>(high) - magnitude;
  const bool up = above < below || (above == below && (low & 1U) != 0);
  return static_cast<std::uint16_t>(sign | (up ? high : low));
}

template <class T>
class TwoBytes : public ::testing::Test {};
using TwoByteTypes = ::testing::Types<f16, bf16>;
struct TwoByteNames {
  template <class T>
  static std::string GetName(int) {
    return std::is_same_v<T, f16> ? "f16" : "bf16";
  }
};
TYPED_TEST_SUITE(TwoBytes, TwoByteTypes, TwoByteNames);

TYPED_TEST(TwoBytes, WidensEveryValueByItsDefinition) {
  for (std::uint32_t bits = 0; bits < 0x10000U; ++bits) {
    const float widened = to_float(TypeParam{static_cast<std::uint16_t>(bits)});
    const auto magnitude = static_cast<std::uint16_t>(bits & 0x7FFFU);
    ASSERT_EQ(std::signbit(widened), bits >= 0x8000U) << bits;
    if (magnitude > kInfinityBits<TypeParam>) {
      ASSERT_TRUE(std::isnan(widened)) << bits;
    } else if (magnitude == kInfinityBits<TypeParam>) {
      ASSERT_TRUE(std::isinf(widened)) << bits;
    } else {
      ASSERT_EQ(std::fabs(static_cast<double>(widened)), value_of<TypeParam>(magnitude)) << bits;
    }
  }
}

TYPED_TEST(TwoBytes, RoundTripsEveryValue) {
  for (std::uint32_t bits = 0; bits < 0x10000U; ++bits) {
    const TypeParam x{static_cast<std::uint16_t>(bits)};
    const TypeParam back = from_float<TypeParam>(to_float(x));
    if ((bits & 0x7FFFU) > kInfinityBits<TypeParam>) {
      ASSERT_TRUE(std::isnan(to_float(back))) << bits;  // a NaN stays one, its payload may differ
    } else {
      ASSERT_EQ(back, x) << bits;
    }
  }
}

TYPED_TEST(TwoBytes, RoundsToNearestTiesToEven) {
  for (std::uint16_t low = 0; low < kInfinityBits<TypeParam>; ++low) {
    const double a = value_of<TypeParam>(low);
    const double b = value_of<TypeParam>(static_cast<std::uint16_t>(low + 1));
    const auto middle = static_cast<float>((a + b) / 2);  // exact: floats have more digits
    for (const float x : {middle, std::nextafter(middle, 0.0F), std::nextafter(middle, 1e38F)}) {
      ASSERT_EQ(from_float<TypeParam>(x).bits, round_by_search<TypeParam>(x)) << x;
      ASSERT_EQ(from_float<TypeParam>(-x).bits, round_by_search<TypeParam>(-x)) << -x;
    }
  }
}

TYPED_TEST(TwoBytes, RoundsAnyFloatAsTheSearchDoes) {
  std::mt19937 random(7);
  for (int i = 0; i < 200'000; ++i) {
    const float x = std::bit_cast<float>(static_cast<std::uint32_t>(random()));
    if (std::isnan(x)) continue;
    ASSERT_EQ(from_float<TypeParam>(x).bits, round_by_search<TypeParam>(x)) << x;
  }
}

TYPED_TEST(TwoBytes, KeepsInfinityNanAndSignedZero) {
  const float infinity = std::numeric_limits<float>::infinity();
  EXPECT_EQ(from_float<TypeParam>(infinity).bits, kInfinityBits<TypeParam>);
  EXPECT_EQ(from_float<TypeParam>(-infinity).bits, kInfinityBits<TypeParam> | 0x8000U);
  EXPECT_EQ(from_float<TypeParam>(-0.0F).bits, 0x8000U);
  // Payloads that live in the low bits only must not round to infinity.
  for (const std::uint32_t nan : {0x7FC00000U, 0x7F800001U, 0x7FFFFFFFU, 0xFF800001U}) {
    EXPECT_TRUE(std::isnan(to_float(from_float<TypeParam>(std::bit_cast<float>(nan))))) << nan;
  }
  EXPECT_EQ(from_float<TypeParam>(std::numeric_limits<float>::max()).bits,
            kInfinityBits<TypeParam>);
}

TEST(Dtype, HalfOverflowsFrom65520) {
  EXPECT_EQ(to_float(from_float<f16>(65519.996F)), 65504.0F);
  EXPECT_TRUE(std::isinf(to_float(from_float<f16>(65520.0F))));
}

TEST(Dtype, HalfKeepsSubnormals) {
  EXPECT_EQ(from_float<f16>(0x1p-24F).bits, 1);
  EXPECT_EQ(from_float<f16>(0x1p-25F).bits, 0);  // a tie, 0 is even
  EXPECT_EQ(from_float<f16>(std::nextafter(0x1p-25F, 1.0F)).bits, 1);
  EXPECT_EQ(from_float<f16>(0x1.FF8p-15F).bits, 0x3FF);                    // the largest one
  EXPECT_EQ(from_float<f16>(std::nextafter(0x1p-14F, 0.0F)).bits, 0x400);  // rounds up to normal
}

TEST(Dtype, FloatPassesThrough) {
  for (const float x : {0.0F, -1.5F, 1e-45F, 3e38F}) {
    EXPECT_EQ(from_float<f32>(x), x);
    EXPECT_EQ(to_float(x), x);
  }
  static_assert(RowElement<f32> && RowElement<f16> && RowElement<bf16>);
  static_assert(!RowElement<double> && !RowElement<std::uint16_t>);
  static_assert(sizeof(f16) == 2 && sizeof(bf16) == 2);
}

}  // namespace
}  // namespace headwise
