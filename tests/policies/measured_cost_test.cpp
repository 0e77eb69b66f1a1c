// SPDX-License-Identifier: MIT
#include "headwise/policies/measured_cost.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <utility>
#include <vector>

#include "support/errors.hpp"

namespace headwise {
namespace {

using measured_cost::Pass;
using testing::message_of;

constexpr float kNever = -std::numeric_limits<float>::infinity();
const KeepWindow kShort{{.sink = 4, .recent = 60}};

std::vector<double> softmax_in_double(const std::vector<float>& logits) {
  double total = 0.0;
  std::vector<double> p;
  for (const float x : logits) total += p.emplace_back(std::exp(static_cast<double>(x)));
  for (double& x : p) x /= total;
  return p;
}
double kl_in_double(const std::vector<float>& full, const std::vector<float>& other) {
  const std::vector<double> p = softmax_in_double(full);
  const std::vector<double> q = softmax_in_double(other);
  double nats = 0.0;
  for (std::size_t i = 0; i < p.size(); ++i) {
    if (p[i] > 0.0) nats += p[i] * std::log(p[i] / q[i]);
  }
  return nats;
}

double nats_of(const std::vector<float>& full, const std::vector<float>& other) {
  Pass pass;
  pass.begin_full();
  pass.token(full);
  pass.begin_other();
  pass.token(other);
  return pass.end();
}

TEST(MeasuredCostPass, IsTheDivergenceFromTheFullPass) {
  EXPECT_NEAR(nats_of({0.0F, 0.0F}, {0.0F, std::log(3.0F)}), .143841, 1e-6);  // ln(4/3) / 2
  EXPECT_NEAR(nats_of({0.0F, std::log(3.0F)}, {0.0F, 0.0F}), .130812, 1e-6);  // the other way
  const std::vector<float> full{1.5F, -2.0F, 0.25F, 3.0F};
  const std::vector<float> other{-0.5F, 1.0F, 0.0F, 2.0F};
  EXPECT_NEAR(nats_of(full, other), kl_in_double(full, other), 1e-12);
  EXPECT_EQ(nats_of(full, full), 0.0);
}

TEST(MeasuredCostPass, TakesLogitsAndLogProbabilities) {
  // Far from normalised, and where a float's exponential is infinite.
  EXPECT_NEAR(nats_of({1000.0F, 1000.0F}, {0.0F, std::log(3.0F)}), .143841, 1e-6);
  EXPECT_NEAR(nats_of({-1000.0F, -1000.0F}, {500.0F, 500.0F + std::log(3.0F)}), .143841, 1e-5);
  // What never comes is no part of it: in both, or in the full pass alone.
  EXPECT_NEAR(nats_of({0.0F, kNever, 0.0F}, {0.0F, kNever, std::log(3.0F)}), .143841, 1e-6);
  EXPECT_NEAR(nats_of({0.0F, kNever}, {0.0F, std::log(3.0F)}), std::log(4.0), 1e-6);
}

TEST(MeasuredCostPass, SumsItsTokensAndForgetsTheTextBefore) {
  const std::vector<float> a{0.0F, 0.0F};
  const std::vector<float> b{0.0F, 1.0F};
  const std::vector<float> c{0.0F, 2.0F, 1.0F};
  Pass pass;
  pass.begin_full();
  pass.token(a);
  pass.token(b);
  EXPECT_EQ(pass.end(), 0.0);
  for (int i = 0; i < 2; ++i) {
    pass.begin_other();
    pass.token(b);
    pass.token(a);
    EXPECT_NEAR(pass.end(), kl_in_double(a, b) + kl_in_double(b, a), 1e-12);
  }
  pass.begin_full();
  pass.token(c);
  EXPECT_EQ(pass.end(), 0.0);
  EXPECT_EQ(pass.num_tokens(), 1U);
  pass.begin_other();
  pass.token(c);
  EXPECT_EQ(pass.end(), 0.0);
}

TEST(MeasuredCostPass, RefusesPassesThatDoNotCompare) {
  const std::vector<float> two{0.0F, 0.0F};
  const std::vector<float> three{0.0F, 0.0F, 0.0F};
  Pass pass;
  pass.begin_full();
  EXPECT_EQ(message_of<ConfigError>([&] { (void)pass.end(); }), "a pass without tokens");
  pass.token(two);
  EXPECT_EQ(message_of<ConfigError>([&] { pass.token(three); }),
            "token 1: a distribution over 3 tokens, the first one was over 2");
  pass.token(two);
  pass.begin_other();
  EXPECT_THROW(pass.token(three), ConfigError);
  pass.token(two);
  EXPECT_EQ(message_of<ConfigError>([&] { (void)pass.end(); }),
            "a pass of 1 tokens, the full pass had 2");
  pass.token(two);
  EXPECT_EQ(message_of<ConfigError>([&] { pass.token(two); }),
            "a pass of more than the full pass's 2 tokens");
  EXPECT_EQ(message_of<ConfigError>([] {
              (void)nats_of({0.0F, 0.0F}, {0.0F, kNever});
            }),
            "token 0: next token 1 has a probability in the full pass and none here");
  EXPECT_EQ(message_of<ConfigError>([] { (void)nats_of({kNever}, {0.0F}); }),
            "token 0: no next token has a probability");
  for (const float bad : {-kNever, std::nanf("")}) {
    EXPECT_THROW((void)nats_of({0.0F, bad}, {0.0F, 0.0F}), ConfigError);
    EXPECT_THROW((void)nats_of({0.0F, 0.0F}, {0.0F, bad}), ConfigError);
  }
}

/// Two layers of two heads; each streaming head moves the second logit by its own amount.
struct FakeEngine {
  static constexpr double kMoves[2][2] = {{.5, 2.0}, {.1, 1.0}};

