// SPDX-License-Identifier: MIT
#include "headwise/simd/simd.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "support/isa_types.hpp"

namespace headwise::test {
namespace {

template <class Isa>
class Simd : public ::testing::Test {
 protected:
  using O = simd::Ops<Isa>;
  using V = typename O::V;
  static constexpr int kWidth = O::kWidth;

  /// Applies `op` to every element of x, register by register. x.size() is a multiple of 16.
  template <class Op>
  static std::vector<float> map(const std::vector<float>& x, Op op) {
    std::vector<float> y(x.size());
    for (std::size_t i = 0; i < x.size(); i += std::size_t{kWidth}) {
      O::store(y.data() + i, op(O::load(x.data() + i)));
    }
    return y;
  }

  template <class Row>
  void check_every_pattern() {
    std::vector<Row> patterns(1U << 16);
    std::vector<float> wide(1U << 16);
    std::vector<Row> back(1U << 16);
    for (std::uint32_t i = 0; i < patterns.size(); ++i) {
      patterns[i].bits = static_cast<std::uint16_t>(i);
    }
    for (std::size_t i = 0; i < patterns.size(); i += std::size_t{kWidth}) {
      const V v = O::load(patterns.data() + i);
      O::store(wide.data() + i, v);
      O::store(back.data() + i, v);
    }
    for (std::size_t i = 0; i < patterns.size(); ++i) {
      const float truth = to_float(patterns[i]);
      if (std::isnan(truth)) {
        ASSERT_TRUE(std::isnan(wide[i])) << i;
        ASSERT_TRUE(std::isnan(to_float(back[i]))) << i;
      } else {
        ASSERT_EQ(std::bit_cast<std::uint32_t>(wide[i]), std::bit_cast<std::uint32_t>(truth)) << i;
        ASSERT_EQ(back[i], patterns[i]) << i;
      }
    }
  }

