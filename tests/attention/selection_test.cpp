// SPDX-License-Identifier: MIT
// The parts together: queries recorded while a prompt is attended, scores, counts, one cut, and a
// cache that goes on from what was kept; several times in a sequence's life.
#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <numeric>
#include <vector>

#include "headwise/attention/query_window.hpp"
#include "headwise/attention/stored_rows.hpp"
#include "headwise/heads/select_tokens.hpp"
#include "headwise/policies/ada_kv.hpp"
#include "headwise/policies/snap_kv.hpp"
#include "support/attended_cache.hpp"

namespace headwise {
namespace {

using test::AttendedCache;
using test::new_tokens;

/// A layer with a retrieval, a streaming and three selected heads, another of selected heads alone.
struct Engine {
  Engine()
      : shape({{5, 2, 32, 32}, {2, 2, 32, 32}}),
        plan(make_plan(shape)),
        model(shape, plan, {.page_tokens = 16, .max_context = 600}),
        id(model.add()),
        window(shape, policy.window) {}

  static HeadPlan make_plan(const ModelShape& shape) {
    HeadPlan plan(shape);
    plan.set(0, 1, KeepWindow{{4, 12}});
    for (const int h : {2, 3, 4}) plan.set(0, h, KeepSelected{40});
    for (const int h : {0, 1}) plan.set(1, h, KeepSelected{40});
    return plan;
  }

  /// A step whose queries are recorded and whose outputs are compared with the oracle.
  void step(std::int64_t tokens, Phase phase) {
    const test::Chunks chunks{{id, new_tokens(tokens)}};
    const std::int64_t start = model.cache.length(id);
    const auto expected = model.oracle(chunks, phase);
    ASSERT_EQ(model.begin(chunks, phase), StepStatus::kOk);
    for (int l = 0; l < shape.num_layers(); ++l) {
      auto inputs = model.inputs_of(l, chunks);
      const LayerShape& layer = shape.layer(l);
      window.note(l,
                  TensorView<const float>::nhd(inputs.q.data(), layer.num_qo_heads(), layer.k_dim),
                  start, tokens);
      ASSERT_EQ(model.attend_into(model.step, l, inputs), StepStatus::kOk);
      for (std::size_t i = 0; i < inputs.out.size(); ++i) {
        ASSERT_NEAR(inputs.out[i], expected[static_cast<std::size_t>(l)][i], 5e-6);
      }
    }
    ASSERT_EQ(model.commit(), StepStatus::kOk);
  }

  /// SnapKV's scores, shared within each layer by AdaKV.
  KeptPositions select(std::int64_t mean) {
    KeptPositions kept;
    StoredRows rows;
    for (int l = 0; l < shape.num_layers(); ++l) {
      TokenScores scores(model.cache.length(id));
      for (int h = 0; h < shape.layer(l).num_kv_heads; ++h) {
        if (!std::holds_alternative<KeepSelected>(plan.budget(l, h))) continue;
        rows.read(model.cache.stored(id, l, h));
        snap_kv::add_head(policy, window.of_head(l, h), rows.keys(),
                          model.cache.stored_positions(id, l, h), scores);
      }
      const KeepCounts counts = ada_kv::Policy{}.counts(scores, policy.protection(), mean);
      const KeptPositions selected = select_tokens(scores, policy.protection(), counts);
      std::int64_t next = 0;
      for (int h = 0; h < shape.layer(l).num_kv_heads; ++h) {
        const bool selects = std::holds_alternative<KeepSelected>(plan.budget(l, h));
        kept.add_head(selects ? selected.of_head(next++) : std::span<const std::int32_t>{});
      }
    }
    return kept;
  }

  snap_kv::Policy policy{.window = 8, .kernel = 5};
  ModelShape shape;
  HeadPlan plan;
  AttendedCache<f16> model;
  SequenceId id;
  QueryWindow window;
};

TEST(Selection, SnapKvAndAdaKvOverACacheOfEveryKindOfHead) {
  Engine engine;
  engine.step(100, Phase::kPrompt);
  engine.step(137, Phase::kPrompt);
  const std::int64_t before = engine.model.cache.pages_in_use();
  KeptPositions kept = engine.select(40);
  const auto count = [&](std::int64_t head) { return std::ssize(kept.of_head(head)); };
  EXPECT_EQ(count(2) + count(3) + count(4), 3 * 40);
  EXPECT_EQ(count(5) + count(6), 2 * 40);
  EXPECT_FALSE(count(2) == 40 && count(3) == 40 && count(4) == 40);  // counts of their own
  ASSERT_EQ(engine.model.compact(engine.id, kept), StepStatus::kOk);
  EXPECT_LT(engine.model.cache.pages_in_use(), before / 2);
  for (int i = 0; i < 20; ++i) engine.step(1, Phase::kDecode);
  // While decoding, to the same target once more: of the rows that are left.
  kept = engine.select(40);
  EXPECT_EQ(count(2) + count(3) + count(4), 3 * 40);
  ASSERT_EQ(engine.model.compact(engine.id, kept), StepStatus::kOk);
  ASSERT_TRUE(engine.model.matches());
  for (int i = 0; i < 5; ++i) engine.step(3, Phase::kDecode);
}

TEST(Selection, ASecondCutWithoutANewTokenKeepsWhatTheFirstKept) {
  Engine engine;
  engine.step(150, Phase::kPrompt);
  const KeptPositions kept = engine.select(40);
  ASSERT_EQ(engine.model.compact(engine.id, kept), StepStatus::kOk);
  EXPECT_EQ(engine.select(40), kept);
  const std::int64_t pages = engine.model.cache.pages_in_use();
  ASSERT_EQ(engine.model.compact(engine.id, engine.select(40)), StepStatus::kOk);
  EXPECT_EQ(engine.model.cache.pages_in_use(), pages);
}

}  // namespace
}  // namespace headwise
