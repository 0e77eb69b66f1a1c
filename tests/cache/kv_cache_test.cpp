// SPDX-License-Identifier: MIT
#include "headwise/cache/kv_cache.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <map>
#include <set>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "support/boundary_lengths.hpp"
#include "support/cache_model.hpp"
#include "support/isa_types.hpp"

namespace headwise {
namespace {

using test::ModelledCache;
using test::new_tokens;

template <class Types>
class KvCaches : public ::testing::Test {};

TYPED_TEST_SUITE(KvCaches, test::AllFormats, test::FormatNames);

TYPED_TEST(KvCaches, ShowsWhatTheRulesSayAtEveryLengthOfADecode) {
  for (const PrefillMode prefill : {PrefillMode::kWindowed, PrefillMode::kChunkCausal}) {
    ModelledCache<TypeParam> model(test::mixed_shape(), test::mixed_plan(prefill),
                                   test::mixed_options(prefill, 3));
    const SequenceId id = model.add();
    for (int length = 0; length < 150; ++length) {
      ASSERT_TRUE(model.matches(id, Phase::kDecode, 1));
      ASSERT_TRUE(model.matches(id, Phase::kPrompt, length % 20));
      model.add_tokens(id, new_tokens(1), Phase::kDecode);
    }
  }
}

TYPED_TEST(KvCaches, ShowsWhatTheRulesSayAfterOneChunkOfAnyBoundaryLength) {
  for (const PrefillMode prefill : {PrefillMode::kWindowed, PrefillMode::kChunkCausal}) {
    CacheOptions options = test::mixed_options(prefill, 3);
    options.max_context = 700;
    ModelledCache<TypeParam> model(test::mixed_shape(), test::mixed_plan(prefill), options);
    std::set<std::int64_t> lengths;
    for (const auto& [sink, recent] : {std::pair{4, 12}, {17, 30}, {3, 33}, {16, 16}}) {
      for (const std::int64_t n : test::boundary_lengths(sink, recent, sink + recent + 4, 16)) {
        lengths.insert(n);
      }
    }
    for (const std::int64_t length : lengths) {
      const SequenceId id = model.add();
      model.add_tokens(id, new_tokens(length), Phase::kPrompt);
      ASSERT_TRUE(model.matches());
      model.add_tokens(id, new_tokens(2), Phase::kDecode);
      ASSERT_TRUE(model.matches());
      model.release(id);
    }
  }
}

TYPED_TEST(KvCaches, StoresEveryUsualWidth) {
  for (const int dim : {32, 64, 80, 96, 128, 256}) {
    const ModelShape shape = ModelShape::uniform(1, 2, 2, dim);
    HeadPlan plan(shape);
    plan.set(0, 1, KeepWindow{{4, 12}});
    ModelledCache<TypeParam> model(shape, plan, test::mixed_options(PrefillMode::kWindowed, 0));
    const SequenceId id = model.add();
    for (const std::int64_t chunk : {5, 30, 1, 1}) {
      model.add_tokens(id, new_tokens(chunk), Phase::kPrompt);
      ASSERT_TRUE(model.matches()) << dim;
    }
  }
}

// From here on the row format does not matter.
using Model = ModelledCache<f16>;

Model mixed_model(PrefillMode prefill, std::int64_t rollback) {
  return {test::mixed_shape(), test::mixed_plan(prefill), test::mixed_options(prefill, rollback)};
}

TEST(KvCache, KeepsSinksAfterWrap) {
  const ModelShape shape = ModelShape::uniform(1, 1, 1, 16);
  Model model(shape, HeadPlan(shape, KeepWindow{{4, 12}}),
              test::mixed_options(PrefillMode::kWindowed, 0));
  const SequenceId id = model.add();
  for (int i = 0; i < 200; ++i) model.add_tokens(id, new_tokens(1), Phase::kDecode);
  const auto seen = test::seen_by_next(model.cache, id, Phase::kDecode);
  EXPECT_EQ(seen[0].positions, (std::vector<std::int64_t>{0, 1, 2, 3, 189, 190, 191, 192, 193, 194,
                                                          195, 196, 197, 198, 199}));
  EXPECT_TRUE(model.matches());
}

/// The positions that each query of a chunk sees, stored ones and the chunk's own.
std::vector<std::set<std::int64_t>> seen_by_queries(const Model& model, SequenceId id, Phase phase,
                                                    std::int64_t num_tokens) {
  const auto seen = test::seen_by_next(model.cache, id, phase, num_tokens).front();
  const std::int64_t start = model.cache.length(id);
  std::vector<std::set<std::int64_t>> out;
  for (std::int64_t query = start; query < start + num_tokens; ++query) {
    std::vector<std::int64_t> keys = seen.positions;
    for (std::int64_t own = start; own <= query; ++own) keys.push_back(own);
    std::set<std::int64_t>& visible = out.emplace_back();
    for (const std::int64_t key : keys) {
      if (seen.window.sees(Pos{query}, Pos{key})) visible.insert(key);
    }
  }
  return out;
}

TEST(KvCache, OneExclusiveWindowIsDuoAttentionsInPrefillAndDecode) {
  // S = 1, R = 2, chunks of 4, as in the paper's figure.
  using Keys = std::set<std::int64_t>;
  const ModelShape shape = ModelShape::uniform(1, 1, 1, 16);
  Model model(shape, HeadPlan(shape, KeepWindow{Window::from_exclusive(1, 2)}),
              test::mixed_options(PrefillMode::kChunkCausal, 0));
  const SequenceId id = model.add();
  std::map<std::int64_t, Keys> seen;
  std::size_t pairs = 0;
  for (std::int64_t start = 0; start < 16; start += 4) {
    const auto chunk = seen_by_queries(model, id, Phase::kPrompt, 4);
    for (std::size_t i = 0; i < 4; ++i) {
      seen[start + static_cast<std::int64_t>(i)] = chunk[i];
      pairs += chunk[i].size();
    }
    model.add_tokens(id, new_tokens(4), Phase::kPrompt);
  }
  EXPECT_EQ(seen[3], (Keys{0, 1, 2, 3}));
  EXPECT_EQ(seen[4], (Keys{0, 2, 3, 4}));
  EXPECT_EQ(seen[7], (Keys{0, 2, 3, 4, 5, 6, 7}));
  EXPECT_EQ(seen[8], (Keys{0, 6, 7, 8}));
  EXPECT_EQ(pairs, 76U);
  EXPECT_EQ(seen_by_queries(model, id, Phase::kDecode, 1).front(), (Keys{0, 14, 15, 16}));
}

TEST(KvCache, AWindowCountsTheCurrentToken) {
  // DuoAttention's training rule with S = 1, R = 2; a chunk of one token is decode in every mode.
  const ModelShape shape = ModelShape::uniform(1, 1, 1, 16);
  for (const PrefillMode prefill : {PrefillMode::kWindowed, PrefillMode::kChunkCausal}) {
    Model model(shape, HeadPlan(shape, KeepWindow{{1, 2}}), test::mixed_options(prefill, 0));
    const SequenceId id = model.add();
    model.add_tokens(id, new_tokens(16), Phase::kPrompt);
    for (const Phase phase : {Phase::kDecode, Phase::kPrompt}) {
      EXPECT_EQ(seen_by_queries(model, id, phase, 1).front(), (std::set<std::int64_t>{0, 15, 16}));
    }
  }
}

TEST(KvCache, AWholePromptInOneChunkIsDenseWhereChunksAreCausal) {
  Model model = mixed_model(PrefillMode::kChunkCausal, 0);
  const SequenceId id = model.add();
  for (const auto& seen : test::seen_by_next(model.cache, id, Phase::kPrompt, 300)) {
    EXPECT_TRUE(seen.positions.empty());
    EXPECT_EQ(seen.window, Window::everything());
  }
}

TEST(KvCache, WindowsOverTheWholeContextKeepEverything) {
  const ModelShape shape = ModelShape::uniform(1, 2, 2, 16);
  for (const Window window :
       {Window{0, 500}, Window{500, 1}, Window{9999, 9999}, Window::everything()}) {
    HeadPlan plan(shape);
    plan.set(0, 1, KeepWindow{window});
    Model model(shape, plan, test::mixed_options(PrefillMode::kWindowed, 40));
    const SequenceId id = model.add();
    for (const std::int64_t chunk : {3, 250, 1, 46, 200}) {
      const auto seen = test::seen_by_next(model.cache, id, Phase::kDecode);
      EXPECT_EQ(seen[0].positions, seen[1].positions);
      model.add_tokens(id, new_tokens(chunk), Phase::kPrompt);
      ASSERT_TRUE(model.matches());
    }
  }
}

TEST(KvCache, AppendingDisturbsNothingThatTheStepSees) {
  // Attention of another head, or of a step that is dropped and redone, reads after the append.
  for (const PrefillMode prefill : {PrefillMode::kWindowed, PrefillMode::kChunkCausal}) {
    for (const std::int64_t rollback : {0, 5, 33}) {
      Model model = mixed_model(prefill, rollback);
      const SequenceId id = model.add();
      for (const std::int64_t chunk : {7, 1, 20, 1, 3, 80, 2, 16, 15, 17, 1, 40, 64}) {
        const auto before = test::seen_by_next(model.cache, id, Phase::kPrompt, chunk);
        ASSERT_EQ(model.begin({{id, new_tokens(chunk)}}, Phase::kPrompt), StepStatus::kOk);
        EXPECT_EQ(test::seen_by_next(model.cache, id, Phase::kPrompt, chunk), before);
        model.append();
        EXPECT_EQ(test::seen_by_next(model.cache, id, Phase::kPrompt, chunk), before) << chunk;
        ASSERT_EQ(model.commit(), StepStatus::kOk);
        ASSERT_TRUE(model.matches());
      }
    }
  }
}

TEST(KvCache, SequencesAreIndependentAndStepsTakeAnyOrder) {
  for (const PrefillMode prefill : {PrefillMode::kWindowed, PrefillMode::kChunkCausal}) {
    Model model = mixed_model(prefill, 4);
    const SequenceId a = model.add();
    const SequenceId b = model.add();
    const SequenceId c = model.add();
    const std::vector<std::vector<std::pair<SequenceId, std::int64_t>>> steps = {
        {{a, 70}}, {{c, 1}, {b, 33}}, {{b, 1}, {a, 1}, {c, 1}},    {{c, 90}, {a, 0}},
        {},        {{a, 2}, {c, 1}},  {{c, 1}, {b, 100}, {a, 17}}, {{b, 1}, {c, 1}, {a, 1}}};
    for (const auto& step : steps) {
      std::vector<std::pair<SequenceId, std::vector<test::Token>>> chunks;
      for (const auto& [id, count] : step) chunks.emplace_back(id, new_tokens(count));
      ASSERT_EQ(model.begin(chunks, Phase::kPrompt), StepStatus::kOk);
      model.append();
      ASSERT_EQ(model.commit(), StepStatus::kOk);
      ASSERT_TRUE(model.matches());
    }
    for (const SequenceId id : {a, b, c}) {
      EXPECT_EQ(test::seen_by_next(model.cache, id, Phase::kDecode),
                model.never_seen(id, Phase::kDecode));
    }
  }
}

TEST(KvCache, PositionsAreNoRowCounts) {
  // After ten windows the position is the number of tokens, not of rows.
  const ModelShape shape = ModelShape::uniform(2, 1, 1, 16);
  Model model(shape, HeadPlan(shape, KeepWindow{{4, 12}}),
              test::mixed_options(PrefillMode::kWindowed, 0));
  const SequenceId id = model.add();
  for (int i = 0; i < 160; ++i) model.add_tokens(id, new_tokens(1), Phase::kDecode);
  EXPECT_EQ(model.cache.length(id), 160);
  EXPECT_EQ(test::seen_by_next(model.cache, id, Phase::kDecode)[1].positions.back(), 159);
}

TEST(KvCache, CountsPositionsBeyond32Bits) {
  const ModelShape shape = ModelShape::uniform(1, 2, 2, 16);
  HeadPlan plan(shape, KeepWindow{{0, 12}});
  plan.set(0, 1, KeepWindow{{3, 30}});
  CacheOptions options = test::mixed_options(PrefillMode::kWindowed, 5);
  options.max_context = std::int64_t{1} << 40;
  KvCache<PlainRows<f32>> cache(shape, plan, options);
  const SequenceId id = cache.add_sequence().value();
  Step step;
  // As if 2^33 tokens had gone by; their rows do not matter, the window is past them.
  const std::int64_t far = (std::int64_t{1} << 33) + 7;
  ASSERT_EQ(cache.begin(step, {{id, far, Phase::kPrompt}}), StepStatus::kOk);
  step.note_head_done(0);
  step.note_head_done(0);
  ASSERT_EQ(cache.commit(step), StepStatus::kOk);
  for (std::int64_t i = 0; i < 100; ++i) {
    const float row[16] = {static_cast<float>(i)};
    const auto view = TensorView<const float>::nhd(row, 1, 16);
    ASSERT_EQ(cache.begin(step, {{id, 1, Phase::kDecode}}), StepStatus::kOk);
    for (int head = 0; head < 2; ++head) {
      cache.append<simd::BestIsa>(step, step.chunks()[0], 0, head, view, view);
      step.note_head_done(0);
    }
    ASSERT_EQ(cache.commit(step), StepStatus::kOk);
  }
  const auto seen = test::seen_by_next(cache, id, Phase::kDecode);
  ASSERT_EQ(seen[0].positions.size(), 11U);
  ASSERT_EQ(seen[1].positions.size(), 3U + 29U);
  for (std::size_t i = 0; i < 11; ++i) {
    EXPECT_EQ(seen[0].positions[i], far + 89 + static_cast<std::int64_t>(i));
    EXPECT_EQ(seen[0].rows[32 * i], static_cast<float>(89 + i));
  }
  EXPECT_EQ(seen[1].positions.back(), far + 99);
  EXPECT_EQ(seen[1].rows[32 * 31], 99.0F);
}

TEST(KvCache, TablesStayWhereTheyAre) {
  // A captured graph or a foreign kernel keeps the addresses.
  Model model = mixed_model(PrefillMode::kWindowed, 4);
  const SequenceId id = model.add();
  const StepChunk chunk{id, {0, 0, 1}, 0};
  const auto before = model.cache.seen(chunk, 0, 0).view;
  for (const std::int64_t count : {40, 1, 1, 200}) {
    model.add_tokens(id, new_tokens(count), Phase::kPrompt);
    const auto after = model.cache.seen(chunk, 0, 0).view;
    EXPECT_EQ(after.memory.pages, before.memory.pages);
    EXPECT_EQ(after.page_table, before.page_table);
  }
}

TEST(KvCache, HeadsAndSequencesShareNoPage) {
  Model model = mixed_model(PrefillMode::kChunkCausal, 4);
  const SequenceId ids[] = {model.add(), model.add(), model.add()};
  for (const SequenceId id : ids) model.add_tokens(id, new_tokens(130), Phase::kPrompt);
  std::set<const void*> pages;
  std::size_t count = 0;
  for (const SequenceId id : ids) {
    const StepChunk chunk{id, {130, 130, 131}, 0};
    for (int l = 0; l < 3; ++l) {
      for (int h = 0; h < test::mixed_shape().layer(l).num_kv_heads; ++h) {
        const auto view = model.cache.seen(chunk, l, h).view;
        std::set<const void*> own;
        for (const KvRun& run : view.runs()) {
          for (std::int64_t i = 0; i < run.count; ++i) own.insert(view.page_of(run.first_slot + i));
        }
        count += own.size();
        pages.insert(own.begin(), own.end());
      }
    }
  }
  EXPECT_EQ(pages.size(), count);
}

TEST(KvCache, GroupsDoNotMultiplyWhatIsStored) {
  const auto held = [](int group) {
    const ModelShape shape = ModelShape::uniform(1, 2 * group, 2, 32);
    Model model(shape, HeadPlan(shape), test::mixed_options(PrefillMode::kWindowed, 0));
    const SequenceId id = model.add();
    model.add_tokens(id, new_tokens(100), Phase::kPrompt);
    return model.cache.held_bytes(id);
  };
  for (const int group : {1, 2, 4, 5, 7, 8}) EXPECT_EQ(held(group), 2U * 7U * 16U * 64U * 2U);
}

// What a step says of its rows -------------------------------------------------------------------

/// Stores one token per value of K and V in a fresh cache; the step's overflows.
template <class Rows>
std::int64_t overflows_of(const std::vector<float>& values, PrefillMode prefill,
                          const HeadBudget& keep) {
  const ModelShape shape = ModelShape::uniform(1, 1, 1, 16);
  KvCache<Rows> cache(shape, HeadPlan(shape, keep), test::mixed_options(prefill, 0));
  const SequenceId id = cache.add_sequence().value();
  std::vector<float> k(values.size() * 16, 1.0F);
  std::vector<float> v(values.size() * 16, 1.0F);
  for (std::size_t i = 0; i < values.size(); ++i) {
    k[16 * i + i % 16] = values[i];
    v[16 * i + 15 - i % 16] = -values[i];
  }
  Step step;
  EXPECT_EQ(cache.begin(step, {{id, static_cast<std::int64_t>(values.size())}}), StepStatus::kOk);
  cache.template append<simd::BestIsa>(step, step.chunks()[0], 0, 0,
                                       TensorView<const float>::nhd(k.data(), 1, 16),
                                       TensorView<const float>::nhd(v.data(), 1, 16));
  step.note_head_done(0);
  const std::int64_t overflows = step.num_overflows();
  EXPECT_EQ(cache.commit(step), StepStatus::kOk);
  EXPECT_EQ(step.num_overflows(), overflows);  // to be read after the commit, too
  EXPECT_EQ(cache.begin(step, {{id, 0}}), StepStatus::kOk);
  EXPECT_EQ(step.num_overflows(), 0);
  return overflows;
}

TEST(KvCache, CountsFiniteElementsThatBecomeInfiniteWhenTheyAreStored) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  const auto count = []<class Rows>(const std::vector<float>& values) {
    return overflows_of<Rows>(values, PrefillMode::kWindowed, KeepEverything{});
  };
  const std::vector<float> halves{65504, 65519, 65520, 70000, 1e30F, 0, 6e-8F};  // 3 beyond
  EXPECT_EQ(count.operator()<TiledRows<f16>>(halves), 2 * 3);                    // of K and of V
  EXPECT_EQ(count.operator()<PlainRows<f16>>(halves), 2 * 3);
  for (const std::vector<float>& stored : {halves, {kInf, kNan, -kInf}}) {
    EXPECT_EQ(count.operator()<bf16>(stored), 0);
    EXPECT_EQ(count.operator()<f32>(stored), 0);
  }
  EXPECT_EQ(count.operator()<f16>({kInf, kNan, -kInf}), 0);  // they were so before
  EXPECT_EQ(count.operator()<bf16>({3.3e38F, 3.4e38F}), 2);
  EXPECT_EQ(count.operator()<f32>({3.3e38F, 3.4e38F}), 0);
}

TEST(KvCache, CountsOverflowsOfRowsThatAChunkPushesOutBeforeItEnds) {
  // The chunk's own queries see them, in the row format.
  std::vector<float> values(200, 1.0F);
  values[100] = 70000.0F;
  EXPECT_EQ(overflows_of<f16>(values, PrefillMode::kWindowed, KeepWindow{{4, 12}}), 2);
  values[199] = 70000.0F;
  EXPECT_EQ(overflows_of<f16>(values, PrefillMode::kWindowed, KeepWindow{{4, 12}}), 4);
}

TEST(KvCache, ASequenceSeesTheSameWhateverThePhaseOfTheOthers) {
  // Four speculated tokens beside a prompt of 80, and alone.
  Model model = mixed_model(PrefillMode::kChunkCausal, 4);
  const SequenceId speculates = model.add();
  const SequenceId prompts = model.add();
  model.add_tokens(speculates, new_tokens(60), Phase::kPrompt);
  model.add_tokens(prompts, new_tokens(90), Phase::kPrompt);
  Step step;
  const auto seen = [&](std::size_t chunk) {
    std::vector<test::SeenCopy> copies;
    for (int l = 0; l < 3; ++l) {
      for (int h = 0; h < test::mixed_shape().layer(l).num_kv_heads; ++h) {
        copies.push_back(test::copy_of(model.cache.seen(step.chunks()[chunk], l, h)));
      }
    }
    return copies;
  };
  ASSERT_EQ(model.cache.begin(step, {{speculates, 4, Phase::kDecode}}), StepStatus::kOk);
  const auto alone = seen(0);
  ASSERT_EQ(model.cache.begin(step, {{prompts, 80, Phase::kPrompt}}), StepStatus::kOk);
  const auto prompt_alone = seen(0);
  ASSERT_EQ(
      model.cache.begin(step, {{prompts, 80, Phase::kPrompt}, {speculates, 4, Phase::kDecode}}),
      StepStatus::kOk);
  EXPECT_EQ(seen(1), alone);
  EXPECT_EQ(seen(0), prompt_alone);
  EXPECT_NE(alone[1].window, Window::everything());  // a streaming head decodes by its window
  EXPECT_EQ(prompt_alone[1].window, Window::everything());
}

TEST(KvCache, ErrorsComeFromThePartThatKnows) {
  using ::testing::AllOf;
  using ::testing::HasSubstr;
  using ::testing::ThrowsMessage;
  const ModelShape shape = ModelShape::uniform(1, 1, 1, 16);
  EXPECT_THAT([&] { (KvCache<>(shape, HeadPlan(shape), {})); },
              ThrowsMessage<ConfigError>(AllOf(HasSubstr("max_context"), HasSubstr("got 0"))));
  EXPECT_THAT(
      [&] {
        (KvCache<>(shape, HeadPlan(shape, KeepGrowingWindow{4, 8, 5}),
                   {.max_context = 100, .max_rollback = 9, .prefill = PrefillMode::kChunkCausal}));
      },
      ThrowsMessage<ConfigError>(HasSubstr("min_recent")));
}

#if HEADWISE_HARDENED
TEST(KvCache, FreedAndUnwrittenRowsAreNan) {
  const ModelShape shape = ModelShape::uniform(1, 1, 1, 16);
  CacheOptions options = test::mixed_options(PrefillMode::kWindowed, 0);
  Model model(shape, HeadPlan(shape), options);
  const SequenceId id = model.add();
  model.add_tokens(id, new_tokens(20), Phase::kPrompt);
  const StepChunk chunk{id, {20, 20, 21}, 0};
  const auto view = model.cache.seen(chunk, 0, 0).view;
  const auto* page = reinterpret_cast<const f16*>(view.page_of(Slot{16}));
  const PageShape rows{16, 16, 16};
  EXPECT_FALSE(std::isnan(to_float(page[TiledRows<f16>::k_offset(rows, 3, 0)])));
  EXPECT_TRUE(std::isnan(to_float(page[TiledRows<f16>::k_offset(rows, 4, 0)])));
  EXPECT_TRUE(std::isnan(to_float(page[TiledRows<f16>::v_offset(rows, 15, 15)])));
  model.release(id);
  EXPECT_TRUE(std::isnan(to_float(page[TiledRows<f16>::k_offset(rows, 3, 0)])));
  EXPECT_TRUE(std::isnan(to_float(page[TiledRows<f16>::v_offset(rows, 0, 0)])));
}
#endif

#if HEADWISE_HARDENED && GTEST_HAS_DEATH_TEST
TEST(KvCache, EntriesAndLayersThatNobodyBeganAreCaughtInHardenedBuilds) {
  Model model = mixed_model(PrefillMode::kWindowed, 6);
  const SequenceId id = model.add();
  EXPECT_DEATH((void)model.cache.seen(StepChunk{}, 0, 0), "no sequence");
  const StepChunk beyond{SequenceId{99}, {}, 0, Phase::kDecode};
  EXPECT_DEATH((void)model.cache.seen(beyond, 0, 0), "no sequence");
  const StepChunk of_empty{id, {5, 5, 6}, 0, Phase::kDecode};
  EXPECT_DEATH((void)model.cache.seen(of_empty, 0, 0), "no page tables");
  EXPECT_DEATH((void)model.cache.rows_seen(99, of_empty), "class out of range");
  const Step never;
  EXPECT_DEATH(never.note_head_done(0), "never begun");
  ASSERT_EQ(model.begin({{id, new_tokens(3)}}, Phase::kPrompt), StepStatus::kOk);
  EXPECT_DEATH(model.step.note_head_done(3), "layer out of range");
  ASSERT_EQ(model.cache.drop(model.step), StepStatus::kOk);
  EXPECT_DEATH(model.append_layer(0), "not open");
}
#endif

TEST(KvCache, ARecycledSequenceSeesNothingOfTheFormerOne) {
  for (const PrefillMode prefill : {PrefillMode::kWindowed, PrefillMode::kChunkCausal}) {
    Model model = mixed_model(prefill, 6);
    for (const std::int64_t length : {130, 1, 60, 5, 200, 17, 0, 31, 300}) {
      const SequenceId id = model.add();
      EXPECT_EQ(model.cache.length(id), 0);
      EXPECT_EQ(model.cache.high_water(id), 0);
      ASSERT_TRUE(model.matches());
      model.add_tokens(id, new_tokens(length), Phase::kPrompt);
      model.add_tokens(id, new_tokens(1), Phase::kDecode);
      ASSERT_TRUE(model.matches());
      EXPECT_EQ(test::seen_by_next(model.cache, id, Phase::kDecode),
                model.never_seen(id, Phase::kDecode));
      model.release(id);
      EXPECT_EQ(model.cache.held_bytes(id), 0U);
      EXPECT_EQ(model.cache.pages_in_use(), 0);
    }
  }
}

}  // namespace
}  // namespace headwise
