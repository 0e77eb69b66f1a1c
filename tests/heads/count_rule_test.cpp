// SPDX-License-Identifier: MIT
#include "headwise/heads/count_rule.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "support/errors.hpp"

namespace headwise {
namespace {

using testing::message_of;

struct Golden {
  std::size_t num_heads;
  double sparsity;
  std::size_t streaming;
};

TEST(NumStreaming, IsThePublishedQuantileCount) {
  constexpr Golden kGoldens[] = {
      {256, .2, 51},   {256, .25, 64}, {256, .4, 102}, {256, .5, 128}, {256, .6, 153},
      {256, .75, 192}, {256, .8, 204}, {112, .2, 23},  {112, .4, 45},  {112, .5, 56},
      {112, .6, 67},   {112, .8, 89},  {288, .2, 58},  {288, .4, 115}, {288, .5, 144},
      {288, .6, 173},  {288, .8, 230}, {8, .25, 2},    {8, .5, 4},     {8, .75, 6},
      {5, .25, 1},     {5, .5, 2},     {5, .75, 3},    {1, .5, 0},     {1, 1.0, 1},
  };
  for (const Golden& golden : kGoldens) {
    EXPECT_EQ(num_streaming(golden.num_heads, golden.sparsity), golden.streaming)
        << golden.num_heads << " heads, " << golden.sparsity;
  }
}

TEST(NumStreaming, RoundsLikeKvpressWhereAsked) {
  EXPECT_EQ(num_streaming(112, .2, CountRule::kRound), 22U);  // the quantile's is 23
  EXPECT_EQ(num_streaming(10, .25, CountRule::kRound), 2U);   // 2.5 to even
  EXPECT_EQ(num_streaming(10, .35, CountRule::kRound), 4U);   // 3.5 to even
  EXPECT_EQ(num_streaming(256, 1.0, CountRule::kRound), 256U);
  EXPECT_EQ(num_streaming(256, 0.0, CountRule::kRound), 0U);
}

TEST(NumStreaming, SeesTheDecimalBehindTheDouble) {
  // Every k / (n - 1) is meant to give k, however it was computed.
  for (std::size_t n = 2; n < 400; ++n) {
    for (std::size_t k = 0; k + 1 < n; ++k) {
      const double s = static_cast<double>(k) / static_cast<double>(n - 1);
      ASSERT_EQ(num_streaming(n, s), k) << n;
      if (k > 0) {
        ASSERT_EQ(num_streaming(n, std::nextafter(s, 1.0)), k) << n;
      }
      ASSERT_EQ(num_streaming(n, s + 1e-9), k + 1) << n;
    }
  }
}

TEST(NumStreaming, NeverFallsAsSparsityRises) {
  for (const CountRule rule : {CountRule::kQuantile, CountRule::kRound}) {
    for (const std::size_t n : {1U, 2U, 7U, 112U, 256U, 1024U}) {
      std::size_t last = 0;
      for (int i = 0; i <= 10000; ++i) {
        const std::size_t count = num_streaming(n, i / 10000.0, rule);
        ASSERT_GE(count, last);
        ASSERT_LE(count, n);
        last = count;
      }
      EXPECT_EQ(last, n);
    }
  }
}

TEST(NumStreaming, RefusesASparsityThatIsNoShare) {
  EXPECT_EQ(message_of<ConfigError>([] { (void)num_streaming(8, 1.5); }),
            "sparsity must be in [0, 1], got 1.5");
  EXPECT_EQ(message_of<ConfigError>([] { (void)num_streaming(8, -1e-3); }),
            "sparsity must be in [0, 1], got -0.001");
  EXPECT_EQ(message_of<ConfigError>(
                [] { (void)num_streaming(8, std::numeric_limits<double>::quiet_NaN()); }),
            "sparsity must be in [0, 1], got nan");
}

}  // namespace
}  // namespace headwise
