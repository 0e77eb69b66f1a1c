// SPDX-License-Identifier: MIT
// Scratch is reserved once and is then enough for every step, whatever its
// chunks.
#include "headwise/attention/scratch.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "headwise/attention/attend.hpp"
#include "headwise/attention/work.hpp"
#include "headwise/cache/estimate.hpp"
#include "support/attend_models.hpp"

namespace headwise {
namespace {

using test::AttendedCache;
using test::below;
using test::Chunks;
using test::new_tokens;
using test::Outputs;

CacheGeometry geometry(int max_sequences, std::int64_t max_context, std::int64_t max_chunk) {
  const ModelShape shape = ModelShape::uniform(2, 32, 8, 128);
  const CacheOptions options{
      .max_sequences = max_sequences, .max_context = max_context, .max_chunk = max_chunk};
  return {shape, HeadPlan(shape), options, &FormatOf<f16>::page_bytes};
}

TEST(ScratchBytes, GrowWithThreadsBySoMuchEach) {
  const CacheGeometry small = geometry(1, 4096, 1);
  const std::size_t thread = prefill_scratch_floats(4, 128, 128) * sizeof(float);
  EXPECT_EQ(scratch_bytes(small, 2) - scratch_bytes(small, 1), thread);
  EXPECT_EQ(scratch_bytes(small, 9) - scratch_bytes(small, 2), 7 * thread);
}

TEST(ScratchBytes, HaveNoPartialResultsWhereNothingIsSplit) {
  const std::size_t thread = prefill_scratch_floats(4, 128, 128) * sizeof(float);
  EXPECT_LT(scratch_bytes(geometry(1, kSplitRows, 2048), 1), thread + 10000);
}

TEST(ScratchBytes, OfPartialResultsAreBoundedHoweverLongTheContextAndTheChunk) {
  const std::int64_t of_a_head =
      kMaxPartialRows * (128 + 2 + 30) * 4;  // rows, max and sum, padding
  EXPECT_LT(scratch_bytes(geometry(1, 1 << 30, 512), 1),
            static_cast<std::size_t>(8 * of_a_head) + 2000000);
}

TEST(ScratchBytes, RefuseWhatMakesNoSense) {
  EXPECT_THROW((void)scratch_bytes(geometry(1, 100, 1), 0), ConfigError);
}

TEST(ScratchBytes, RefuseWhatDoesNotFit64Bits) {
  // Products that would wrap to 0: a share of each of two layers, floats of each thread.
  EXPECT_THROW((void)scratch_bytes(geometry(1, 100, 1), std::size_t{1} << 63), ConfigError);
  // Tasks of 8 heads in 2^30 sequences of 2^40 tokens.
  const ModelShape shape = ModelShape::uniform(1, 8, 8, 16);
  const CacheOptions options{
      .max_bytes = 1 << 20, .max_sequences = 1 << 30, .max_context = kMaxTokens};
  const CacheGeometry largest(shape, HeadPlan(shape), options, &FormatOf<f16>::page_bytes);
  EXPECT_THROW((void)scratch_bytes(largest, 1), ConfigError);
  EXPECT_THROW((void)WorkSize::of_largest_step(largest), ConfigError);
}

/// Threads of an engine's own, which each take a share of every layer.
template <class Model>
StepStatus attend_in_shares(const Model& model, int layer, typename Model::Inputs& in,
                            std::size_t nth) {
  return model.with_tensors(layer, in, [&](auto... tensors) {
    StepStatus status = StepStatus::kOk;
    for (std::size_t ith = 0; ith < nth && status == StepStatus::kOk; ++ith) {
      status = attend_share(model.cache, model.step, layer, tensors..., ith, nth);
    }
    return status;
  });
}

/// One step of `chunks` after the scratch was reserved for the largest of them;
/// its outputs are compared with the oracle.
template <class Model>
void run_reserved(Model& model, const ModelShape& shape, const Chunks& chunks, Phase phase,
                  std::size_t nth, std::size_t reserved) {
  const std::vector<std::vector<double>> expected = model.oracle(chunks, phase);
  ASSERT_EQ(model.begin(chunks, phase), StepStatus::kOk);
  ASSERT_EQ(plan_work(model.cache, model.step, nth), StepStatus::kOk);
  ASSERT_EQ(model.step.scratch().num_bytes(), reserved);
  std::vector<Outputs> out;
  for (int l = 0; l < shape.num_layers(); ++l) {
    auto in = model.inputs_of(l, chunks);
    ASSERT_EQ(attend_in_shares(model, l, in, nth), StepStatus::kOk);
    out.push_back(std::move(in.out));
  }
  ASSERT_EQ(model.commit(), StepStatus::kOk);
  ASSERT_EQ(model.step.scratch().num_bytes(), reserved) << "nothing grows";
  ASSERT_LE(test::largest_difference(out, expected), 1e-5);
}

struct MixedStep {
  const char* name;
  int qo_heads, kv_heads, dim;
  std::int64_t context, past;  // of every sequence
  std::vector<std::int64_t> chunks;
};

class MixedSteps : public ::testing::TestWithParam<MixedStep> {};

TEST_P(MixedSteps, NeedNoMoreThanIsReservedForTheLargestChunk) {
  const MixedStep& mix = GetParam();
  const ModelShape shape = ModelShape::uniform(1, mix.qo_heads, mix.kv_heads, mix.dim);
  const CacheOptions options{
      .max_sequences = static_cast<int>(mix.chunks.size()),
      .max_context = mix.context,
      .max_chunk = std::max(mix.past, *std::max_element(mix.chunks.begin(), mix.chunks.end()))};
  AttendedCache<f16> model(shape, HeadPlan(shape), options);
  for (const std::size_t nth : {1U, 3U}) {
    std::vector<SequenceId> ids;
    for (std::size_t i = 0; i < mix.chunks.size(); ++i) {
      ids.push_back(model.add());
      if (mix.past > 0) model.add_tokens(ids.back(), new_tokens(mix.past), Phase::kPrompt);
    }
    Chunks chunks;
    for (std::size_t i = 0; i < ids.size(); ++i) {
      chunks.emplace_back(ids[i], new_tokens(mix.chunks[i]));
    }
    reserve_scratch(model.step, model.cache, nth);
    const std::size_t reserved = model.step.scratch().num_bytes();
    EXPECT_EQ(reserved, scratch_bytes(shape, HeadPlan(shape), options, nth));
    ASSERT_NO_FATAL_FAILURE(run_reserved(model, shape, chunks, Phase::kPrompt, nth, reserved));
    for (const SequenceId id : ids) model.release(id);
  }
}

INSTANTIATE_TEST_SUITE_P(
    Chunks, MixedSteps,
    ::testing::Values(MixedStep{"a_long_and_a_short_chunk", 1, 1, 16, 2048, 100, {385, 64}},
                      MixedStep{"a_prompt_and_three_tokens", 24, 4, 64, 1024, 0, {800, 3}},
                      MixedStep{"seven_prompts_and_four_tokens",
                                16,
                                2,
                                64,
                                1024,
                                0,
                                {512, 512, 512, 512, 512, 512, 512, 4}},
                      MixedStep{"splits_beside_tiles", 4, 1, 16, 9000, 5000, {700, 16, 1, 90, 0}},
                      MixedStep{"splits_of_tiles", 71, 1, 16, 9000, 5000, {1, 6, 2}}),
    [](const auto& mix) { return std::string(mix.param.name); });

TEST(Scratch, ReservedOnceSufficesForEveryMixOfChunksOfEveryModel) {
  std::mt19937 random(17);
  for (int round = 0; round < 12; ++round) {
    std::vector<LayerShape> layers;
    for (std::int64_t l = 0; l < 1 + below(random, 2); ++l) {
      const int groups[] = {1, 2, 5, 8, 20, 71};
      layers.push_back({static_cast<int>(1 + below(random, 3)), groups[below(random, 6)],
                        static_cast<int>(16 + 16 * below(random, 2)),
                        static_cast<int>(16 + 16 * below(random, 2))});
    }
    const ModelShape shape(layers);
    const auto mode = below(random, 2) == 0 ? PrefillMode::kWindowed : PrefillMode::kChunkCausal;
    HeadPlan plan(shape);
    for (int l = 0; l < shape.num_layers(); ++l) {
      for (int h = 0; h < shape.layer(l).num_kv_heads; ++h) {
        if (below(random, 3) == 0) plan.set(l, h, KeepWindow{{4, 1 + below(random, 4000)}});
        if (below(random, 4) == 0) {
          plan.set(l, h, KeepWindowFrom{{{4, 200}}, 1 + below(random, 6000)});
        }
        if (mode == PrefillMode::kChunkCausal && below(random, 3) == 0) {
          plan.set(l, h, KeepGrowingWindow{4, 30 + below(random, 3000), 3});
        }
      }
    }
    const int sequences = static_cast<int>(1 + below(random, 3));
    const std::int64_t context = 600 + below(random, 7000);
    const std::int64_t max_chunk = 1 + below(random, below(random, 2) == 0 ? 20 : 250);
    AttendedCache<f16> model(shape, plan,
                             {.page_tokens = 32,
                              .max_sequences = sequences,
                              .max_context = context,
                              .max_chunk = max_chunk,
                              .prefill = mode});
    std::vector<SequenceId> ids;
    for (int i = 0; i < sequences; ++i) {
      ids.push_back(model.add());
      const std::int64_t past =
          below(random, context - 2 * max_chunk > 0 ? context - 2 * max_chunk : 1);
      for (std::int64_t done = 0; done < past; done += max_chunk) {
        model.add_tokens(ids.back(), new_tokens(std::min(max_chunk, past - done)), Phase::kPrompt);
      }
    }
    const auto nth = static_cast<std::size_t>(1 + below(random, 4));
    reserve_scratch(model.step, model.cache, nth);
    const std::size_t reserved = model.step.scratch().num_bytes();
    for (int step = 0; step < 2; ++step) {
      Chunks chunks;
      for (const SequenceId id : ids) {
        std::int64_t tokens = below(random, 3) == 0 ? max_chunk : 1 + below(random, max_chunk);
        if (below(random, 6) == 0) tokens = 0;
        chunks.emplace_back(id, new_tokens(tokens));
      }
      const Phase phase = below(random, 2) == 0 ? Phase::kPrompt : Phase::kDecode;
      ASSERT_NO_FATAL_FAILURE(run_reserved(model, shape, chunks, phase, nth, reserved))
          << "round " << round;
    }
  }
}

}  // namespace
}  // namespace headwise
