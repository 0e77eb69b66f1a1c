// SPDX-License-Identifier: MIT
#include "headwise/policies/rlkv_training.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <numbers>
#include <set>
#include <vector>

#include "support/errors.hpp"

namespace headwise {
namespace {

using testing::message_of;

TEST(RlkvTraining, WeighsTheL1TermByTheReward) {
  const std::pair<double, double> golden[] = {{0.3, 0.0},      {0.5, 0.0},  // strictly above
                                              {0.51, 0.66529}, {std::numbers::ln2, 1.0},
                                              {0.7, 1.01375},  {0.75, 1.117},
                                              {1.0, 1.71828}};
  for (const auto& [reward, weight] : golden) {
    EXPECT_NEAR(rlkv::l1_weight(reward, 0.5, 1.0), weight, 6e-6) << reward;
    EXPECT_NEAR(rlkv::l1_weight(reward, 0.5, 1e-3), weight * 1e-3, 1e-8) << reward;
  }
}

TEST(RlkvTraining, NormalisesWithinAGroup) {
  const std::vector<double> rewards{1, 1, 0, 1, 0, 0, 0, 0};
  const auto population = rlkv::group_advantages(rewards, 4);
  const auto sample = rlkv::group_advantages(rewards, 4, rlkv::Spread::kSample);
  for (const std::size_t i : {0U, 1U, 3U}) {
    EXPECT_NEAR(population[i], 0.57735, 1e-5);
    EXPECT_NEAR(sample[i], 0.5, 1e-5);
  }
  EXPECT_NEAR(population[2], -1.73205, 1e-5);
  EXPECT_NEAR(sample[2], -1.5, 1e-5);
  for (const std::size_t i : {4U, 5U, 6U, 7U}) EXPECT_EQ(population[i], 0.0);
  EXPECT_EQ(message_of<ConfigError>([&] { rlkv::group_advantages(rewards, 3); }),
            "8 rewards of groups of 3; a group has at least 2 answers");
  EXPECT_THROW(rlkv::group_advantages(rewards, 1), ConfigError);
}

/// Three tokens of reward 1 beside one of 0: mean 3 / 4, deviation sqrt(3) / 4.
TEST(RlkvTraining, NormalisesOverTheTokensOfABatch) {
  const auto advantages =
      rlkv::batch_advantages(std::vector<double>{1, 0, 0.5}, std::vector<std::int64_t>{3, 1, 0});
  EXPECT_NEAR(advantages[0], 1 / std::sqrt(3.0), 1e-5);
  EXPECT_NEAR(advantages[1], -std::sqrt(3.0), 1e-5);
  // What the released trainer does to rewards before, (r - 0.5) 10, changes nothing here.
  const auto scaled =
      rlkv::batch_advantages(std::vector<double>{5, -5, 0}, std::vector<std::int64_t>{3, 1, 0});
  EXPECT_NEAR(scaled[0], advantages[0], 1e-5);
  EXPECT_EQ(rlkv::batch_advantages(std::vector<double>{1}, std::vector<std::int64_t>{0})[0], 0.0);
  EXPECT_THROW(rlkv::batch_advantages(std::vector<double>{1}, {}), ConfigError);
}

TEST(RlkvTraining, ClipsWhereTheRatioHasGoneTheRewardedWay) {
  const rlkv::ClippedObjective objective{.clip = 0.4};
  const float proximal = -1.0F;
  struct Case {
    double ratio, advantage, loss, gradient;
  };
  for (const Case& c : {Case{1.0, 2.0, -2.0, -2.0},
                        {1.3, 2.0, -2.6, -2.6},
                        {1.5, 2.0, -2.8, 0.0},
                        {0.5, 2.0, -1.0, -1.0},
                        {0.5, -2.0, 1.2, 0.0},
                        {1.5, -2.0, 3.0, 3.0}}) {
    const auto current = static_cast<float>(-1.0 + std::log(c.ratio));
    std::vector<float> gradient(1);
    const double loss = objective({std::span(&current, 1), std::span(&proximal, 1), {}},
                                  c.advantage, 0.5, gradient);
    EXPECT_NEAR(loss, 0.5 * c.loss, 1e-6) << c.ratio;
    EXPECT_NEAR(gradient[0], 0.5 * c.gradient, 1e-6) << c.ratio;
  }
}

TEST(RlkvTraining, WeighsTokensByHowTheyWereDrawnAndDropsFarOnes) {
  const rlkv::ClippedObjective objective{.clip = 0.4, .behaviour_cap = 5.0};
  const std::vector<float> proximal{-1.0F, -1.0F, -1.0F};
  const std::vector<float> behaviour{-1.0F - std::log(3.0F), -1.0F - std::log(5.5F), -1.0F};
  std::vector<float> gradient{9, 9, 9};
  EXPECT_NEAR(objective({proximal, proximal, behaviour}, 1.0, 1.0, gradient), -4.0, 1e-5);
  EXPECT_NEAR(gradient[0], -3.0, 1e-5);
  EXPECT_EQ(gradient[1], 0.0F);
  EXPECT_NEAR(gradient[2], -1.0, 1e-6);
  const rlkv::ClippedObjective uncapped{.clip = 0.4, .behaviour_cap = 0.0};
  EXPECT_NEAR(uncapped({proximal, proximal, behaviour}, 1.0, 1.0, gradient), -9.5, 1e-4);
  EXPECT_EQ(message_of<ConfigError>([&] {
              objective({proximal, std::span(proximal).first(2), {}}, 1.0, 1.0, gradient);
            }),
            "log-probabilities of 3, 2 and 0 tokens, and 3 gradients");
}

/// The gradient by the current policy, against differences of the loss, on both sides of the clip.
TEST(RlkvTraining, HasTheGradientOfItsObjective) {
  const rlkv::ClippedObjective objective;
  const std::vector<float> proximal{-1.0F, -0.5F, -2.0F, -0.25F};
  const std::vector<float> behaviour{-1.25F, -0.5F, -1.5F, -0.5F};
  std::vector<float> current{-0.8F, -1.5F, -1.9F, 0.4F};
  std::vector<float> gradient(4), unused(4);
  for (const double advantage : {1.5, -0.75}) {
    objective({current, proximal, behaviour}, advantage, 0.25, gradient);
    for (std::size_t i = 0; i < 4; ++i) {
      const float at = current[i];
      const auto loss_at = [&](float x) {
        current[i] = x;
        return objective({current, proximal, behaviour}, advantage, 0.25, unused);
      };
      const double slope = (loss_at(at + 0x1p-10F) - loss_at(at - 0x1p-10F)) / 0x1p-9;
      current[i] = at;
      EXPECT_NEAR(gradient[i], slope, 1e-4) << i;
    }
  }
}

TEST(RlkvTraining, DrawsSolvedProblemsByTheLengthOfTheirAnswers) {
  std::vector<rlkv::Attempt> attempts;
  for (std::int64_t i = 0; i < 300; ++i) attempts.push_back({i * 10, i % 3 != 0});
  const std::vector<rlkv::LengthBin> bins{{1000, 20}, {2000, 1000}};
  const auto drawn = rlkv::draw_solved(attempts, bins, 7);
  const std::set<std::size_t> unique(drawn.begin(), drawn.end());
  EXPECT_EQ(unique.size(), drawn.size());
  ASSERT_EQ(drawn.size(), 20U + 67U);  // of 100 to 199, those that 3 divides are not solved
  for (std::size_t i = 0; i < drawn.size(); ++i) {
    EXPECT_TRUE(attempts[drawn[i]].solved);
    EXPECT_EQ(attempts[drawn[i]].num_tokens < 1000, i < 20) << i;
    EXPECT_LT(attempts[drawn[i]].num_tokens, 2000);
  }
  EXPECT_EQ(drawn, rlkv::draw_solved(attempts, bins, 7));
  EXPECT_NE(drawn, rlkv::draw_solved(attempts, bins, 8));
  EXPECT_FALSE(std::is_sorted(drawn.begin(), drawn.begin() + 20));
  std::size_t published = 0;
  for (const rlkv::LengthBin& bin : rlkv::kPublishedBins) published += bin.count;
  EXPECT_EQ(published, 3000U);
  const std::vector<rlkv::LengthBin> falling{{10, 1}, {10, 1}};
  EXPECT_EQ(message_of<ConfigError>([&] { rlkv::draw_solved(attempts, falling, 7); }),
            "bins of lengths must ascend, got 10 after 10");
}

/// Answers one of two tokens; how often the right one depends on the first gate alone.
class OneToken {
 public:
  static ModelShape shape() { return ModelShape::uniform(1, 3, 3, 16); }

