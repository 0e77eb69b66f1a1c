// SPDX-License-Identifier: MIT
#include "headwise/cache/rows/int8_rows.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <random>
#include <vector>

#include "support/isa_types.hpp"

namespace headwise {
namespace {

/// A row of `dim` floats whose largest magnitude is `max`.
std::vector<float> row_of(std::mt19937& random, int dim, float max) {
  std::uniform_real_distribution<float> uniform(-1.0F, 1.0F);
  std::vector<float> row(static_cast<std::size_t>(dim));
  for (float& x : row) x = max * uniform(random);
  row[random() % row.size()] = random() % 2 == 0 ? max : -max;
  return row;
}

template <class Isa>
class Int8RowsOn : public ::testing::Test {
 protected:
  static constexpr PageShape kShape{32, 48, 80};
  /// K and V of one row, stored and read.
  std::vector<float> through(const std::vector<float>& k, const std::vector<float>& v) {
    std::vector<std::byte> page(Int8Rows::page_bytes(kShape), std::byte{0xFF});
    EXPECT_EQ(Int8Rows::encode<Isa>(page.data(), kShape, 21, k.data(), v.data()), 0);
    std::vector<float> read(k.size() + v.size());
    Int8Rows::read_row(page.data(), kShape, 21, read.data(), read.data() + k.size());
    return read;
  }
};
TYPED_TEST_SUITE(Int8RowsOn, test::AllIsas, test::IsaNames);

TYPED_TEST(Int8RowsOn, AreOffByAtMostTheRowsMaximumOver254) {
  std::mt19937 random(3);
  const float largest = std::numeric_limits<float>::max();
  for (const float max : {1.0F, 3.7F, 1e-20F, 1e-28F, 1e30F, 2e38F, largest}) {
    for (int round = 0; round < 50; ++round) {
      const std::vector<float> k = row_of(random, 48, max);
      const std::vector<float> v = row_of(random, 80, max / 16.0F);  // a scale of its own
      const std::vector<float> read = this->through(k, v);
      for (std::size_t i = 0; i < read.size(); ++i) {
        const bool is_k = i < k.size();
        const auto truth = static_cast<double>(is_k ? k[i] : v[i - k.size()]);
        const double bound = static_cast<double>(max) / (is_k ? 254.0 : 16.0 * 254.0);
        const double rounded_up = is_k && max == largest ? 2.0 : 1.0 + 1.0 / 128.0;
        ASSERT_LE(std::fabs(static_cast<double>(read[i]) - truth), bound * rounded_up);
      }
    }
  }
}

TYPED_TEST(Int8RowsOn, KeepZerosAndRowsTooSmallForAScale) {
  const std::vector<float> tiny(48, 1e-38F), zeros(80, 0.0F);
  const std::vector<float> read = this->through(tiny, zeros);
  for (const float x : read) EXPECT_EQ(x, 0.0F);
}

TYPED_TEST(Int8RowsOn, MakeARowWithAnInfinityOrANanNanThroughoutAndNoOther) {
  for (const float bad :
       {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    std::vector<float> k(48, 1.0F);
    const std::vector<float> v(80, 2.0F);
    k[7] = bad;
    const std::vector<float> read = this->through(k, v);
    for (std::size_t i = 0; i < read.size(); ++i) {
      if (i < 48) {
        EXPECT_TRUE(std::isnan(read[i]));
      } else {
        EXPECT_NEAR(read[i], 2.0F, 0.008F);
      }
    }
  }
}

TYPED_TEST(Int8RowsOn, PackOwnRowsWithTheBitsThatAreStored) {
  std::mt19937 random(5);
  constexpr int kRows = 21, kDim = 48;
  std::vector<float> rows;
  for (int r = 0; r < kRows; ++r) {
    const std::vector<float> row = row_of(random, kDim, 0.01F * static_cast<float>(r + 1));
    rows.insert(rows.end(), row.begin(), row.end());
  }
  std::vector<float> tiles(std::size_t{detail::kBlockRows} * kDim), strips(tiles.size());
  Int8Rows::pack_own_k<TypeParam>(rows.data(), kDim, kRows, kDim, tiles.data());
  Int8Rows::pack_own_v<TypeParam>(rows.data(), kDim, kRows, kDim, strips.data());
  const PageShape shape{64, kDim, kDim};
  std::vector<std::byte> page(Int8Rows::page_bytes(shape));
  std::vector<float> k(kDim), v(kDim);
  for (int r = 0; r < kRows; ++r) {
    const float* row = rows.data() + r * kDim;
    Int8Rows::encode<TypeParam>(page.data(), shape, static_cast<std::size_t>(r), row, row);
    Int8Rows::read_row(page.data(), shape, static_cast<std::size_t>(r), k.data(), v.data());
    for (int d = 0; d < kDim; ++d) {
      ASSERT_EQ(tiles[static_cast<std::size_t>((r / 16 * kDim + d) * 16 + r % 16)],
                k[static_cast<std::size_t>(d)]);
      ASSERT_EQ(strips[static_cast<std::size_t>((d / 16 * 64 + r) * 16 + d % 16)],
                v[static_cast<std::size_t>(d)]);
    }
  }
}

TEST(Int8RowsBytes, AreHalfOfF16AndAScale) {
  const PageShape shape{64, 128, 128};
  EXPECT_EQ(Int8Rows::page_bytes(shape), TiledRows<f16>::page_bytes(shape) / 2 + 2 * 64 * 2);
}

}  // namespace
}  // namespace headwise
