// SPDX-License-Identifier: MIT
#include "headwise/core/alibi.hpp"

#include <gtest/gtest.h>

#include <limits>
#include <vector>

#include "support/errors.hpp"

namespace headwise {
namespace {

using testing::message_of;

TEST(AlibiSlopes, ArePowersOfTwoForEightHeads) {
  EXPECT_EQ(alibi_slopes(8), (std::vector<float>{0x1p-1F, 0x1p-2F, 0x1p-3F, 0x1p-4F, 0x1p-5F,
                                                 0x1p-6F, 0x1p-7F, 0x1p-8F}));
  EXPECT_EQ(alibi_slopes(1), std::vector<float>{0x1p-8F});
}

TEST(AlibiSlopes, GoOnWithEverySecondOfTwiceAsMany) {
  // The published code's for 12 heads: those of 8, then the 1st, 3rd, 5th and 7th of 16.
  const std::vector<float> slopes = alibi_slopes(12);
  const std::vector<float> of_16 = alibi_slopes(16);
  ASSERT_EQ(slopes.size(), 12U);
  for (std::size_t i = 0; i < 4; ++i) EXPECT_EQ(slopes[8 + i], of_16[2 * i]);
  EXPECT_FLOAT_EQ(slopes[8], 0.70710678F);
}

TEST(AlibiSlopes, ScaleWithTheLargestBias) {
  EXPECT_EQ(alibi_slopes(4, 16.0F), (std::vector<float>{0x1p-4F, 0x1p-8F, 0x1p-12F, 0x1p-16F}));
}

TEST(AlibiSlopes, RefuseNumbersOutOfRange) {
  EXPECT_EQ(message_of<ConfigError>([] { (void)alibi_slopes(0); }),
            "num_qo_heads must be in [1, 65536], got 0");
  EXPECT_THROW((void)alibi_slopes(kMaxHeads + 1), ConfigError);
  EXPECT_EQ(message_of<ConfigError>([] { (void)alibi_slopes(8, -1.0F); }),
            "max_bias must be finite and above 0, got -1");
  EXPECT_THROW((void)alibi_slopes(8, std::numeric_limits<float>::infinity()), ConfigError);
  EXPECT_THROW((void)alibi_slopes(8, std::numeric_limits<float>::quiet_NaN()), ConfigError);
}

}  // namespace
}  // namespace headwise
