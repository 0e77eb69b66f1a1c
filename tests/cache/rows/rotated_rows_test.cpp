// SPDX-License-Identifier: MIT
#include "headwise/cache/rows/rotated_rows.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <random>
#include <utility>
#include <vector>

#include "headwise/cache/rows/int4_rows.hpp"
#include "headwise/cache/rows/int8_rows.hpp"
#include "headwise/cache/rows/kv_rows.hpp"
#include "headwise/cache/rows/plain_rows.hpp"
#include "headwise/cache/rows/tiled_rows.hpp"
#include "headwise/core/check.hpp"

namespace headwise {
namespace {

std::vector<float> normal_floats(int count, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<std::size_t>(count));
  for (float& value : x) value = normal(random);
  return x;
}

double dot(const float* a, const float* b, int dim) {
  double sum = 0.0;
  for (int d = 0; d < dim; ++d) sum += static_cast<double>(a[d]) * static_cast<double>(b[d]);
  return sum;
}

TEST(RotatedRows, AreRowFormatsThatTurnK) {
  using Rows = RotatedRows<KvRows<Int8Rows, Int4Rows>>;
  static_assert(RowFormat<Rows> && TiledInPlace<Rows> && RotatesK<Rows>);
  static_assert(!RotatesK<Int8Rows>);
  EXPECT_STREQ(RotatedRows<Int8Rows>::name(), "int8_rotated");
  const PageShape shape{64, 128, 96};
  EXPECT_EQ(RotatedRows<f16>::page_bytes(shape), TiledRows<f16>::page_bytes(shape));
}

TEST(RotatedRows, KeepTheProductOfQAndK) {
  for (const int dim : {16, 48, 64, 80, 96, 128, 192, 256, 512}) {
    const std::vector<float> q = normal_floats(dim, 1), k = normal_floats(dim, 2);
    std::vector<float> turned_q(q.size()), turned_k(k.size());
    RotatedRows<f32>::rotate_k(q.data(), dim, turned_q.data());
    RotatedRows<f32>::rotate_k(k.data(), dim, turned_k.data());
    EXPECT_NEAR(dot(turned_q.data(), turned_k.data(), dim), dot(q.data(), k.data(), dim), 1e-4);
    EXPECT_GT(std::fabs(turned_k[0] - k[0]), 1e-3F) << "not turned";
    detail::rotate_back(turned_k.data(), dim);
    for (std::size_t d = 0; d < k.size(); ++d) ASSERT_NEAR(turned_k[d], k[d], 1e-5F);
  }
}

TEST(RotatedRows, SpreadASingleChannelAndAConstantOverTheBlock) {
  for (const int dim : {16, 64, 128}) {
    std::vector<float> one(static_cast<std::size_t>(dim)), turned(one.size());
    one[3] = 8.0F;
    RotatedRows<f32>::rotate_k(one.data(), dim, turned.data());
    for (const float x : turned) {
      EXPECT_NEAR(std::fabs(x), 8.0F / std::sqrt(static_cast<float>(dim)), 1e-5F);
    }
    const std::vector<float> equal(one.size(), 1.0F);
    RotatedRows<f32>::rotate_k(equal.data(), dim, turned.data());
    float largest = 0.0F;
    for (const float x : turned) largest = std::max(largest, std::fabs(x));
    EXPECT_LE(largest, 0.71F * std::sqrt(static_cast<float>(dim))) << dim;
  }
}

/// What storing one row counts; `count_overflows` must say the same.
template <class Rows>
std::int64_t turned_overflows(const std::vector<float>& k) {
  const PageShape shape{.page_tokens = 16, .k_dim = static_cast<int>(k.size()), .v_dim = 16};
  std::vector<std::byte> page(RotatedRows<Rows>::page_bytes(shape));
  const std::vector<float> v(16, 1.0F);
  const std::int64_t stored =
      RotatedRows<Rows>::template encode<simd::Scalar>(page.data(), shape, 0, k.data(), v.data());
  EXPECT_EQ(RotatedRows<Rows>::template count_overflows<simd::Scalar>(shape, k.data(), v.data()),
            stored);
  return stored;
}

TEST(RotatedRows, CountElementsOfAFiniteKThatBecomeInfiniteWhenItIsTurned) {
  const auto check = []<class Rows>(const Rows*) {
    // Along a row of the matrix all of K comes together in one element, which is 8 * 6e37.
    std::vector<float> k(64);
    for (int d = 0; d < 64; ++d) {
      k[static_cast<std::size_t>(d)] = detail::is_flipped(d) ? -6e37F : 6e37F;
    }
    EXPECT_EQ(turned_overflows<Rows>(k), 1);
    for (float& x : k) x /= 16.0F;
    EXPECT_EQ(turned_overflows<Rows>(k), 0);
    k[3] = std::numeric_limits<float>::infinity();  // it was so before
    EXPECT_EQ(turned_overflows<Rows>(k), 0);
  };
  check(static_cast<const Int8Rows*>(nullptr));
  check(static_cast<const Int4Rows*>(nullptr));
  check(static_cast<const KvRows<Int8Rows, Int4Rows>*>(nullptr));
  check(static_cast<const bf16*>(nullptr));
  check(static_cast<const f32*>(nullptr));
}

TEST(RotatedRows, RefuseKWiderThanTheyTurn) {
  EXPECT_THROW((void)RotatedRows<Int8Rows>::page_bytes({64, 528, 64}), ConfigError);
  EXPECT_NO_THROW((void)RotatedRows<Int8Rows>::page_bytes({64, 512, 1024}));
}

/// Keys of 128 whose channels 5, 40, 77 and 120 are 20 times larger, mostly by their mean.
struct RealisticKeys {
  static constexpr int kDim = 128, kTokens = 512;
  std::vector<float> rows = normal_floats(kTokens * kDim, 3);
  RealisticKeys() {
    for (std::size_t t = 0; t < kTokens; ++t) {
      for (const auto& [d, mean] :
           {std::pair<std::size_t, float>{5, 20}, {40, -18}, {77, 22}, {120, 15}}) {
        rows[t * kDim + d] = mean + 4.0F * rows[t * kDim + d];
      }
    }
  }
  /// Less the mean of the first 64: a vector that attention cannot see.
  void centre() {
    for (std::size_t d = 0; d < kDim; ++d) {
      double mean = 0.0;
      for (std::size_t t = 0; t < 64; ++t) mean += static_cast<double>(rows[t * kDim + d]) / 64;
      for (std::size_t t = 0; t < kTokens; ++t) rows[t * kDim + d] -= static_cast<float>(mean);
    }
  }
};

/// Deviation of q.k from the exact one over keys, for a q whose scores deviate by 1.
template <class Format>
double score_error(const RealisticKeys& keys) {
  const PageShape shape{.k_dim = RealisticKeys::kDim, .v_dim = 0};
  const std::vector<float> q = normal_floats(RealisticKeys::kDim, 4);
  double error = 0.0, mean = 0.0, square = 0.0;
  for (int t = 0; t < RealisticKeys::kTokens; ++t) {
    const float* k = &keys.rows[static_cast<std::size_t>(t * RealisticKeys::kDim)];
    std::vector<float> stored(RealisticKeys::kDim);
    Format::round_row(shape, k, nullptr, stored.data(), nullptr);
    const double score = dot(q.data(), k, RealisticKeys::kDim);
    error += std::pow(dot(q.data(), stored.data(), RealisticKeys::kDim) - score, 2);
    mean += score / RealisticKeys::kTokens;
    square += score * score;
  }
  return std::sqrt(error / (square - RealisticKeys::kTokens * mean * mean));
}

TEST(RotatedRows, HaveTheErrorOfPlainKeysWhereChannelsAreLarge) {
  RealisticKeys keys;
  const double int8 = score_error<Int8Rows>(keys);
  const double int8_rotated = score_error<RotatedRows<Int8Rows>>(keys);
  const double int4 = score_error<Int4Rows>(keys);
  const double int4_rotated = score_error<RotatedRows<Int4Rows>>(keys);
  keys.centre();
  const double int8_both = score_error<RotatedRows<Int8Rows>>(keys);
  const double int4_both = score_error<RotatedRows<Int4Rows>>(keys);
  // In shares of the scores' deviation. Plain normal keys: 0.006 and 0.075.
  EXPECT_GT(int8, 0.03);
  EXPECT_LT(int8_rotated, int8 / 2);
  EXPECT_LT(int8_both, 0.008);
  EXPECT_GT(int4, 0.4);
  EXPECT_LT(int4_rotated, int4 / 2);
  EXPECT_LT(int4_both, 0.09);
}

}  // namespace
}  // namespace headwise
