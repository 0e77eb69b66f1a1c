// SPDX-License-Identifier: MIT
#include "headwise/attention/attend.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "support/attend_models.hpp"
#include "support/attended_cache.hpp"
#include "support/boundary_lengths.hpp"
#include "support/count_allocations.hpp"
#include "support/isa_types.hpp"

namespace headwise {
namespace {

using test::AttendedCache;
using test::below;
using test::Chunks;
using test::every_kind;
using test::kBound;
using test::Model;
using test::new_tokens;
using test::options_of;
using test::Outputs;
using test::small_model;
using test::two_layers;

template <class Types>
class AttendOn : public ::testing::Test {};
TYPED_TEST_SUITE(AttendOn, test::AllFormats, test::FormatNames);

TYPED_TEST(AttendOn, EqualsTheOracleForEveryGroupAndWidth) {
  const struct Widths {
    int group, k_dim, v_dim;
  } shapes[] = {{1, 32, 32},   {2, 64, 64},  {4, 80, 80}, {5, 96, 96},
                {7, 128, 128}, {8, 256, 16}, {3, 48, 112}};
  for (const PrefillMode prefill : {PrefillMode::kWindowed, PrefillMode::kChunkCausal}) {
    for (const Widths& widths : shapes) {
      const ModelShape shape = two_layers(widths.group, widths.k_dim, widths.v_dim);
      AttendedCache<TypeParam> model(shape, every_kind(shape, prefill), options_of(prefill));
      const SequenceId a = model.add();
      const SequenceId b = model.add();
      const auto check = [&](const Chunks& chunks, Phase phase) {
        ASSERT_NO_FATAL_FAILURE(model.run_and_check(chunks, phase, kBound))
            << "group " << widths.group << ", K " << widths.k_dim << ", V " << widths.v_dim;
      };
      check({{a, new_tokens(21)}}, Phase::kPrompt);
      check({{b, new_tokens(1)}, {a, new_tokens(30)}}, Phase::kPrompt);
      check({{a, new_tokens(1)}, {b, new_tokens(1)}}, Phase::kDecode);
      check({{a, new_tokens(3)}, {b, {}}}, Phase::kDecode);
      check({{b, new_tokens(17)}, {a, new_tokens(1)}}, Phase::kPrompt);
      ASSERT_TRUE(model.matches());
    }
  }
}

TEST(Attend, EveryRowOfPromptsOfBoundaryLengthsEqualsTheOracle) {
  for (const PrefillMode prefill : {PrefillMode::kWindowed, PrefillMode::kChunkCausal}) {
    Model model = small_model(prefill);
    for (const std::int64_t length : test::boundary_lengths(4, 12, 32, 16)) {
      if (length > 260) continue;
      const SequenceId id = model.add();
      ASSERT_NO_FATAL_FAILURE(
          model.run_and_check({{id, new_tokens(length)}}, Phase::kPrompt, kBound));
      ASSERT_NO_FATAL_FAILURE(model.run_and_check({{id, new_tokens(1)}}, Phase::kDecode, kBound));
      ASSERT_NO_FATAL_FAILURE(model.run_and_check({{id, new_tokens(5)}}, Phase::kDecode, kBound));
      ASSERT_NO_FATAL_FAILURE(model.run_and_check({{id, new_tokens(40)}}, Phase::kPrompt, kBound));
      model.release(id);
    }
  }
}

TEST(Attend, EveryTokenOfALongDecodeEqualsTheOracle) {
  for (const PrefillMode prefill : {PrefillMode::kWindowed, PrefillMode::kChunkCausal}) {
    Model model = small_model(prefill);
    const SequenceId id = model.add();
    for (int i = 0; i < 130; ++i) {
      ASSERT_NO_FATAL_FAILURE(model.run_and_check({{id, new_tokens(1)}}, Phase::kDecode, kBound));
    }
  }
}

TEST(Attend, RandomChunksInBothModesEqualTheOracle) {
  std::mt19937 random(29);
  for (const PrefillMode prefill : {PrefillMode::kWindowed, PrefillMode::kChunkCausal}) {
    for (const std::int64_t largest : {5, 20, 60, 110}) {
      Model model = small_model(prefill);
      const SequenceId a = model.add();
      const SequenceId b = model.add();
      const SequenceId c = model.add();
      while (model.cache.length(a) < 160 && !HasFatalFailure()) {
        Chunks chunks;
        for (const SequenceId id : {c, a, b}) {
          if (random() % 3 != 0) chunks.emplace_back(id, new_tokens(below(random, largest)));
        }
        if (model.cache.length(b) + model.cache.length(c) > 500) break;
        const Phase phase = random() % 3 == 0 ? Phase::kDecode : Phase::kPrompt;
        ASSERT_NO_FATAL_FAILURE(model.run_and_check(chunks, phase, kBound));
      }
      ASSERT_TRUE(model.matches());
    }
  }
}

TEST(Attend, TakesTensorsOfAnyStrides) {
  // Heads first, and rows that are wider than they need be: the same bits as dense tokens first.
  Model dense = small_model(PrefillMode::kWindowed);
  Model strided = small_model(PrefillMode::kWindowed);
  const SequenceId id = dense.add();
  ASSERT_EQ(strided.add(), id);
  for (const std::int64_t n : {50, 1, 3}) {
    const Chunks chunks{{id, new_tokens(n)}};
    const std::vector<Outputs> expected = dense.run(chunks, Phase::kPrompt);
    ASSERT_EQ(strided.begin(chunks, Phase::kPrompt), StepStatus::kOk);
    for (int l = 0; l < 2; ++l) {
      const int kv_heads = l == 0 ? 3 : 2;
      const auto in = strided.inputs_of(l, chunks);
      constexpr std::int64_t kStride = 40;  // rows of 32
      const auto heads_first = [&](const std::vector<float>& x, std::int64_t heads) {
        std::vector<float> y(static_cast<std::size_t>(n * heads * kStride), -9.0F);
        for (std::int64_t row = 0; row < n * heads; ++row) {
          const std::int64_t to = (row % heads) * n * kStride + row / heads * kStride;
          std::copy_n(x.begin() + row * 32, 32, y.begin() + to);
        }
        return y;
      };
      const std::vector<float> q = heads_first(in.q, 2 * kv_heads);
      const std::vector<float> k = heads_first(in.k, kv_heads);
      const std::vector<float> v = heads_first(in.v, kv_heads);
      std::vector<float> out(q.size(), -9.0F);
      ASSERT_EQ(attend(strided.cache, strided.step, l, {q.data(), kStride, n * kStride},
                       {k.data(), kStride, n * kStride}, {v.data(), kStride, n * kStride},
                       TensorView<float>{out.data(), kStride, n * kStride}),
                StepStatus::kOk);
      EXPECT_EQ(out, heads_first(expected[static_cast<std::size_t>(l)], 2 * kv_heads));
    }
    ASSERT_EQ(strided.commit(), StepStatus::kOk);
  }
}

TEST(Attend, ScalesScoresAsTheLayerSays) {
  const ModelShape shape({{2, 3, 32, 32, 0.4F}});
  HeadPlan plan(shape);
  plan.set(0, 1, KeepWindow{{4, 12}});
  Model model(shape, plan, options_of(PrefillMode::kWindowed));
  const SequenceId id = model.add();
  for (const std::int64_t n : {40, 1, 4}) {
    ASSERT_NO_FATAL_FAILURE(model.run_and_check({{id, new_tokens(n)}}, Phase::kPrompt, kBound));
  }
}

// Compensation -----------------------------------------------------------------------------------

TEST(Attend, FoldingIdenticalRowsLosesNothing) {
  // RazorAttention: where all dropped keys are alike, the compensation row stands for them exactly.
  const ModelShape shape = ModelShape::uniform(1, 4, 2, 32);
  HeadPlan plan(shape);
  plan.set(0, 1, KeepGrowingWindow{4, 20, 4});
  KvCache<f16> cache(shape, plan, options_of(PrefillMode::kChunkCausal));
  const SequenceId id = cache.add_sequence().value();
  Step step;
  std::mt19937 random(37);
  std::normal_distribution<float> normal;
  std::vector<float> k(150 * 2 * 32);
  std::vector<float> v(150 * 2 * 32);
  std::vector<float> q(150 * 4 * 32);
  for (float& x : q) x = 2.0F * normal(random);
  for (std::size_t i = 0; i < k.size(); ++i) {
    const bool middle = i / 64 >= 4 && i / 64 < 125;  // all that will be folded, and more
    k[i] = middle ? k[i % 64] : normal(random);
    v[i] = middle ? v[i % 64] : normal(random);
    if (i % 64 >= 32) {  // both heads alike
      k[i] = k[i - 32];
      v[i] = v[i - 32];
    }
  }
  for (std::size_t i = 0; i < q.size(); ++i) {
    if (i % 128 >= 64) q[i] = q[i - 64];
  }
  std::vector<float> out(q.size());
  const auto run = [&](std::int64_t first, std::int64_t count) {
    ASSERT_EQ(cache.begin(step, {{id, count}}), StepStatus::kOk);
    ASSERT_EQ(attend(cache, step, 0, TensorView<const float>::nhd(q.data() + first * 128, 4, 32),
                     TensorView<const float>::nhd(k.data() + first * 64, 2, 32),
                     TensorView<const float>::nhd(v.data() + first * 64, 2, 32),
                     TensorView<float>::nhd(out.data() + first * 128, 4, 32)),
              StepStatus::kOk);
    ASSERT_EQ(cache.commit(step), StepStatus::kOk);
  };
  run(0, 130);
  for (std::int64_t i = 130; i < 150; ++i) run(i, 1);
  EXPECT_GT(test::seen_by_next(cache, id, Phase::kDecode)[1].folded, 80);
  for (std::size_t i = 130 * 128; i < out.size(); ++i) {
    if (i % 128 < 64) {
      ASSERT_NEAR(out[i], out[i + 64], 1e-5) << i;
    }
  }
}

// Hot path ---------------------------------------------------------------------------------------

TEST(Attend, AllocatesNothingOnceScratchIsReserved) {
  Model model = small_model(PrefillMode::kChunkCausal);
  const SequenceId a = model.add();
  const SequenceId b = model.add();
  reserve_scratch(model.step, model.cache, 1);
  model.add_tokens(a, new_tokens(1), Phase::kPrompt);
  std::vector<float> q(400 * 6 * 32, 0.25F);
  std::vector<float> out(400 * 6 * 32);
  bool all_ok = true;
  const auto run = [&](std::initializer_list<SequenceChunk> chunks) {
    all_ok &= model.cache.begin(model.step, chunks) == StepStatus::kOk;
    for (int l = 0; l < 2; ++l) {
      const int heads = l == 0 ? 3 : 2;
      const auto kv = TensorView<const float>::nhd(q.data(), heads, 32);
      all_ok &=
          attend(model.cache, model.step, l, TensorView<const float>::nhd(q.data(), 2 * heads, 32),
                 kv, kv, TensorView<float>::nhd(out.data(), 2 * heads, 32)) == StepStatus::kOk;
    }
    all_ok &= model.cache.commit(model.step) == StepStatus::kOk;
  };
  EXPECT_EQ(test::allocations_in([&] {
              run({{a, 200}, {b, 100}});
              for (int i = 0; i < 40; ++i) run({{b, 1}, {a, 1}});
              run({{b, 60}});
              run({{a, 4, Phase::kDecode}, {b, 7}});
            }),
            0U);
  EXPECT_TRUE(all_ok);
}

TEST(Attend, AllocatesNothingInAHundredThousandDecodeSteps) {
  // As an engine decodes: rings wrap, checkpoints are made, drafts rejected, a conversation ends
  // and the next one begins.
  const ModelShape shape = two_layers(1, 16, 16);
  CacheOptions options = test::options_of(PrefillMode::kChunkCausal);
  options.max_context = 220;
  options.checkpoint_tokens = 64;
  KvCache<f16> cache(shape, test::every_kind(shape, PrefillMode::kChunkCausal), options);
  Step step;
  reserve_scratch(step, cache, 1);
  const std::vector<float> rows(3 * 16, 0.25F);
  std::vector<float> out(3 * 16);
  SequenceId id = cache.add_sequence().value();
  bool all_ok = cache.begin(step, {{id, 0}}) == StepStatus::kOk;
  EXPECT_EQ(test::allocations_in([&] {
              for (int i = 0; i < 100'000; ++i) {
                all_ok &= cache.begin(step, {{id, 1, Phase::kDecode}}) == StepStatus::kOk;
                for (int l = 0; l < 2; ++l) {
                  const int heads = l == 0 ? 3 : 2;
                  const auto in = TensorView<const float>::nhd(rows.data(), heads, 16);
                  all_ok &=
                      attend(cache, step, l, in, in, in,
                             TensorView<float>::nhd(out.data(), heads, 16)) == StepStatus::kOk;
                }
                all_ok &= cache.commit(step) == StepStatus::kOk;
                if (i % 5 == 0) {
                  all_ok &= cache.rollback(id, cache.length(id) - std::min<std::int64_t>(
                                                                      2, cache.max_truncate(id))) ==
                            StepStatus::kOk;
                }
                if (cache.length(id) == 220) {
                  cache.release(id);
                  id = cache.add_sequence().value();
                }
              }
            }),
            0U);
  EXPECT_TRUE(all_ok);
}

}  // namespace
}  // namespace headwise
