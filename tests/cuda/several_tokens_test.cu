// SPDX-License-Identifier: MIT
// Steps of a few tokens, and groups of any size: decode for several query rows of a KV head.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "cuda/device_model.cuh"

namespace headwise::test {
namespace {

template <class Row>
class CudaSeveralTokens : public ::testing::Test {};
TYPED_TEST_SUITE(CudaSeveralTokens, DeviceRows);

TYPED_TEST(CudaSeveralTokens, EveryGroupEqualsTheOracle) {
  for (const int group : {1, 3, 8, 9, 12, 16, 17, 31, 32, 33, 48, 64, 65, 100, 127, 128}) {
    SCOPED_TRACE("group " + std::to_string(group));
    DeviceModel<TypeParam> model({.dim = 128, .group_size = group, .max_context = 1024});
    if (!has_device()) continue;
    const SequenceId id = model.add();
    model.step({{id, 333}}, Phase::kPrompt, 2);
    model.step({{id, 1}}, Phase::kDecode);
    for (const std::int64_t n : {2, 4}) model.step({{id, n}}, Phase::kDecode);
    model.step({{id, 1}}, Phase::kDecode);
  }
  HEADWISE_NEEDS_DEVICE();
}

TYPED_TEST(CudaSeveralTokens, EveryWidthAndNumberOfTokensEqualsTheOracle) {
  for (const int dim : {32, 64, 80, 96, 128, 256}) {
    for (const int group : {1, 4, 5}) {
      SCOPED_TRACE("width " + std::to_string(dim) + " group " + std::to_string(group));
      DeviceModel<TypeParam> model({.dim = dim, .group_size = group, .max_context = 2048});
      if (!has_device()) continue;
      const SequenceId id = model.add();
      for (const std::int64_t n : {2, 3, 7, 8, 9, 12, 13, 16, 17, 31, 32, 33, 63, 64, 65}) {
        model.step({{id, n}}, Phase::kDecode, 24);
      }
    }
  }
  HEADWISE_NEEDS_DEVICE();
}

/// Lengths around sinks, windows and pages, in place and on a second ring, either phase and mode.
TYPED_TEST(CudaSeveralTokens, EveryBoundaryLengthEqualsTheOracle) {
  for (const Window window : {Window{4, 60}, Window{60, 4}, Window{0, 65}, Window{64, 1}}) {
    for (const std::int64_t rollback : {0, 16}) {
      for (const PrefillMode mode : {PrefillMode::kWindowed, PrefillMode::kChunkCausal}) {
        SCOPED_TRACE(std::to_string(window.sink) + "+" + std::to_string(window.recent) +
                     " rollback " + std::to_string(rollback));
        DeviceModel<TypeParam> model({.group_size = 4,
                                      .window = window,
                                      .max_context = 512,
                                      .max_rollback = rollback,
                                      .prefill = mode});
        if (!has_device()) continue;
        for (const std::int64_t past : {0, 1, 3, 4, 5, 59, 63, 64, 65, 66, 127, 128, 129, 131}) {
          for (const std::int64_t n : {2, 5, 16}) {
            SCOPED_TRACE(past);
            const SequenceId id = model.add();
            if (past > 0) model.step({{id, past}}, Phase::kPrompt, 1);
            model.step({{id, n}}, n == 5 ? Phase::kPrompt : Phase::kDecode);
            model.step({{id, n}}, Phase::kDecode, 3);
            model.step({{id, 1}}, Phase::kDecode);
            model.release(id);
          }
        }
      }
    }
  }
  HEADWISE_NEEDS_DEVICE();
}

/// One, a few, many tokens and a chunk for prefill in one step: a launch for each kind.
TYPED_TEST(CudaSeveralTokens, MixedStepsEqualTheOracle) {
  DeviceModel<TypeParam> model({.dim = 128,
                                .group_size = 4,
                                .num_kv_heads = 4,
                                .num_layers = 2,
                                .window = {16, 100},
                                .max_context = 3000,
                                .max_sequences = 7});
  HEADWISE_NEEDS_DEVICE();
  std::vector<SequenceId> ids;
  std::vector<SequenceChunk> chunks;
  for (const std::int64_t n : {1, 15, 16, 200, 1500, 2500, 64}) {
    ids.push_back(model.add());
    chunks.push_back({ids.back(), n});
  }
  model.step(chunks, Phase::kPrompt, 2);
  model.step({{ids[0], 1}, {ids[5], 3}, {ids[1], 8}, {ids[2], 0}, {ids[3], 16}, {ids[4], 40}},
             Phase::kDecode, 16);
  model.step({{ids[6], 2}, {ids[5], 16}, {ids[0], 7}, {ids[4], 4}, {ids[3], 1}}, Phase::kDecode);
}

/// Many tiles for each worker of each block.
TYPED_TEST(CudaSeveralTokens, LongSequencesAreSharedByBlocks) {
  DeviceModel<TypeParam> model(
      {.dim = 128, .group_size = 4, .window = {64, 256}, .max_context = 100000});
  HEADWISE_NEEDS_DEVICE();
  const SequenceId id = model.add();
  for (int i = 0; i < 9; ++i) model.step({{id, 10007}}, Phase::kPrompt, 1);
  for (const std::int64_t n : {2, 4, 8, 16}) model.step({{id, n}}, Phase::kDecode, 1);
}

TYPED_TEST(CudaSeveralTokens, LargeBatchesFillAllWorkers) {
  for (const int group : {4, 9, 32, 64}) {
    SCOPED_TRACE("group " + std::to_string(group));
    DeviceModel<TypeParam> model({.dim = 64,
                                  .group_size = group,
                                  .num_kv_heads = 2,
                                  .window = {16, 500},
                                  .max_context = 2100,
                                  .max_sequences = 24});
    if (!has_device()) continue;
    std::vector<SequenceChunk> prompts;
    std::vector<SequenceChunk> tokens;
    for (int i = 0; i < 24; ++i) {
      const SequenceId id = model.add();
      prompts.push_back({id, 600 + i * 397 % 1400});
      tokens.push_back({id, group == 4 ? 2 + i % 15 : 1});
    }
    model.step(prompts, Phase::kPrompt, 1);
    model.step(tokens, Phase::kDecode, 1);
  }
  HEADWISE_NEEDS_DEVICE();
}

TYPED_TEST(CudaSeveralTokens, ManyShortSequencesAreOneWorkersEach) {
  DeviceModel<TypeParam> model({.dim = 64,
                                .group_size = 2,
                                .num_kv_heads = 8,
                                .window = {16, 64},
                                .max_context = 256,
                                .max_sequences = 96});
  HEADWISE_NEEDS_DEVICE();
  std::vector<SequenceChunk> prompts;
  std::vector<SequenceChunk> tokens;
  for (int i = 0; i < 96; ++i) {
    const SequenceId id = model.add();
    prompts.push_back({id, 1 + i * 37 % 200});
    tokens.push_back({id, 1 + i * 5 % 32});
  }
  model.step(prompts, Phase::kPrompt, 1);
  model.step(tokens, Phase::kDecode, 4);
}

TYPED_TEST(CudaSeveralTokens, HiddenRowsContributeNothing) {
  for (const int dim : {64, 80, 128, 256}) {
    for (const int group : {1, 4}) {
      for (const float value : {kInf, kNan, -1e6F}) {
        SCOPED_TRACE("width " + std::to_string(dim) + ", group " + std::to_string(group));
        DeviceModel<TypeParam> model({.dim = dim, .group_size = group, .max_context = 512});
        if (!has_device()) continue;
        const SequenceId id = model.add();
        // The last token's own row, a row that leaves the window during the step, one that left.
        model.plant_v(20, value);
        model.plant_v(7, value);
        model.plant_k(21, kNan);
        model.step({{id, 73}}, Phase::kPrompt, 1);
        model.plant_v(15, value);
        model.step({{id, 16}}, Phase::kDecode);
        model.plant_v(5, value);
        model.plant_k(9, value);
        model.step({{id, 10}}, Phase::kDecode);
      }
    }
  }
  HEADWISE_NEEDS_DEVICE();
}

TYPED_TEST(CudaSeveralTokens, VisibleInfinitiesReachWhoSeesThem) {
  DeviceModel<TypeParam> model({.dim = 128, .group_size = 4, .max_context = 512});
  HEADWISE_NEEDS_DEVICE();
  const SequenceId id = model.add();
  model.plant_v(2, kInf);  // a sink: all see it
  model.step({{id, 100}}, Phase::kPrompt, 1);
  model.plant_v(0, kNan);
  for (const std::int64_t n : {4, 16}) model.step({{id, n}}, Phase::kDecode);
}

TYPED_TEST(CudaSeveralTokens, ScoresThatAreAllMinusInfinityGiveZeros) {
  DeviceModel<TypeParam> model({.dim = 128, .group_size = 4, .max_context = 512});
  HEADWISE_NEEDS_DEVICE();
  const SequenceId id = model.add();
  for (const std::int64_t n : {16, 70, 3, 16}) {
    for (std::int64_t row = 0; row < n; ++row) {
      model.plant_q(row, -1.0F);
      model.plant_k(row, kInf);
    }
    model.step({{id, n}}, Phase::kDecode);
  }
}

template <class Io>
void take_and_give() {
  DeviceModel<f16, cuda::IoDims, Io> model(
      {.group_size = 4, .max_context = 512, .max_converted_rows = 128});
  HEADWISE_NEEDS_DEVICE();
  const SequenceId id = model.add();
  model.step({{id, 100}}, Phase::kPrompt, 2);
  for (const std::int64_t n : {1, 2, 4, 7, 16}) model.step({{id, n}}, Phase::kDecode);
}
TEST(CudaSeveralTokensIo, FloatsAreTakenAndGiven) { take_and_give<f32>(); }
TEST(CudaSeveralTokensIo, OtherHalvesAreTakenAndGiven) { take_and_give<bf16>(); }

TEST(CudaSeveralTokensGraph, StaysRightForStepsOfTheSameTokens) {
  DeviceModel<f16> model({.group_size = 4,
                          .num_kv_heads = 3,
                          .num_layers = 2,
                          .max_context = 2000,
                          .max_sequences = 4,
                          .most_rows = 400});
  HEADWISE_NEEDS_DEVICE();
  std::vector<SequenceId> ids;
  for (const std::int64_t n : {40, 300, 63}) {
    ids.push_back(model.add());
    model.step({{ids.back(), n}}, Phase::kPrompt, 1);
  }
  cudaGraphExec_t graph = nullptr;
  for (int i = 0; i < 40; ++i) {
    std::rotate(ids.begin(), ids.begin() + 1, ids.end());
    const std::vector<SequenceChunk> chunks{{ids[0], 4}, {ids[1], 1}, {ids[2], 9}};
    model.begin(chunks, Phase::kDecode);
    if (graph == nullptr) graph = model.capture();
    model.replay(graph, chunks);
  }
  cudaGraphExecDestroy(graph);
}

}  // namespace
}  // namespace headwise::test
