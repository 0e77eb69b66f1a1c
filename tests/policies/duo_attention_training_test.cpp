// SPDX-License-Identifier: MIT
#include "headwise/policies/duo_attention_training.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <random>
#include <span>
#include <utility>
#include <vector>

#include "headwise/attention/mixed_attention.hpp"
#include "support/errors.hpp"

namespace headwise {
namespace {

using testing::message_of;

TEST(DuoAttentionTraining, HasThePublishedSchedule) {
  const duo_attention::Training training;
  const std::pair<std::int64_t, double> golden[] = {
      {0, .002},   {39, .002},     {40, .00205}, {199, .01},   {399, .02},
      {1600, .02}, {1601, .01995}, {1800, .01},  {1960, .002}, {1999, .002}};
  for (const auto& [step, rate] : golden) {
    EXPECT_NEAR(training.learning_rate_at(step), rate, 1e-12) << step;
  }
}

/// Differences (1, 0) and (0, 2): 1.25. The paper's sum would be 5.
TEST(DuoAttentionTraining, MeasuresTheGoldenDistance) {
  const std::vector<float> full{1, 7, 3, 2};
  const std::vector<float> mixed{0, 7, 3, 4};
  std::vector<float> d_mixed(4);
  const auto rows = [](const std::vector<float>& x) { return RowView::dense(x.data(), 2, 2); };
  EXPECT_DOUBLE_EQ(duo_attention::distillation_loss(rows(full), rows(mixed), d_mixed), 1.25);
  EXPECT_EQ(d_mixed, (std::vector<float>{-0.5F, 0.0F, 0.0F, 1.0F}));
  EXPECT_EQ(duo_attention::distillation_loss({}, {}, {}), 0.0);
  EXPECT_EQ(message_of<ConfigError>([&] {
              duo_attention::distillation_loss(rows(full), rows(mixed),
                                               std::span(d_mixed).first(2));
            }),
            "states of 2 x 2 beside 2 x 2 and 2 gradients");
}

/// One layer whose hidden states are what attention gives. KV head 0 looks for the token that has
/// its query's key, far away; head 1 at the newest ones; head 2 does not look at anything.
class OneLayer {
 public:
  static constexpr int kHeads = 3;
  static constexpr int kDim = 16;
  static constexpr std::int64_t kLength = 90;

  explicit OneLayer(bool is_constant) : is_constant_(is_constant), random_(5) {}

  static ModelShape shape() { return ModelShape::uniform(1, kHeads, kHeads, kDim); }
  duo_attention::LabelledText text() {
    fill();
    return {.tokens = std::vector<std::int32_t>(kLength), .labelled = {kLength - 3, kLength - 1}};
  }

  RowView full_states(const duo_attention::LabelledText& text) {
    const std::vector<double> ones(kHeads, 1.0);
    run(ones, full_);
    return gather(text, full_, labelled_full_);
  }
  RowView mixed_states(const duo_attention::LabelledText& text, std::span<const double> gates) {
    text_ = text;
    run(gates, mixed_);
    return gather(text, mixed_, labelled_mixed_);
  }
  void backward(std::span<const float> d_states, std::span<double> d_gates) {
    std::vector<float> d_out(mixed_.size(), 0.0F);
    for (std::size_t i = 0; i < text_.labelled.size(); ++i) {
      std::copy_n(d_states.begin() + static_cast<std::ptrdiff_t>(i * kWidth), kWidth,
                  d_out.begin() + text_.labelled[i] * kWidth);
    }
    std::vector<float> d_q(q_.size()), d_k(k_.size()), d_v(v_.size());
    std::vector<double> of_layer(kHeads);
    mixed_attention_backward(mixed_pass_, tape_, seen(d_out),
                             {view(d_q), view(d_k), view(d_v), of_layer}, scratch_, serial_);
    for (std::size_t h = 0; h < kHeads; ++h) d_gates[h] += of_layer[h];
  }

 private:
  static constexpr std::int64_t kWidth = kHeads * kDim;

  static TensorView<float> view(std::vector<float>& x) {
    return TensorView<float>::nhd(x.data(), kHeads, kDim);
  }
  static TensorView<const float> seen(const std::vector<float>& x) {
    return TensorView<const float>::nhd(x.data(), kHeads, kDim);
  }
  void fill() {
    std::normal_distribution<float> normal;
    for (auto* x : {&q_, &k_, &v_}) {
      x->resize(kLength * kWidth);
      for (float& value : *x) value = 0.3F * normal(random_);
    }
    for (std::int64_t i = 0; i < kLength; ++i) {
      for (int d = 0; d < kDim; ++d) {
        const auto at = [&](int head) {
          return static_cast<std::size_t>((i * kHeads + head) * kDim + d);
        };
        // Head 0: every query matches the key of token 20. Head 1: keys grow with the position.
        q_[at(0)] = 2.0F;
        k_[at(0)] = i == 20 ? 2.0F : 0.0F;
        q_[at(1)] = 1.0F;
        k_[at(1)] = 0.2F * static_cast<float>(i);
        v_[at(2)] = 0.0F;
      }
    }
  }
  void run(std::span<const double> gates, std::vector<float>& out) {
    out.resize(kLength * kWidth);
    const bool is_full = &out == &full_;
    mixed_pass_ = {shape().layer(0), {2, 8}, gates, kLength, seen(q_), seen(k_), seen(v_)};
    if (is_constant_ && !is_full) mixed_pass_.constant_full = seen(full_);
    mixed_attention(mixed_pass_, view(out), tape_, scratch_, serial_);
  }
  static RowView gather(const duo_attention::LabelledText& text, const std::vector<float>& from,
                        std::vector<float>& to) {
    to.clear();
    for (const std::int64_t i : text.labelled) {
      to.insert(to.end(), from.begin() + i * kWidth, from.begin() + (i + 1) * kWidth);
    }
    return RowView::dense(to.data(), std::ssize(text.labelled), kWidth);
  }