  template <class Row>
  void check_rounding() {
    std::mt19937 random(7);
    std::vector<float> x;
    for (int i = 0; i < (1 << 16); ++i) {
      // Ties, their neighbours, subnormals, overflow and everything between.
      auto bits = static_cast<std::uint32_t>(random());
      if (i % 4 == 0) bits = (bits & 0xFFFFE000U) | 0x1000U;
      if (i % 4 == 1) bits = (bits & 0xFFFF0000U) | 0x8000U;
      if (i % 4 == 2) bits = (bits & 0x87FFFFFFU) | 0x30000000U;
      x.push_back(std::bit_cast<float>(bits));
    }
    for (std::size_t i = 0; i < x.size(); i += std::size_t{kWidth}) {
      Row stored[16];
      float rounded[16];
      O::store(stored, O::load(x.data() + i));
      O::store(rounded, O::template round_to<Row>(O::load(x.data() + i)));
      for (std::size_t j = 0; j < std::size_t{kWidth}; ++j) {
        if (std::isnan(x[i + j])) {
          ASSERT_TRUE(std::isnan(to_float(stored[j])));
          ASSERT_TRUE(std::isnan(rounded[j]));
        } else {
          ASSERT_EQ(stored[j], from_float<Row>(x[i + j])) << x[i + j];
          ASSERT_EQ(rounded[j], to_float(stored[j])) << x[i + j];
        }
      }
    }
  }
};
TYPED_TEST_SUITE(Simd, AllIsas, IsaNames);

TYPED_TEST(Simd, DoesArithmeticLikeScalars) {
  using Ops = simd::Ops<TypeParam>;
  std::vector<float> x(16);
  std::iota(x.begin(), x.end(), -7.5F);
  const auto three = Ops::broadcast(3.0F);
  const auto equals = [&](const std::vector<float>& y, auto scalar) {
    for (std::size_t i = 0; i < x.size(); ++i) EXPECT_EQ(y[i], scalar(x[i])) << i;
  };
  equals(this->map(x, [&](auto v) { return Ops::add(v, three); }), [](float a) { return a + 3; });
  equals(this->map(x, [&](auto v) { return Ops::sub(v, three); }), [](float a) { return a - 3; });
  equals(this->map(x, [&](auto v) { return Ops::div(v, three); }), [](float a) { return a / 3; });
  equals(this->map(x, [&](auto v) { return Ops::mul(v, three); }), [](float a) { return a * 3; });
  equals(this->map(x, [&](auto v) { return Ops::fma(v, three, v); }),
         [](float a) { return 4 * a; });
  equals(this->map(x, [&](auto v) { return Ops::max(v, three); }),
         [](float a) { return std::max(a, 3.0F); });
  equals(this->map(x, [&](auto v) { return Ops::zero_below(three, v, 0.5F); }),
         [](float a) { return a < 0.5F ? 0.0F : 3.0F; });
  equals(this->map(x, [&](auto) { return Ops::zero(); }), [](float) { return 0.0F; });
}

TYPED_TEST(Simd, ZeroesANanWhereItIsBelow) {
  using Ops = simd::Ops<TypeParam>;
  const auto nan = Ops::broadcast(std::numeric_limits<float>::quiet_NaN());
  float y[16];
  Ops::store(y, Ops::zero_below(nan, Ops::broadcast(-1.0F), 0.0F));
  EXPECT_EQ(y[0], 0.0F);
}

TYPED_TEST(Simd, RoundsToTheNearestInteger) {
  using Ops = simd::Ops<TypeParam>;
  for (const float x : {-126.0F, -2.7F, -2.2F, 0.0F, 0.4F, 0.6F, 3.0F, 126.9F}) {
    float y[16];
    Ops::store(y, Ops::round(Ops::broadcast(x)));
    EXPECT_EQ(y[0], std::nearbyint(x));
  }
}

TYPED_TEST(Simd, ScalesByPowersOfTwo) {
  using Ops = simd::Ops<TypeParam>;
  for (int n = -126; n <= 127; ++n) {
    float y[16];
    Ops::store(y, Ops::scale_by_exp2(Ops::broadcast(1.25F), Ops::broadcast(static_cast<float>(n))));
    EXPECT_EQ(y[0], std::ldexp(1.25F, n));
  }
}

TYPED_TEST(Simd, ReducesEveryLane) {
  using Ops = simd::Ops<TypeParam>;
  for (std::size_t lane = 0; lane < std::size_t{Ops::kWidth}; ++lane) {
    float x[16] = {};
    x[lane] = 5.0F;
    EXPECT_EQ(Ops::reduce_add(Ops::load(x)), 5.0F);
    EXPECT_EQ(Ops::reduce_max(Ops::load(x)), 5.0F);
    EXPECT_TRUE(Ops::any_above(Ops::load(x), Ops::broadcast(4.0F)));
    EXPECT_FALSE(Ops::any_above(Ops::load(x), Ops::broadcast(5.0F)));
    for (float& value : x) value -= 9.0F;
    EXPECT_EQ(Ops::reduce_max(Ops::load(x)), -4.0F);
    EXPECT_EQ(Ops::reduce_add(Ops::load(x)), 5.0F - 9.0F * static_cast<float>(Ops::kWidth));
  }
}

TYPED_TEST(Simd, TransposesASquare) {
  using Ops = simd::Ops<TypeParam>;
  constexpr auto kSide = static_cast<std::size_t>(Ops::kWidth);
  std::vector<float> x(kSide * kSide);
  std::iota(x.begin(), x.end(), 0.0F);
  typename Ops::V rows[kSide];
  for (std::size_t i = 0; i < kSide; ++i) rows[i] = Ops::load(x.data() + i * kSide);
  Ops::transpose(rows);
  for (std::size_t i = 0; i < kSide; ++i) {
    float row[16];
    Ops::store(row, rows[i]);
    for (std::size_t j = 0; j < kSide; ++j) EXPECT_EQ(row[j], x[j * kSide + i]);
  }
}

TYPED_TEST(Simd, LoadsAndStoresUnaligned) {
  using Ops = simd::Ops<TypeParam>;
  std::vector<float> x(40);
  std::iota(x.begin(), x.end(), 0.0F);
  for (std::size_t offset = 0; offset < 16; ++offset) {
    std::vector<float> y(40, -1.0F);
    Ops::store(y.data() + offset, Ops::load(x.data() + offset));
    for (std::size_t i = 0; i < y.size(); ++i) {
      const bool written = i >= offset && i < offset + std::size_t{Ops::kWidth};
      EXPECT_EQ(y[i], written ? x[i] : -1.0F);
    }
  }
}

TYPED_TEST(Simd, WidensEveryHalfExactly) { this->template check_every_pattern<f16>(); }
TYPED_TEST(Simd, WidensEveryByteExactly) {
  using Ops = simd::Ops<TypeParam>;
  std::vector<std::int8_t> bytes(256);
  std::iota(bytes.begin(), bytes.end(), std::int8_t{-128});
  std::vector<float> x(bytes.size());
  for (std::size_t i = 0; i < x.size(); i += Ops::kWidth) {
    Ops::store(x.data() + i, Ops::load(bytes.data() + i));
  }
  for (std::size_t i = 0; i < x.size(); ++i) EXPECT_EQ(x[i], static_cast<float>(bytes[i]));
}

TYPED_TEST(Simd, WidensEveryPairOfFourBitIntegersExactly) {
  using Ops = simd::Ops<TypeParam>;
  std::vector<std::uint8_t> bytes(256);
  std::iota(bytes.begin(), bytes.end(), std::uint8_t{0});
  std::vector<float> low(bytes.size()), high(bytes.size());
  for (std::size_t i = 0; i < bytes.size(); i += Ops::kWidth) {
    typename Ops::V l, h;
    Ops::load_int4(bytes.data() + i, l, h);
    Ops::store(low.data() + i, l);
    Ops::store(high.data() + i, h);
  }
  for (int i = 0; i < 256; ++i) {
    const auto at = static_cast<std::size_t>(i);
    EXPECT_EQ(low[at], static_cast<float>(i % 16 < 8 ? i % 16 : i % 16 - 16)) << i;
    EXPECT_EQ(high[at], static_cast<float>(i / 16 < 8 ? i / 16 : i / 16 - 16)) << i;
  }
}

TYPED_TEST(Simd, WidensEveryBfloatExactly) { this->template check_every_pattern<bf16>(); }
TYPED_TEST(Simd, RoundsToHalfLikeTheCore) { this->template check_rounding<f16>(); }
TYPED_TEST(Simd, RoundsToBfloatLikeTheCore) { this->template check_rounding<bf16>(); }

TEST(BestIsa, IsCompiledAndSaysItsName) {
  EXPECT_TRUE(simd::CompiledIsa<simd::BestIsa>);
  RecordProperty("best_isa", std::string(simd::isa_name<simd::BestIsa>()));
  EXPECT_STRNE(simd::isa_name<simd::BestIsa>(), "");
}

}  // namespace
}  // namespace headwise::test
