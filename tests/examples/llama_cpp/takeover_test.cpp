// SPDX-License-Identifier: MIT
#include "takeover.hpp"

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <random>
#include <span>
#include <vector>

#include "distance.hpp"
#include "headwise/cache/estimate.hpp"
#include "headwise/heads/plan.hpp"
#include "naive.hpp"
#include "support/errors.hpp"
#include "tiny_gguf.hpp"

namespace in_llama::test {
namespace {

using headwise::Phase;
using headwise::SequenceId;
using headwise::StepStatus;

const Model& model() {
  static const Model tiny(tiny_llama());
  return tiny;
}

std::vector<llama_token> random_tokens(std::size_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<llama_token> tokens(count);
  for (llama_token& token : tokens) token = static_cast<llama_token>(random() % TinyGguf::kVocab);
  return tokens;
}

/// Every layer has a head that keeps everything and one that streams; the last has none.
headwise::HeadPlan mixed_plan() {
  headwise::HeadPlan plan(model().shape());
  plan.set(0, 1, headwise::KeepWindow{{4, 30}});
  plan.set(1, 0, headwise::KeepWindow{{0, 1}});
  plan.set(2, 0, headwise::KeepWindow{{2, 16}});
  plan.set(2, 1, headwise::KeepWindow{{8, 64}});
  return plan;
}

headwise::CacheOptions options() {
  return {.page_tokens = 16,
          .max_sequences = 3,
          .max_context = 400,
          .max_chunk = 256,
          .max_rollback = 8};
}

/// Chunks of unlike lengths that `tokens` come in, ending in single ones.
template <class Fn>
void for_each_piece(std::span<const llama_token> tokens, Fn fn) {
  const std::size_t lengths[] = {100, 1, 37, 3, 60, 1, 1, 1};
  for (std::size_t at = 0, i = 0; at < tokens.size(); ++i) {
    const std::size_t length = std::min(lengths[i % std::size(lengths)], tokens.size() - at);
    fn(tokens.subspan(at, length));
    at += length;
  }
}

StepStatus forward(Takeover& engine, SequenceId id, std::span<const llama_token> tokens,
                   Phase phase = Phase::kPrompt) {
  return engine.forward(std::vector<NewTokens>{{id, tokens, phase, true}});
}

/// Of a text in pieces, with a cache that keeps everything.
Distance distance_to_stock(const Model& of) {
  const std::vector<llama_token> tokens = random_tokens(300, 1);
  Context stock(of.get(), {.num_cells = 512, .max_rows = 256});
  Takeover engine(of, headwise::HeadPlan(of.shape()), options(), 2);
  const SequenceId id = *engine.cache().add_sequence();
  Distance distance;
  llama_pos pos = 0;
  for_each_piece(tokens, [&](std::span<const llama_token> piece) {
    std::vector<Row> rows;
    for (const llama_token token : piece) rows.push_back({token, pos++, 0, true});
    EXPECT_TRUE(stock.decode(rows));
    EXPECT_EQ(forward(engine, id, piece), StepStatus::kOk);
    for (std::size_t i = 0; i < piece.size(); ++i) distance.add(stock.logits(i), engine.logits(i));
  });
  return distance;
}

TEST(InLlamaTakeover, GivesStocksLogitsWhereEverythingIsKept) {
  const Distance distance = distance_to_stock(model());
  EXPECT_LE(distance.nmse(), 1e-5);
  EXPECT_LE(distance.mean_kl(), 1e-5);
}

TEST(InLlamaTakeover, GivesStocksLogitsOfAModelWithALiBi) {
  TinyGguf gguf("bloom");
  gguf.add_bloom();
  const Model bloom(gguf.write("bloom"));
  ASSERT_EQ(bloom.shape().layer(0).softmax.alibi_slopes.size(), TinyGguf::kHeads);
  const Distance distance = distance_to_stock(bloom);
  EXPECT_LE(distance.nmse(), 1e-4);
  EXPECT_LE(distance.mean_kl(), 1e-4);
}

TEST(InLlamaTakeover, GivesDoublesLogitsUnderAPlan) {
  const std::vector<llama_token> tokens = random_tokens(300, 2);
  Naive naive(model(), mixed_plan(), 256, 1);
  Naive naive_full(model(), headwise::HeadPlan(model().shape()), 256, 1);
  Takeover engine(model(), mixed_plan(), options(), 2);
  const SequenceId id = *engine.cache().add_sequence();
  Distance distance;
  Distance of_plans;
  for_each_piece(tokens, [&](std::span<const llama_token> piece) {
    ASSERT_TRUE(naive.forward(piece));
    ASSERT_TRUE(naive_full.forward(piece));
    ASSERT_EQ(forward(engine, id, piece), StepStatus::kOk);
    for (std::size_t i = 0; i < piece.size(); ++i) {
      distance.add(naive.logits(i), engine.logits(i));
      of_plans.add(naive_full.logits(i), engine.logits(i));
    }
  });
  EXPECT_LE(distance.nmse(), 1e-6);
  EXPECT_GE(of_plans.nmse(), 1e-2) << "the plan must matter, or this test says nothing";
}

TEST(InLlamaTakeover, ABatchOfUnlikeLengthsIsEachAlone) {
  const std::size_t prompts[] = {5, 90, 33};
  std::vector<std::vector<llama_token>> texts;
  for (unsigned s = 0; s < 3; ++s) texts.push_back(random_tokens(130, 10 + s));
  Takeover together(model(), mixed_plan(), options(), 2);
  std::vector<SequenceId> ids;
  for (int s = 0; s < 3; ++s) ids.push_back(*together.cache().add_sequence());
  Distance distance;
  std::vector<std::vector<std::vector<float>>> expected(3);
  for (std::size_t s = 0; s < 3; ++s) {
    Takeover alone(model(), mixed_plan(), options(), 1);
    const SequenceId id = *alone.cache().add_sequence();
    for (std::size_t step = 0; step < 20; ++step) {
      const auto text = std::span<const llama_token>(texts[s]);
      const auto piece = step == 0 ? text.first(prompts[s]) : text.subspan(prompts[s] + step, 1);
      ASSERT_EQ(forward(alone, id, piece), StepStatus::kOk);
      const auto logits = alone.logits(piece.size() - 1);
      expected[s].emplace_back(logits.begin(), logits.end());
    }
  }
  for (std::size_t step = 0; step < 20; ++step) {
    std::vector<NewTokens> pieces;
    std::vector<std::size_t> last;
    std::size_t rows = 0;
    for (std::size_t s = 0; s < 3; ++s) {
      const auto text = std::span<const llama_token>(texts[s]);
      pieces.push_back(
          {ids[s], step == 0 ? text.first(prompts[s]) : text.subspan(prompts[s] + step, 1)});
      rows += pieces.back().tokens.size();
      last.push_back(rows - 1);
    }
    ASSERT_EQ(together.forward(pieces), StepStatus::kOk);
    for (std::size_t s = 0; s < 3; ++s) distance.add(expected[s][step], together.logits(last[s]));
  }
  EXPECT_LE(distance.nmse(), 1e-6);
}

TEST(InLlamaTakeover, TakesDraftsBackExactly) {
  const std::vector<llama_token> tokens = random_tokens(120, 20);
  const std::vector<llama_token> drafts = random_tokens(6, 21);
  std::vector<float> logits[2];
  for (const bool drafted : {false, true}) {
    Takeover engine(model(), mixed_plan(), options(), 2);
    const SequenceId id = *engine.cache().add_sequence();
    const auto all = std::span<const llama_token>(tokens);
    ASSERT_EQ(forward(engine, id, all.first(119)), StepStatus::kOk);
    if (drafted) {
      ASSERT_EQ(forward(engine, id, drafts, Phase::kDecode), StepStatus::kOk);
      ASSERT_EQ(engine.cache().rollback(id, 119), StepStatus::kOk);
    }
    ASSERT_EQ(forward(engine, id, all.last(1)), StepStatus::kOk);
    logits[drafted].assign(engine.logits(0).begin(), engine.logits(0).end());
  }
  EXPECT_EQ(logits[0], logits[1]);
}

TEST(InLlamaTakeover, GoesOnPastTheStockCacheOnFixedMemory) {
  const std::vector<llama_token> tokens = random_tokens(700, 30);
  headwise::HeadPlan plan(model().shape());
  for (int layer = 0; layer < plan.num_layers(); ++layer) {
    for (int head = 0; head < 2; ++head) plan.set(layer, head, headwise::KeepWindow{{4, 60}});
  }
  headwise::CacheOptions longer = options();
  longer.max_context = 100000;
  Takeover engine(model(), plan, longer, 1);
  const SequenceId id = *engine.cache().add_sequence();
  ASSERT_EQ(forward(engine, id, std::span(tokens).first(200)), StepStatus::kOk);
  const std::size_t held = engine.cache().held_bytes(id);
  for (int i = 0; i < 5; ++i) {
    ASSERT_EQ(forward(engine, id, std::span(tokens).subspan(200, 250)), StepStatus::kOk);
  }
  EXPECT_EQ(engine.cache().length(id), 1450);
  EXPECT_EQ(engine.cache().held_bytes(id), held);
}

TEST(InLlamaTakeover, ARefusedStepLeavesNoTrace) {
  const std::vector<llama_token> tokens = random_tokens(300, 40);
  Takeover engine(model(), mixed_plan(), options(), 1);
  const SequenceId id = *engine.cache().add_sequence();
  EXPECT_EQ(forward(engine, id, tokens), StepStatus::kChunkTooLong);
  ASSERT_EQ(forward(engine, id, std::span(tokens).first(200)), StepStatus::kOk);
  ASSERT_EQ(forward(engine, id, std::span(tokens).first(200)), StepStatus::kOk);
  EXPECT_EQ(forward(engine, id, std::span(tokens).first(1)), StepStatus::kContextTooLong);
  EXPECT_EQ(engine.cache().length(id), 400);
}

TEST(InLlamaTakeover, FillStoresAChunkAgainAndAgain) {
  const std::vector<llama_token> tokens = random_tokens(101, 50);
  const auto chunk = std::span(tokens).first(100);
  std::vector<float> logits[2];
  for (const bool fills : {false, true}) {
    Takeover engine(model(), mixed_plan(), options(), 1);
    const SequenceId id = *engine.cache().add_sequence();
    ASSERT_EQ(fills ? engine.fill(id, chunk, 100) : forward(engine, id, chunk), StepStatus::kOk);
    ASSERT_EQ(forward(engine, id, std::span(tokens).last(1)), StepStatus::kOk);
    logits[fills].assign(engine.logits(0).begin(), engine.logits(0).end());
  }
  EXPECT_EQ(logits[0], logits[1]);

  Takeover engine(model(), mixed_plan(), options(), 1);
  const SequenceId id = *engine.cache().add_sequence();
  ASSERT_EQ(engine.fill(id, chunk, 330), StepStatus::kOk);
  EXPECT_EQ(engine.cache().length(id), 330);
  EXPECT_EQ(engine.cache().held_bytes(id),
            headwise::sequence_bytes(model().shape(), mixed_plan(), options(), 330));
}

TEST(InLlamaTakeover, RefusesAPlanOfAnotherShape) {
  const headwise::HeadPlan other(headwise::ModelShape::uniform(2, 4, 2, 32));
  EXPECT_THROW(Takeover(model(), other, options(), 1), headwise::ConfigError);
}

}  // namespace
}  // namespace in_llama::test
