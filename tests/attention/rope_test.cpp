// SPDX-License-Identifier: MIT
#include "headwise/attention/rope.hpp"

#include <gtest/gtest.h>

#include <array>
#include <limits>

#include "support/errors.hpp"

namespace headwise {
namespace {

TEST(Rope, TurnsBackPairsOfEitherLayout) {
  // Angles of 0.5 and 0.005 at position 5.
  const std::array<double, 2> turned{0.1, 0.001};
  const Rope halves{.frequencies = turned};
  std::array<float, 4> row{1.0F, 0.0F, 0.0F, 2.0F};
  halves.turn_back(row.data(), 4, 5);
  EXPECT_NEAR(row[0], 0.877583, 1e-6);   // cos 0.5
  EXPECT_NEAR(row[2], -0.479426, 1e-6);  // -sin 0.5
  EXPECT_NEAR(row[1], 0.009999958, 1e-7);
  EXPECT_NEAR(row[3], 1.999975, 1e-6);
  const Rope neighbours{.pairs = RopePairs::kNeighbours, .frequencies = turned};
  row = {1.0F, 0.0F, 0.0F, 2.0F};
  neighbours.turn_back(row.data(), 4, 5);
  EXPECT_NEAR(row[0], 0.877583, 1e-6);
  EXPECT_NEAR(row[1], -0.479426, 1e-6);
  EXPECT_NEAR(row[2], 0.009999958, 1e-7);
}

TEST(Rope, HasThetasFrequenciesUnlessAModelScalesThem) {
  const std::array<double, 2> own{0.25, 0.125};
  EXPECT_DOUBLE_EQ(Rope{}.frequency(0, 4), 1.0);
  EXPECT_DOUBLE_EQ(Rope{}.frequency(1, 4), 0.01);
  EXPECT_DOUBLE_EQ((Rope{.frequencies = own}.frequency(1, 4)), 0.125);
}

TEST(Rope, RefusesWhatIsNotOfTheWidth) {
  using testing::message_of;
  EXPECT_EQ(message_of<ConfigError>([] { Rope{}.check(7); }), "RoPE turns an even width, got 7");
  const std::array<double, 2> own{0.25, 0.125};
  EXPECT_EQ(message_of<ConfigError>([&] { Rope{.frequencies = own}.check(8); }),
            "2 frequencies for a width of 8");
  Rope{.frequencies = own}.check(4);
  const std::array<double, 1> bad{std::numeric_limits<double>::infinity()};
  EXPECT_THROW(Rope{.frequencies = bad}.check(2), ConfigError);
  EXPECT_THROW(Rope{.theta = 0.0}.check(2), ConfigError);
}

}  // namespace
}  // namespace headwise
