// SPDX-License-Identifier: MIT
// The backward pass through the frozen decoder, against differences of a forward pass in double.
#include "mixed_decoder.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "double_forward.hpp"
#include "headwise/core/executor.hpp"
#include "random_model.hpp"
#include "weights.hpp"

namespace needle_lm::testing {
namespace {

class MixedDecoderTest : public ::testing::Test {
 protected:
  static constexpr int kLength = 40;
  static constexpr headwise::Window kWindow{2, 7};

  void SetUp() override {
    std::mt19937 random(5);
    for (int i = 0; i < kLength; ++i) text_.tokens.push_back(static_cast<Token>(random() % 41));
    text_.labelled = {20, 37, 39};
    std::normal_distribution<double> normal;
    for (std::size_t i = 0; i < 3 * 48; ++i) d_states_.push_back(normal(random));
    for (std::size_t i = 0; i < 3 * 2; ++i) {
      gates_.push_back(0.1 + 0.15 * static_cast<double>(i));
    }
  }

  Rows states(const std::vector<double>& gates) const {
    const auto full = [&](int layer, int head) {
      return gates[static_cast<std::size_t>(layer * 2 + head)];
    };
    const Half halves[] = {
        {[](int, int, int, int) { return true; }, full},
        {[](int, int, int i, int j) { return j < kWindow.sink || i - j < kWindow.recent; },
         [=](int layer, int head) { return 1.0 - full(layer, head); }}};
    const std::vector<int> tokens(text_.tokens.begin(), text_.tokens.end());
    return DoubleForward(config_, weights_).states(tokens, {halves[0], halves[1]});
  }
  double loss(const std::vector<double>& gates) const {
    const Rows x = states(gates);
    double sum = 0.0;
    for (std::size_t i = 0; i < d_states_.size(); ++i) {
      sum += d_states_[i] * x[static_cast<std::size_t>(text_.labelled[i / 48])][i % 48];
    }
    return sum;
  }
  void expect_states(const headwise::RowView& rows, const std::vector<double>& gates) const {
    const Rows expected = states(gates);
    ASSERT_EQ(rows.count, 3);
    ASSERT_EQ(rows.dim, 48);
    for (std::int64_t i = 0; i < 3; ++i) {
      for (int d = 0; d < 48; ++d) {
        const auto token = static_cast<std::size_t>(text_.labelled[static_cast<std::size_t>(i)]);
        ASSERT_NEAR(rows.row(i)[d], expected[token][static_cast<std::size_t>(d)], 2e-4);
      }
    }
  }

  const nlohmann::json config_ = small_config();
  const NamedTensors weights_ = random_weights(config_, 1);
  const TemporaryFolder folder_;
  const Model model_ = load_model(write_model(folder_, config_, weights_));
  headwise::SerialExecutor executor_;
  MixedDecoder<headwise::SerialExecutor> decoder_{model_, kWindow, kLength, executor_};
  headwise::duo_attention::LabelledText text_;
  std::vector<double> d_states_, gates_;
};

static_assert(headwise::duo_attention::Engine<MixedDecoder<headwise::SerialExecutor>>);

TEST_F(MixedDecoderTest, HasTheStatesOfBothPasses) {
  const headwise::RowView full = decoder_.full_states(text_);
  const headwise::RowView mixed = decoder_.mixed_states(text_, gates_);
  expect_states(full, std::vector<double>(6, 1.0));
  expect_states(mixed, gates_);
  // Far enough apart that neither could pass for the other.
  EXPECT_GT(std::fabs(full.row(2)[0] - mixed.row(2)[0]), 1e-3F);
}

TEST_F(MixedDecoderTest, HasTheGradientOfEveryGate) {
  static_cast<void>(decoder_.mixed_states(text_, gates_));
  const std::vector<float> d_states(d_states_.begin(), d_states_.end());
  std::vector<double> d_gates(6, 1.0);  // added to
  decoder_.backward(d_states, d_gates);
  for (std::size_t i = 0; i < gates_.size(); ++i) {
    constexpr double kStep = 1e-5;
    std::vector<double> at = gates_;
    at[i] += kStep;
    const double above = loss(at);
    at[i] -= 2 * kStep;
    const double slope = (above - loss(at)) / (2 * kStep);
    EXPECT_NEAR(d_gates[i] - 1.0, slope, 2e-4 * (1.0 + std::fabs(slope))) << i;
    EXPECT_GT(std::fabs(slope), 1e-2) << i;  // else it says nothing
  }
}

}  // namespace
}  // namespace needle_lm::testing
