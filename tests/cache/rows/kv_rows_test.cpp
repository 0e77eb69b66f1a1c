// SPDX-License-Identifier: MIT
#include "headwise/cache/rows/kv_rows.hpp"

#include <gtest/gtest.h>

#include <cstddef>
#include <cstring>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "headwise/cache/rows/int4_rows.hpp"
#include "headwise/cache/rows/int8_rows.hpp"
#include "headwise/cache/rows/plain_rows.hpp"
#include "headwise/cache/rows/tiled_rows.hpp"
#include "headwise/simd/simd.hpp"

namespace headwise {
namespace {

template <class K, class V>
concept CanBeJoined = requires {
  typename KvRows<K, V>;
};

TEST(KvRows, AreRowFormatsOfTwo) {
  using Rows = KvRows<Int8Rows, f16>;
  static_assert(RowFormat<Rows> && TiledInPlace<Rows>);
  static_assert(std::is_same_v<Rows::VFormat, TiledRows<f16>>);
  static_assert(CanBeJoined<f32, Int4Rows> && !CanBeJoined<PlainRows<f16>, Int8Rows>);
  EXPECT_STREQ(Rows::name(), "int8_k_f16_tiled_v");
}

TEST(KvRows, HaveThePagesOfKAloneAndOfVAloneOneAfterTheOther) {
  using Rows = KvRows<Int4Rows, Int8Rows>;
  const PageShape both{32, 48, 80}, k_alone{32, 48, 0}, v_alone{32, 0, 80};
  const std::size_t k_bytes = Int4Rows::page_bytes(k_alone);
  EXPECT_EQ(k_bytes, 32U * (24 + 2 * 2));  // two groups of scales
  EXPECT_EQ(Rows::page_bytes(both), k_bytes + Int8Rows::page_bytes(v_alone));

  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> k(48), v(80);
  for (float& x : k) x = normal(random);
  for (float& x : v) x = normal(random);
  using Isa = simd::BestIsa;
  std::vector<std::byte> page(Rows::page_bytes(both), std::byte{0xFF});
  std::vector<std::byte> expected = page;
  Rows::encode<Isa>(page.data(), both, 9, k.data(), v.data());
  Int4Rows::encode<Isa>(expected.data(), k_alone, 9, k.data(), nullptr);
  Int8Rows::encode<Isa>(expected.data() + k_bytes, v_alone, 9, nullptr, v.data());
  EXPECT_EQ(page, expected);
}

TEST(KvRows, CountTheOverflowsOfTheSideThatHasThem) {
  const PageShape shape{16, 16, 16};
  const std::vector<float> k(16, 7e4F), v(16, 7e4F);
  EXPECT_EQ((KvRows<f16, Int8Rows>::count_overflows<simd::Scalar>(shape, k.data(), v.data())), 16);
  EXPECT_EQ((KvRows<Int8Rows, f32>::count_overflows<simd::Scalar>(shape, k.data(), v.data())), 0);
}

}  // namespace
}  // namespace headwise
