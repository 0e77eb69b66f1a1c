// SPDX-License-Identifier: MIT
#include "headwise/policies/gate_optimizer.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "support/errors.hpp"

namespace headwise {
namespace {

using testing::message_of;

ModelShape four_gates() { return ModelShape::uniform(2, 2, 2, 16); }

TEST(GateOptimizer, BeginsWithTheUnchangedModel) {
  const GateOptimizer optimizer(four_gates(), {});
  EXPECT_EQ(optimizer.scores(), HeadScores::dense(2, 2, std::vector<double>{1, 1, 1, 1}));
}

TEST(GateOptimizer, KnowsLayersThatAreNotAlike) {
  const ModelShape shape({LayerShape{1, 1, 16, 16}, LayerShape{3, 2, 16, 16}});
  GateOptimizer optimizer(shape, {});
  optimizer.step(std::vector<double>{0, 1, 0, -1}, 0.5);
  ASSERT_EQ(optimizer.layer(1).size(), 3U);
  EXPECT_NEAR(optimizer.layer(0)[0], 1.0, 1e-7);
  EXPECT_NEAR(optimizer.layer(1)[0], 0.5, 1e-7);
  EXPECT_NEAR(optimizer.layer(1)[2], 1.5, 1e-7);
}

/// By hand, from the algorithm: the first step is lr x sign; the second has m = .9 x .1 g1 + .1 g2
/// over 1 - .81, and likewise of squares.
TEST(GateOptimizer, TakesTheStepsOfAdamW) {
  GateOptimizer optimizer(four_gates(), {.weight_decay = 0.1});
  optimizer.step(std::vector<double>{0.5, -0.25, 1e-3, 0.0}, 0.01);
  const double decayed = 1.0 - 0.01 * 0.1;
  EXPECT_NEAR(optimizer.gates()[0], decayed - 0.01, 1e-9);
  EXPECT_NEAR(optimizer.gates()[1], decayed + 0.01, 1e-9);
  EXPECT_NEAR(optimizer.gates()[2], decayed - 0.01, 1e-6);
  EXPECT_NEAR(optimizer.gates()[3], decayed, 1e-12);
  optimizer.step(std::vector<double>{-0.1, -0.25, 1e-3, 0.0}, 0.02);
  const double mean = (0.9 * 0.1 * 0.5 - 0.1 * 0.1) / (1.0 - 0.81);
  const double square = (0.999 * 0.001 * 0.25 + 0.001 * 0.01) / (1.0 - 0.999 * 0.999);
  EXPECT_NEAR(optimizer.gates()[0],
              (decayed - 0.01) * (1.0 - 0.02 * 0.1) - 0.02 * mean / (std::sqrt(square) + 1e-8),
              1e-9);
  EXPECT_EQ(optimizer.num_steps(), 2);
}

TEST(GateOptimizer, ShortensLongGradientsTogether) {
  const AdamW clipped{.beta1 = 0.0, .beta2 = 0.0, .epsilon = 1.0, .max_norm = 1.0};
  GateOptimizer optimizer(four_gates(), clipped);
  optimizer.step(std::vector<double>{3.0, 4.0, 0.0, 0.0}, 1.0);  // g / (|g| + 1) of .6 and .8
  EXPECT_NEAR(optimizer.gates()[0], 1.0 - 0.6 / 1.6, 1e-6);
  EXPECT_NEAR(optimizer.gates()[1], 1.0 - 0.8 / 1.8, 1e-6);
  GateOptimizer other(four_gates(), clipped);
  other.step(std::vector<double>{0.3, 0.4, 0.0, 0.0}, 1.0);  // short enough
  EXPECT_NEAR(other.gates()[0], 1.0 - 0.3 / 1.3, 1e-9);
}

TEST(GateOptimizer, ClampsWhenItIsTold) {
  GateOptimizer optimizer(four_gates(), {});
  optimizer.step(std::vector<double>{1, -1, 1, 1}, 1.5);
  EXPECT_LT(optimizer.gates()[0], -0.4);
  EXPECT_GT(optimizer.gates()[1], 2.4);
  optimizer.clamp();
  EXPECT_EQ(optimizer.gates()[0], 0.0);
  EXPECT_EQ(optimizer.gates()[1], 1.0);
}

TEST(GateOptimizer, RefusesWhatWouldSpoilIt) {
  GateOptimizer optimizer(four_gates(), {});
  EXPECT_EQ(message_of<ConfigError>([&] { optimizer.step(std::vector<double>{1}, 0.1); }),
            "1 gradients for 4 gates");
  const std::vector<double> bad{0, 0, std::numeric_limits<double>::quiet_NaN(), 0};
  EXPECT_EQ(message_of<ConfigError>([&] { optimizer.step(bad, 0.1); }),
            "the gradient of gate 2 must be finite, got nan");
  EXPECT_EQ(optimizer.num_steps(), 0);
  EXPECT_THROW(optimizer.step(std::vector<double>(4), -0.1), ConfigError);
  EXPECT_THROW(GateOptimizer(four_gates(), {.beta1 = 1.0}), ConfigError);
  EXPECT_THROW(GateOptimizer(four_gates(), {.epsilon = 0.0}), ConfigError);
  EXPECT_THROW(GateOptimizer(four_gates(), {.weight_decay = -1.0}), ConfigError);
  EXPECT_THROW(GateOptimizer(four_gates(), {}, std::nan("")), ConfigError);
}

/// The specification's figures: the code's mean; the papers' sum is 1.75.
TEST(AddL1, IsTheMeanOfThePublishedCode) {
  const std::vector<double> gates{1.0, 0.5, 0.0, 0.25};
  std::vector<double> gradient{1.0, 0.0, 0.0, 0.0};
  EXPECT_DOUBLE_EQ(add_l1(gates, 0.4, gradient), 0.4375);
  EXPECT_DOUBLE_EQ(4 * add_l1(gates, 0.0, gradient), 1.75);
  EXPECT_DOUBLE_EQ(gradient[0], 1.1);
  EXPECT_DOUBLE_EQ(gradient[1], 0.1);
  EXPECT_EQ(gradient[2], 0.0);
  const std::vector<double> below{-0.5};
  std::vector<double> up(1);
  EXPECT_DOUBLE_EQ(add_l1(below, 1.0, up), 0.5);
  EXPECT_DOUBLE_EQ(up[0], -1.0);
  EXPECT_THROW(add_l1(below, 1.0, gradient), ConfigError);
}

}  // namespace
}  // namespace headwise