  std::vector<float> logits(const HeadPlan& plan, std::int64_t text, int token) const {
    double move = 0.1 * token;
    for (int l = 0; l < plan.num_layers(); ++l) {
      for (int h = 0; h < plan.num_kv_heads(l); ++h) {
        if (plan.budget(l, h) == HeadBudget{kShort}) move += kMoves[l][h];
      }
    }
    return {0.3F, static_cast<float>(move) * static_cast<float>(text + 1), -0.5F};
  }
  static int num_tokens(std::int64_t text) { return text == 0 ? 1 : 3; }
  void operator()(const HeadPlan& plan, std::int64_t text, Pass& pass) {
    texts.push_back(text);
    for (int t = 0; t < num_tokens(text); ++t) pass.token(logits(plan, text, t));
  }

  std::vector<std::int64_t> texts;  ///< as they were run
};

const ModelShape& two_by_two() {
  static const auto shape = ModelShape::uniform(2, 4, 2, 16);
  return shape;
}

TEST(MeasuredCost, IsTheMeanOverTheTokensOfAllTexts) {
  FakeEngine engine;
  const HeadScores scores =
      measured_cost::measure(two_by_two(), {.streaming = kShort, .num_texts = 2}, engine);
  for (int l = 0; l < 2; ++l) {
    for (int h = 0; h < 2; ++h) {
      HeadPlan plan(two_by_two());
      plan.set(l, h, kShort);
      double nats = 0.0;
      for (std::int64_t text = 0; text < 2; ++text) {
        for (int t = 0; t < FakeEngine::num_tokens(text); ++t) {
          nats += kl_in_double(engine.logits(HeadPlan(two_by_two()), text, t),
                               engine.logits(plan, text, t));
        }
      }
      EXPECT_NEAR(scores.value(l, h), nats / 4, 1e-12) << l << " " << h;
    }
  }
  // Text by text, so that distributions of one are kept: its full pass, then each head's.
  EXPECT_EQ(engine.texts, (std::vector<std::int64_t>{0, 0, 0, 0, 0, 1, 1, 1, 1, 1}));
}

TEST(MeasuredCost, StreamsSharedLayersTogether) {
  const ModelShape shape({{2, 1, 16, 16},
                          {.num_kv_heads = 2, .k_dim = 16, .v_dim = 16, .kv_layer = 0},
                          {2, 1, 16, 16}});
  int num_runs = 0;
  const HeadScores scores = measured_cost::measure(
      shape, {.streaming = kShort}, [&](const HeadPlan& plan, std::int64_t, Pass& pass) {
        ++num_runs;
        EXPECT_EQ(plan.budget(0, 0), plan.budget(1, 0));
        EXPECT_EQ(plan.budget(0, 1), plan.budget(1, 1));
        float move = is_retrieval(plan.budget(0, 1)) ? 0.0F : 1.0F;
        if (!is_retrieval(plan.budget(2, 0))) move = 2.0F;
        pass.token(std::vector<float>{0.0F, move});
      });
  EXPECT_EQ(num_runs, 5);
  EXPECT_EQ(scores.row(0)[0], 0.0);
  EXPECT_GT(scores.row(0)[1], 0.0);
  EXPECT_GT(scores.row(2)[0], scores.row(0)[1]);
  EXPECT_EQ(scores.row(2)[1], 0.0);
  EXPECT_EQ(scores.value(1, 0), scores.value(0, 0));
  EXPECT_EQ(scores.value(1, 1), scores.value(0, 1));
}

/// Heads 0.0 and 1.1 stand in for each other: either alone is all but free, both are dear.
float redundant_move(const HeadPlan& plan) {
  const auto streams = [&](int l, int h) { return !is_retrieval(plan.budget(l, h)); };
  float move = 0.0F;
  if (streams(0, 0)) move += 0.01F;
  if (streams(1, 1)) move += 0.02F;
  if (streams(0, 0) && streams(1, 1)) move += 3.0F;
  if (streams(0, 1)) move += 1.0F;
  if (streams(1, 0)) move += 0.5F;
  return move;
}
void run_redundant(const HeadPlan& plan, std::int64_t, Pass& pass) {
  pass.token(std::vector<float>{0.0F, redundant_move(plan)});
}

TEST(MeasuredCost, FindsHeadsThatAreCheapTogether) {
  const measured_cost::Options options{.streaming = kShort};
  const HeadScores alone = measured_cost::measure(two_by_two(), options, run_redundant);
  EXPECT_LT(alone.value(1, 1), alone.value(1, 0));
  const measured_cost::Greedy found =
      measured_cost::greedy(two_by_two(), alone, options, {.num_streaming = 3}, run_redundant);
  EXPECT_EQ(found.order, (std::vector<HeadId>{{0, 0}, {1, 0}, {0, 1}}));
  ASSERT_EQ(found.costs.size(), 3U);
  for (const auto& [i, move] : {std::pair{0U, .01F}, {1U, .51F}, {2U, 1.51F}}) {
    EXPECT_NEAR(found.costs[i], kl_in_double({0.0F, 0.0F}, {0.0F, move}), 1e-6);
  }
  EXPECT_EQ(found.scores, HeadScores::dense(2, 2, std::vector<double>{0, .5, .25, .75}));
}

TEST(MeasuredCost, TriesTheCheapestAloneOnly) {
  const measured_cost::Options options{.streaming = kShort};
  const HeadScores alone = measured_cost::measure(two_by_two(), options, run_redundant);
  int num_runs = 0;
  const measured_cost::Greedy found =
      measured_cost::greedy(two_by_two(), alone, options, {.num_streaming = 2, .num_tried = 1},
                            [&](const HeadPlan& plan, std::int64_t text, Pass& pass) {
                              ++num_runs;
                              run_redundant(plan, text, pass);
                            });
  EXPECT_EQ(num_runs, 4);  // full and one head, twice
  EXPECT_EQ(found.order, (std::vector<HeadId>{{0, 0}, {1, 1}}));
  // Those that were not reached follow by what they cost alone.
  EXPECT_EQ(found.scores, HeadScores::dense(2, 2, std::vector<double>{0, .75, .5, .25}));
  const measured_cost::Greedy none =
      measured_cost::greedy(two_by_two(), alone, options, {}, run_redundant);
  EXPECT_TRUE(none.order.empty());
  EXPECT_EQ(none.scores, HeadScores::dense(2, 2, std::vector<double>{0, .75, .5, .25}));
}

TEST(MeasuredCost, RanksSharedLayersWithTheirOwner) {
  const ModelShape shape({{1, 1, 16, 16},
                          {.num_kv_heads = 1, .k_dim = 16, .v_dim = 16, .kv_layer = 0},
                          {1, 1, 16, 16}});
  const auto run = [](const HeadPlan& plan, std::int64_t, Pass& pass) {
    pass.token(std::vector<float>{0.0F, is_retrieval(plan.budget(0, 0)) ? 0.0F : 1.0F});
  };
  const measured_cost::Options options{.streaming = kShort};
  const auto alone = measured_cost::measure(shape, options, run);
  const auto found = measured_cost::greedy(shape, alone, options, {.num_streaming = 2}, run);
  EXPECT_EQ(found.order, (std::vector<HeadId>{{2, 0}, {0, 0}}));
  EXPECT_EQ(found.scores, HeadScores::dense(3, 1, std::vector<double>{.5, .5, 0}));
}

TEST(MeasuredCost, RefusesWhatCannotBeMeasured) {
  const auto measure = [](const measured_cost::Options& options) {
    (void)measured_cost::measure(two_by_two(), options, run_redundant);
  };
  EXPECT_EQ(message_of<ConfigError>([&] { measure({}); }),
            "measured_cost needs a budget for streaming heads");
  EXPECT_THROW(measure({.streaming = kShort, .num_texts = 0}), ConfigError);
  const auto alone = HeadScores::dense(2, 2, std::vector<double>(4, 0.0));
  EXPECT_EQ(message_of<ConfigError>([&] {
              (void)measured_cost::greedy(two_by_two(), alone, {.streaming = kShort},
                                          {.num_streaming = 5}, run_redundant);
            }),
            "cannot stream 5 heads of 4");
  EXPECT_THROW(
      (void)measured_cost::greedy(two_by_two(), HeadScores::dense(1, 2, std::vector<double>(2)),
                                  {.streaming = kShort}, {}, run_redundant),
      ConfigError);
}

}  // namespace
}  // namespace headwise
