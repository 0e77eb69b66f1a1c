// SPDX-License-Identifier: MIT
// A forked sequence and its parent go their own ways, on a device as on the host.
#include <gtest/gtest.h>

#include <random>
#include <vector>

#include "cuda/device_model.cuh"

namespace headwise::test {
namespace {

TEST(CudaFork, BothHaveTheSamePastAndGoTheirOwnWays) {
  for (const std::int64_t past : {1, 63, 64, 65, 127, 128, 200, 700}) {
    SCOPED_TRACE(past);
    DeviceModel<f16> model(
        {.dim = 64, .group_size = 4, .num_layers = 2, .max_context = 1500, .max_rollback = 5});
    if (!has_device()) continue;
    const SequenceId parent = model.add();
    model.step({{parent, past}}, Phase::kPrompt, 1);
    const SequenceId child = model.fork(parent);
    for (int i = 0; i < 3; ++i) model.step({{parent, 1}, {child, 1}}, Phase::kDecode);
    model.step({{child, 90}}, Phase::kPrompt, 3);
    model.step({{parent, 7}}, Phase::kDecode);
    model.step({{parent, 1}, {child, 1}}, Phase::kDecode);
  }
  HEADWISE_NEEDS_DEVICE();
}

TEST(CudaFork, AChildOutlivesItsParentAndTheOtherWayRound) {
  DeviceModel<bf16> model({.max_context = 1500, .max_rollback = 3});
  HEADWISE_NEEDS_DEVICE();
  const SequenceId a = model.add();
  model.step({{a, 333}}, Phase::kPrompt, 1);
  const SequenceId b = model.fork(a);
  const SequenceId c = model.fork(b);
  model.release(a);
  const SequenceId d = model.add();
  model.step({{d, 500}}, Phase::kPrompt, 1);  // takes what a left
  model.step({{b, 1}, {c, 1}, {d, 1}}, Phase::kDecode);
  model.release(c);
  model.rollback(b, 332);
  model.step({{b, 40}, {d, 1}}, Phase::kPrompt, 4);
  model.step({{b, 1}, {d, 1}}, Phase::kDecode);
}

TEST(CudaFork, CapturedGraphsStayRight) {
  DeviceModel<f16> model({.group_size = 4,
                          .num_layers = 2,
                          .max_context = 2000,
                          .max_sequences = 4,
                          .most_rows = 300});
  HEADWISE_NEEDS_DEVICE();
  std::vector<SequenceId> live{model.add()};
  model.step({{live[0], 250}}, Phase::kPrompt, 1);
  cudaGraphExec_t graph = nullptr;
  for (int i = 0; i < 40; ++i) {
    std::vector<SequenceChunk> tokens;
    for (const SequenceId id : live) tokens.push_back({id, 1});
    model.begin(tokens, Phase::kDecode);
    if (graph == nullptr) graph = model.capture();
    model.replay(graph, tokens);
    if (i % 10 == 5 && live.size() < 4) live.push_back(model.fork(live[live.size() / 2]));
  }
  cudaGraphExecDestroy(graph);
}

}  // namespace
}  // namespace headwise::test
