// SPDX-License-Identifier: MIT
// What models have besides heads and widths, layer by layer and together, over a whole cache:
// soft-caps, learned sinks, ALiBi, windows of their own, K and V of other layers.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "headwise/cache/estimate.hpp"
#include "headwise/heads/plan.hpp"
#include "support/attend_models.hpp"
#include "support/boundary_lengths.hpp"
#include "support/isa_types.hpp"

namespace headwise {
namespace {

using test::AttendedCache;
using test::below;
using test::Chunks;
using test::kBound;
using test::Model;
using test::new_tokens;
using test::options_of;
using test::Outputs;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

/// Five layers, of which the last two read the K and V of the first two.
ModelShape shape_of_all() {
  const LayerShape plain{.num_kv_heads = 3, .group_size = 2, .k_dim = 32, .v_dim = 16};
  LayerShape capped = plain;  // Gemma 2's global layers
  capped.softmax.soft_cap = 0.7F;
  LayerShape local = plain;  // Gemma 3's, gpt-oss' local ones, with slopes
  local.sliding_window = 20;
  local.softmax.sinks = {0.0F, 2.0F, -1.0F, 3.0F, -20.0F, 1.0F};
  local.softmax.alibi_slopes = {0.5F, 0.25F, 0.125F, 1.0F, 0.0F, 0.01F};
  LayerShape slopes = plain;  // BLOOM, MPT
  slopes.softmax.alibi_slopes = {0.5F, 0.25F, 0.125F, 1.0F, 0.0F, 0.01F};
  LayerShape of_capped = plain;  // Gemma 3n's shared layers, CLA
  of_capped.group_size = 3;
  of_capped.kv_layer = 0;
  LayerShape of_local = local;
  of_local.kv_layer = 1;
  return ModelShape({capped, local, slopes, of_capped, of_local});
}

HeadPlan plan_of_all() {
  const ModelShape shape = shape_of_all();
  HeadPlan plan(shape);
  plan.set(0, 1, KeepWindow{{4, 12}});
  plan.set(0, 2, KeepWindowFrom{{{4, 12}}, 40});
  plan.set(1, 1, KeepWindow{{4, 12}, 30});
  plan.set(1, 2, KeepWindowFrom{{{4, 12}}, 40});
  plan.set(2, 1, KeepWindow{{3, 33}});
  plan.set(2, 2, KeepWindowFrom{{{17, 16}, 24}, 100});
  return share_budgets(plan, shape);
}

template <class Format>
class ModelGeometry : public ::testing::Test {};
TYPED_TEST_SUITE(ModelGeometry, test::AllFormats, test::FormatNames);

TYPED_TEST(ModelGeometry, RandomChunksRollbacksAndForksEqualTheOracle) {
  std::mt19937 random(7);
  for (const PrefillMode prefill : {PrefillMode::kWindowed, PrefillMode::kChunkCausal}) {
    AttendedCache<TypeParam> model(shape_of_all(), plan_of_all(), options_of(prefill));
    const SequenceId a = model.add();
    SequenceId b = model.add();
    while (model.cache.length(a) < 220 && !::testing::Test::HasFatalFailure()) {
      Chunks chunks;
      const std::int64_t largest = random() % 2 == 0 ? 4 : 70;
      for (const SequenceId id : {b, a}) {
        if (random() % 4 != 0) chunks.emplace_back(id, new_tokens(below(random, largest)));
      }
      if (model.cache.length(b) > 500) break;
      const Phase phase = random() % 3 == 0 ? Phase::kDecode : Phase::kPrompt;
      ASSERT_NO_FATAL_FAILURE(model.run_and_check(chunks, phase, kBound));
      if (random() % 3 == 0 && model.cache.length(a) > 4) {
        ASSERT_EQ(model.rollback(a, model.cache.high_water(a) - 4), StepStatus::kOk);
      }
      if (random() % 4 == 0) {
        model.release(b);
        b = *model.fork(a);
      }
      ASSERT_TRUE(model.matches());
    }
  }
}

TEST(ModelGeometryOf, BoundaryLengthsEqualTheOracle) {
  for (const PrefillMode prefill : {PrefillMode::kWindowed, PrefillMode::kChunkCausal}) {
    Model model(shape_of_all(), plan_of_all(), options_of(prefill));
    for (const std::int64_t length :
         {1, 3, 4, 5, 15, 16, 17, 19, 20, 21, 39, 40, 41, 63, 64, 65, 99, 100, 101, 130}) {
      const SequenceId id = model.add();
      for (const std::int64_t n : {length, std::int64_t{1}, std::int64_t{5}, std::int64_t{40}}) {
        const Phase phase = n == 1 || n == 5 ? Phase::kDecode : Phase::kPrompt;
        ASSERT_NO_FATAL_FAILURE(model.run_and_check({{id, new_tokens(n)}}, phase, kBound));
      }
      model.release(id);
    }
  }
}

TEST(ModelGeometryOf, ALongHeadInSplitsAddsItsSinkOnce) {
  LayerShape layer{.num_kv_heads = 1, .group_size = 2, .k_dim = 16, .v_dim = 16};
  layer.softmax.sinks = {7.0F, 9.0F};
  const ModelShape shape({layer});
  CacheOptions options = options_of(PrefillMode::kWindowed);
  options.max_context = 10000;
  Model model(shape, HeadPlan(shape), options);
  const SequenceId id = model.add();
  for (const std::int64_t n : {9000, 1, 40}) {  // one split, five, tiles in splits
    ASSERT_NO_FATAL_FAILURE(model.run_and_check({{id, new_tokens(n)}}, Phase::kPrompt, kBound));
  }
}

/// The queries of a layer that reads another's K and V may come before that one's or after it.
TEST(ModelGeometryOf, TheOrderOfLayersThatShareDoesNotMatter) {
  std::vector<std::vector<Outputs>> of_orders;
  const std::vector<test::Token> prompt = new_tokens(150);
  for (const std::vector<int>& order : {std::vector{0, 1, 2, 3, 4}, std::vector{4, 3, 2, 1, 0}}) {
    Model model(shape_of_all(), plan_of_all(), options_of(PrefillMode::kWindowed));
    const SequenceId id = model.add();
    std::vector<Outputs> all(5);
    std::int64_t next = 0;
    for (const std::int64_t n : {50, 1, 70, 1, 1}) {
      const Chunks chunks{{id, {prompt.begin() + next, prompt.begin() + next + n}}};
      next += n;
      ASSERT_EQ(model.begin(chunks, Phase::kPrompt), StepStatus::kOk);
      for (const int layer : order) {
        const Outputs out = model.attend_layer(layer, chunks);
        auto& to = all[static_cast<std::size_t>(layer)];
        to.insert(to.end(), out.begin(), out.end());
      }
      ASSERT_EQ(model.commit(), StepStatus::kOk);
    }
    of_orders.push_back(all);
  }
  EXPECT_EQ(of_orders[0], of_orders[1]);
}

TEST(ModelGeometryOf, ALayerThatSharesIsAttendedOnceLikeAnyOther) {
  Model model(shape_of_all(), plan_of_all(), options_of(PrefillMode::kWindowed));
  const SequenceId id = model.add();
  const Chunks chunks{{id, new_tokens(3)}};
  ASSERT_EQ(model.begin(chunks, Phase::kPrompt), StepStatus::kOk);
  for (int layer = 0; layer < 4; ++layer) (void)model.attend_layer(layer, chunks);
  EXPECT_EQ(model.commit(), StepStatus::kIncomplete);
  auto inputs = model.inputs_of(3, chunks);
  EXPECT_EQ(model.attend_into(model.step, 3, inputs), StepStatus::kAttended);
  (void)model.attend_layer(4, chunks);
  EXPECT_EQ(model.commit(), StepStatus::kOk);
}

TEST(ModelGeometryOf, ALayerThatSharesStoresNothing) {
  Model model(shape_of_all(), plan_of_all(), options_of(PrefillMode::kWindowed));
  const SequenceId id = model.add();
  const Chunks chunks{{id, new_tokens(30)}};
  ASSERT_EQ(model.begin(chunks, Phase::kPrompt), StepStatus::kOk);
  for (int layer = 0; layer < 5; ++layer) {
    auto inputs = model.inputs_of(layer, chunks);
    if (layer >= 3) {  // other rows than the layer's that it reads, and too large for f16
      std::ranges::fill(inputs.k, 1e6F);
      std::ranges::fill(inputs.v, 1e6F);
    }
    ASSERT_EQ(model.attend_into(model.step, layer, inputs), StepStatus::kOk);
  }
  EXPECT_EQ(model.step.num_overflows(), 0);
  ASSERT_EQ(model.commit(), StepStatus::kOk);
  EXPECT_TRUE(model.matches());
}

TEST(ModelGeometryOf, SharedKAndVAreHeldAndEstimatedOnce) {
  const ModelShape shape = shape_of_all();
  const std::vector<LayerShape> owners{shape.layer(0), shape.layer(1), shape.layer(2)};
  const ModelShape without(owners);
  const HeadPlan plan = plan_of_all();
  HeadPlan plan_without(without);
  for (int l = 0; l < 3; ++l) {
    for (int h = 0; h < 3; ++h) plan_without.set(l, h, plan.budget(l, h));
  }
  CacheOptions options = options_of(PrefillMode::kWindowed);
  const Estimate with = estimate<f16>(shape, plan, options);
  const Estimate of_owners = estimate<f16>(without, plan_without, options);
  EXPECT_EQ(with.total_bytes(), of_owners.total_bytes());
  EXPECT_EQ(with.dense_bytes, of_owners.dense_bytes);
  Model model(shape, plan, options);
  Model model_without(without, plan_without, options);
  const SequenceId a = model.add();
  const SequenceId b = model_without.add();
  for (const std::int64_t n : {90, 1, 200}) {
    model.add_tokens(a, new_tokens(n), Phase::kPrompt);
    model_without.add_tokens(b, new_tokens(n), Phase::kPrompt);
    EXPECT_EQ(model.cache.pages_in_use(), model_without.cache.pages_in_use());
    EXPECT_EQ(model.cache.held_bytes(a), model_without.cache.held_bytes(b));
    EXPECT_EQ(model.cache.held_bytes(a),
              sequence_bytes<f16>(without, plan_without, options, model.cache.length(a)));
  }
}

TEST(ModelGeometryOf, ALayersOwnWindowBoundsItsMemoryUnderAFullPlan) {
  LayerShape local{.num_kv_heads = 2, .group_size = 1, .k_dim = 16, .v_dim = 16};
  const LayerShape global = local;
  local.sliding_window = 60;
  const ModelShape shape({local, global});
  for (const PrefillMode prefill : {PrefillMode::kWindowed, PrefillMode::kChunkCausal}) {
    Model model(shape, HeadPlan(shape), options_of(prefill));  // pages of 16, rollback 4
    const SequenceId id = model.add();
    for (const std::int64_t length : {15, 16, 63, 64, 65, 300}) {
      model.add_tokens(id, new_tokens(length - model.cache.length(id)), Phase::kPrompt);
      const std::int64_t pages = (length + 15) / 16;
      EXPECT_EQ(model.cache.pages_in_use(), 2 * pages + 2 * std::min<std::int64_t>(pages, 4));
    }
  }
}

TEST(ModelGeometryOf, AWindowThatTheContextNeverPassesChangesNothing) {
  LayerShape local{.num_kv_heads = 2, .group_size = 1, .k_dim = 16, .v_dim = 16};
  const ModelShape global({local});
  local.sliding_window = 700;
  CacheOptions options = options_of(PrefillMode::kChunkCausal);
  const CacheGeometry with(ModelShape({local}), HeadPlan(global), options,
                           &FormatOf<f16>::page_bytes);
  EXPECT_EQ(with.classes()[0].rule, AnyKeepRule(EverythingRule{16, 700, 4}));
  options.max_context = 701;
  const CacheGeometry passed(ModelShape({local}), HeadPlan(global), options,
                             &FormatOf<f16>::page_bytes);
  EXPECT_NE(passed.classes()[0].rule.get_if<WindowRule>(), nullptr);
}

TEST(ModelGeometryOf, RefusesWhatDoesNotGoTogether) {
  const CacheOptions options = options_of(PrefillMode::kChunkCausal);
  const auto refuses = [&](const ModelShape& shape, const HeadPlan& plan, auto... texts) {
    EXPECT_THAT(([&] { CacheGeometry(shape, plan, options, &FormatOf<f16>::page_bytes); }),
                ThrowsMessage<ConfigError>(AllOf(HasSubstr(texts)...)));
  };
  HeadPlan unlike = plan_of_all();
  unlike.set(3, 1, KeepEverything{});
  refuses(shape_of_all(), unlike, "layer 3, KV head 1", "layer 0", "share_budgets");
  EXPECT_NO_THROW(CacheGeometry(shape_of_all(), share_budgets(unlike, shape_of_all()), options,
                                &FormatOf<f16>::page_bytes));
  HeadPlan growing = plan_of_all();
  growing.set(2, 0, KeepGrowingWindow{4, 40, 3});
  refuses(shape_of_all(), growing, "layer 2, KV head 0", "compensation row", "alibi_slopes");
  HeadPlan folds = plan_of_all();
  folds.set(1, 0, KeepGrowingWindow{4, 19, 3});
  folds.set(4, 0, KeepGrowingWindow{4, 19, 3});
  refuses(shape_of_all(), folds, "min_recent", "19", "20");
}

TEST(ModelGeometryOf, HiddenRowsContributeNothingWhateverTheirBitsAre) {
  // Row 5 is NaN; from length 30 on nothing but the first layer's retrieval head sees it.
  LayerShape local{.num_kv_heads = 2, .group_size = 1, .k_dim = 16, .v_dim = 16};
  local.sliding_window = 20;
  local.softmax = {.soft_cap = 5.0F, .sinks = {1.0F, 0.0F}, .alibi_slopes = {0.5F, 0.1F}};
  const ModelShape shape({local});
  HeadPlan plan(shape);
  plan.set(0, 1, KeepWindow{{4, 12}});
  KvCache<f16> cache(shape, plan, {.page_tokens = 16, .max_context = 200});
  Step step;
  const SequenceId id = *cache.add_sequence();
  std::int64_t pos = 0;
  for (const std::int64_t n : {10, 35, 1, 1, 60, 1}) {
    const auto size = static_cast<std::size_t>(n * 2 * 16);
    std::vector<float> q(size, 0.5F), k(size, 0.25F), v(size, 1.0F), out(size);
    for (std::int64_t i = 0; i < n; ++i) {
      if (pos + i != 5) continue;
      const auto first = static_cast<std::ptrdiff_t>(i * 32);
      std::fill_n(k.begin() + first, 32, std::nanf(""));
      std::fill_n(v.begin() + first, 32, std::nanf(""));
    }
    ASSERT_EQ(cache.begin(step, {{id, n}}), StepStatus::kOk);
    const auto rows = [](const std::vector<float>& x) {
      return TensorView<const float>::nhd(x.data(), 2, 16);
    };
    ASSERT_EQ(attend(cache, step, 0, rows(q), rows(k), rows(v),
                     TensorView<float>::nhd(out.data(), 2, 16)),
              StepStatus::kOk);
    ASSERT_EQ(cache.commit(step), StepStatus::kOk);
    for (std::int64_t i = 0; i < n; ++i) {
      for (int h = 0; h < 2; ++h) {
        const std::int64_t window = h == 0 ? 20 : 12;
        const bool sees = pos + i >= 5 && pos + i - 5 < window;
        const float x = out[static_cast<std::size_t>((i * 2 + h) * 16)];
        EXPECT_EQ(std::isnan(x), sees) << pos + i << ", head " << h;
        EXPECT_TRUE(sees || x < 1.0F);  // the sink has a share
      }
    }
    pos += n;
  }
}

}  // namespace
}  // namespace headwise