  std::vector<rlkv::Rollout> sample(const std::vector<std::int32_t>& prompt,
                                    std::span<const double> gates, int count) {
    std::vector<rlkv::Rollout> rollouts;
    for (int i = 0; i < count; ++i) {
      const std::int32_t token = random_.next_unit() < right(gates) ? 1 : 0;
      rollouts.push_back({prompt, {token}, {}});
      const double p = token == 1 ? right(gates) : 1.0 - right(gates);
      rollouts.back().log_probs = {static_cast<float>(std::log(p))};
    }
    return rollouts;
  }
  std::span<const float> log_probs(const rlkv::Rollout& rollout, std::span<const double> gates) {
    is_right_ = rollout.answer[0] == 1;
    right_ = right(gates);
    log_prob_ = static_cast<float>(std::log(is_right_ ? right_ : 1.0 - right_));
    return {&log_prob_, 1};
  }
  void backward(std::span<const float> d_log_probs, std::span<double> d_gates) const {
    const double slope = 6.0 * (is_right_ ? 1.0 - right_ : -right_);
    d_gates[0] += slope * static_cast<double>(d_log_probs[0]);
  }

 private:
  static double right(std::span<const double> gates) {
    return 1.0 / (1.0 + std::exp(-(6.0 * gates[0] - 3.5)));
  }
  SplitMix64 random_{11};
  bool is_right_ = false;
  double right_ = 0.0;
  float log_prob_ = 0.0F;
};
static_assert(rlkv::Engine<OneToken>);

double token_reward(const rlkv::Rollout& rollout) { return rollout.answer[0] == 1 ? 1.0 : 0.0; }
std::vector<std::int32_t> any_prompt() { return {5}; }

TEST(RlkvTraining, KeepsTheHeadThatRightAnswersNeed) {
  for (const auto advantages : {rlkv::Advantages::kGroup, rlkv::Advantages::kBatch}) {
    OneToken engine;
    rlkv::Training training;
    training.num_steps = 250;
    training.beta = 0.02;
    training.advantages = advantages;
    std::vector<rlkv::Progress> progress;
    const HeadScores gates =
        rlkv::train(OneToken::shape(), training, engine, any_prompt, token_reward,
                    [&](const rlkv::Progress& p) { progress.push_back(p); });
    EXPECT_GT(gates.value(0, 0), 0.7);
    EXPECT_NEAR(gates.value(0, 1), 0.0, 0.05);
    EXPECT_NEAR(gates.value(0, 2), 0.0, 0.05);
    ASSERT_EQ(progress.size(), 250U);
    EXPECT_EQ(progress[0].mean_gate, 1.0);
    EXPECT_NEAR(progress[0].l1_weight, 0.02 * (std::exp(progress[0].mean_reward) - 1.0), 1e-12);
    EXPECT_GT(progress.back().mean_reward, 0.6);
  }
}

/// Without right answers nothing pulls gates down but AdamW's decay: 0.017 % a step.
TEST(RlkvTraining, GivesUpNoHeadWhileAnswersAreWrong) {
  OneToken engine;
  rlkv::Training training;
  training.num_steps = 50;
  training.beta = 1.0;
  const HeadScores gates = rlkv::train(OneToken::shape(), training, engine, any_prompt,
                                       [](const rlkv::Rollout&) { return 0.0; });
  EXPECT_NEAR(gates.value(0, 1), std::pow(1.0 - 0.01 * 0.017, 50), 1e-9);
}

/// Answers that do not depend on the gates, and gradients by a script: what reaches the optimizer.
struct ScriptedAnswers {
  std::vector<double> gradients;  // of both gates, step by step
  std::size_t step = 0;
  std::vector<double> seen = {};  // the first gate, step by step
  std::vector<float> d_log_probs = {};
  float log_prob = -0.5F;

