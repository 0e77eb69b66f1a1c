// SPDX-License-Identifier: MIT
#include "headwise/cache/rows/int4_rows.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <random>
#include <vector>

#include "headwise/cache/rows/tiled_rows.hpp"
#include "support/isa_types.hpp"

namespace headwise {
namespace {

constexpr PageShape kShape{32, 48, 80};  // groups of 32 and of 16; an odd number of V strips

template <class Isa>
class Int4RowsOn : public ::testing::Test {
 protected:
  /// K and V of one row, stored and read.
  std::vector<float> through(const std::vector<float>& k, const std::vector<float>& v) {
    std::vector<std::byte> page(Int4Rows::page_bytes(kShape), std::byte{0xFF});
    EXPECT_EQ(Int4Rows::encode<Isa>(page.data(), kShape, 21, k.data(), v.data()), 0);
    std::vector<float> read(k.size() + v.size());
    Int4Rows::read_row(page.data(), kShape, 21, read.data(), read.data() + k.size());
    return read;
  }
};
TYPED_TEST_SUITE(Int4RowsOn, test::AllIsas, test::IsaNames);

TYPED_TEST(Int4RowsOn, AreOffByAtMostAFifteenthOfTheGroupsMaximum) {
  std::mt19937 random(3);
  std::uniform_real_distribution<float> uniform(-1.0F, 1.0F);
  const float largest = std::numeric_limits<float>::max();
  for (const float max : {1.0F, 3.7F, 1e-20F, 1e-28F, 1e30F, 2e38F, largest}) {
    for (const float shift : {0.0F, 0.5F, -0.5F, 1.0F, -1.0F}) {  // one-sided groups too
      std::vector<float> row(48 + 80);
      for (float& x : row) {
        x = max * std::clamp(uniform(random) + shift, -1.0F, 1.0F);
      }
      const std::vector<float> k(row.begin(), row.begin() + 48), v(row.begin() + 48, row.end());
      const std::vector<float> read = this->through(k, v);
      for (std::size_t begin = 0; begin < row.size();) {
        const std::size_t part_end = begin < 48 ? 48 : row.size();
        const std::size_t end = std::min(begin + 32, part_end);
        const auto [low, high] = std::minmax_element(&row[begin], &row[end - 1] + 1);
        const double far = std::fabs(static_cast<double>(std::max(-*low, *high)));
        const double rounded_up = max == largest ? 2.1 : 1.0 + 1.0 / 128.0;
        for (std::size_t i = begin; i < end; ++i) {
          ASSERT_LE(std::fabs(static_cast<double>(read[i]) - static_cast<double>(row[i])),
                    far / 15.0 * rounded_up)
              << max << ", " << shift;
        }
        begin = end;
      }
    }
  }
}

TYPED_TEST(Int4RowsOn, GiveTheSideThatReachesFartherTheWiderEnd) {
  // A one-sided group has steps of a seventeenth of its width on either end: 8 and a half of them.
  for (const float sign : {1.0F, -1.0F}) {
    std::vector<float> k(48, 0.0F);
    const std::vector<float> v(80, 0.0F);
    for (std::size_t d = 0; d < 32; ++d) k[d] = sign * static_cast<float>(d) / 31.0F;
    const std::vector<float> read = this->through(k, v);
    for (std::size_t d = 0; d < 32; ++d) EXPECT_NEAR(read[d], k[d], 1.008F / 17.0F);
  }
}

TYPED_TEST(Int4RowsOn, KeepZerosAndGroupsTooSmallForAScale) {
  const std::vector<float> tiny(48, 1e-38F), zeros(80, 0.0F);
  for (const float x : this->through(tiny, zeros)) EXPECT_EQ(x, 0.0F);
}

TYPED_TEST(Int4RowsOn, MakeAGroupWithAnInfinityOrANanNanThroughoutAndNoOther) {
  for (const float bad :
       {std::numeric_limits<float>::infinity(), -std::numeric_limits<float>::infinity(),
        std::numeric_limits<float>::quiet_NaN()}) {
    const std::vector<float> k(48, 1.0F);
    std::vector<float> v(80, 2.0F);
    v[40] = bad;
    const std::vector<float> read = this->through(k, v);
    for (std::size_t i = 0; i < read.size(); ++i) {
      if (i >= 48 + 32 && i < 48 + 64) {
        EXPECT_TRUE(std::isnan(read[i])) << i;
      } else {
        EXPECT_NEAR(read[i], i < 48 ? 1.0F : 2.0F, 0.15F) << i;
      }
    }
  }
}

TYPED_TEST(Int4RowsOn, PackOwnRowsWithTheBitsThatAreStored) {
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  constexpr int kRows = 21, kDim = 80;
  std::vector<float> rows(kRows * kDim);
  for (float& x : rows) x = normal(random);
  std::vector<float> tiles(std::size_t{detail::kBlockRows} * kDim), strips(tiles.size());
  Int4Rows::pack_own_k<TypeParam>(rows.data(), kDim, kRows, kDim, tiles.data());
  Int4Rows::pack_own_v<TypeParam>(rows.data(), kDim, kRows, kDim, strips.data());
  const PageShape shape{64, kDim, kDim};
  std::vector<std::byte> page(Int4Rows::page_bytes(shape));
  std::vector<float> k(kDim), v(kDim);
  for (int r = 0; r < kRows; ++r) {
    const float* row = rows.data() + r * kDim;
    Int4Rows::encode<TypeParam>(page.data(), shape, static_cast<std::size_t>(r), row, row);
    Int4Rows::read_row(page.data(), shape, static_cast<std::size_t>(r), k.data(), v.data());
    for (int d = 0; d < kDim; ++d) {
      ASSERT_EQ(tiles[static_cast<std::size_t>((r / 16 * kDim + d) * 16 + r % 16)],
                k[static_cast<std::size_t>(d)]);
      ASSERT_EQ(strips[static_cast<std::size_t>((d / 16 * 64 + r) * 16 + d % 16)],
                v[static_cast<std::size_t>(d)]);
    }
  }
}

TEST(Int4RowsBytes, AreAQuarterOfF16AndAScaleFor32) {
  const PageShape shape{64, 128, 128};
  EXPECT_EQ(Int4Rows::page_bytes(shape), TiledRows<f16>::page_bytes(shape) / 4 + 8 * 64 * 2);
}

}  // namespace
}  // namespace headwise