  bool is_constant_;
  std::mt19937 random_;
  std::vector<float> q_, k_, v_, full_, mixed_, labelled_full_, labelled_mixed_;
  duo_attention::LabelledText text_;
  MixedAttention mixed_pass_;
  MixedTape tape_;
  Scratch scratch_;
  SerialExecutor serial_;
};
static_assert(duo_attention::Engine<OneLayer>);

TEST(DuoAttentionTraining, KeepsTheHeadThatLooksBackAndLetsTheOthersGo) {
  for (const bool is_constant : {false, true}) {
    OneLayer engine(is_constant);
    const duo_attention::Training training{.num_steps = 200, .l1_weight = 0.001};
    std::vector<duo_attention::Progress> progress;
    const HeadScores gates = duo_attention::train(
        OneLayer::shape(), training, engine, [&](std::int64_t) { return engine.text(); },
        [&](const duo_attention::Progress& p) { progress.push_back(p); });
    EXPECT_GT(gates.value(0, 0), 0.9);
    EXPECT_NEAR(gates.value(0, 1), 0.0, 0.05);
    EXPECT_NEAR(gates.value(0, 2), 0.0, 0.05);
    ASSERT_EQ(progress.size(), 200U);
    EXPECT_EQ(progress[0].mean_gate, 1.0);
    EXPECT_NEAR(progress[0].distance, 0.0, 1e-12);
    EXPECT_DOUBLE_EQ(progress[60].learning_rate, 0.02);
    EXPECT_LT(progress.back().mean_gate, 0.4);
  }
}

/// States without a distance, and gradients by a script: what reaches the optimizer.
struct ScriptedStates {
  std::vector<float> zeros = std::vector<float>(2, 0.0F);
  std::vector<double> gradients;  // of both gates, step by step
  std::size_t step = 0;
  std::vector<double> seen = {};  // the first gate, step by step

  RowView full_states(const duo_attention::LabelledText&) {
    return RowView::dense(zeros.data(), 1, 2);
  }
  RowView mixed_states(const duo_attention::LabelledText&, std::span<const double> gates) {
    seen.push_back(gates[0]);
    return RowView::dense(zeros.data(), 1, 2);
  }
  void backward(std::span<const float>, std::span<double> d_gates) {
    for (double& x : d_gates) x += gradients[step];
    ++step;
  }
};

TEST(DuoAttentionTraining, StepsFromClampedGatesByEachTextsOwnGradient) {
  const ModelShape shape = ModelShape::uniform(1, 2, 2, 16);
  const duo_attention::Training training{.num_steps = 4, .learning_rate = 0.5, .l1_weight = 0.0};
  ScriptedStates engine{.gradients = {-1.0, 1.0, 0.0, 0.25}};
  const HeadScores gates = duo_attention::train(shape, training, engine, [](std::int64_t) {
    return duo_attention::LabelledText{{1}, {0}};
  });
  GateOptimizer expected(shape, {});
  std::vector<double> before;
  for (std::int64_t step = 0; step < 4; ++step) {
    expected.clamp();
    before.push_back(expected.gates()[0]);
    const double gradient = engine.gradients[static_cast<std::size_t>(step)];
    expected.step(std::vector<double>{gradient, gradient}, training.learning_rate_at(step));
  }
  EXPECT_EQ(engine.seen, before);
  EXPECT_EQ(gates, expected.scores());
  EXPECT_EQ(engine.seen[1], 1.0);  // not 1.5
}

TEST(DuoAttentionTraining, RefusesWhatTrainsNothing) {
  OneLayer engine(false);
  const auto message = [&](const duo_attention::Training& training, auto next) {
    return message_of<ConfigError>(
        [&] { duo_attention::train(OneLayer::shape(), training, engine, next); });
  };
  const auto unlabelled = [](std::int64_t) { return duo_attention::LabelledText{{1, 2}, {}}; };
  EXPECT_EQ(message({}, unlabelled), "step 0: a text without labelled tokens");
  EXPECT_NE(message({.num_steps = 0}, unlabelled).find("num_steps"), std::string::npos);
  EXPECT_EQ(message({.l1_weight = -1.0}, unlabelled), "l1_weight must be at least 0, got -1");
}

}  // namespace
}  // namespace headwise