  std::vector<rlkv::Rollout> sample(const std::vector<std::int32_t>& prompt,
                                    std::span<const double> gates, int count) {
    step = seen.size();
    seen.push_back(gates[0]);
    std::vector<rlkv::Rollout> rollouts;
    for (int i = 0; i < count; ++i) rollouts.push_back({prompt, {i}, {log_prob}});
    return rollouts;
  }
  std::span<const float> log_probs(const rlkv::Rollout&, std::span<const double>) {
    return {&log_prob, 1};
  }
  void backward(std::span<const float> d, std::span<double> d_gates) {
    d_log_probs.push_back(d[0]);
    for (double& x : d_gates) x += 0.5 * gradients[step];
  }
};

TEST(RlkvTraining, StepsFromClampedGatesByEachStepsOwnGradient) {
  const ModelShape shape = ModelShape::uniform(1, 2, 2, 16);
  rlkv::Training training;
  training.num_steps = 4;
  training.prompts_per_step = 1;
  training.group_size = 2;
  training.learning_rate = 0.5;
  training.beta = 0.0;
  ScriptedAnswers engine{.gradients = {-1.0, 1.0, 0.0, 0.25}};
  const HeadScores gates = rlkv::train(
      shape, training, engine, any_prompt,
      [](const rlkv::Rollout& rollout) { return static_cast<double>(rollout.answer[0]); });
  GateOptimizer expected(shape, training.adamw);
  std::vector<double> before;
  for (const double gradient : engine.gradients) {
    expected.clamp();
    before.push_back(expected.gates()[0]);
    expected.step(std::vector<double>{gradient, gradient}, training.learning_rate);
  }
  EXPECT_EQ(engine.seen, before);
  EXPECT_EQ(gates, expected.scores());
  EXPECT_EQ(engine.seen[1], 1.0);  // not 1.5
  // Two answers of one token each: the wrong one is made less likely, the right one more.
  ASSERT_EQ(engine.d_log_probs.size(), 8U);
  EXPECT_NEAR(engine.d_log_probs[0], 0.5, 1e-5);
  EXPECT_NEAR(engine.d_log_probs[1], -0.5, 1e-5);
}

TEST(RlkvTraining, RefusesWhatDoesNotFit) {
  const auto message = [](const std::function<void(rlkv::Training&)>& change, double reward) {
    OneToken engine;
    rlkv::Training training;
    change(training);
    return message_of<ConfigError>([&] {
      rlkv::train(OneToken::shape(), training, engine, any_prompt,
                  [&](const rlkv::Rollout&) { return reward; });
    });
  };
  EXPECT_EQ(message([](rlkv::Training&) {}, 2.0), "a reward must be in [0, 1], got 2");
  EXPECT_EQ(message([](rlkv::Training& t) { t.beta = -1.0; }, 1.0),
            "beta must be at least 0, got -1");
  EXPECT_NE(message([](rlkv::Training& t) { t.group_size = 1; }, 1.0).find("group_size"),
            std::string::npos);
}

}  // namespace
}  // namespace headwise
