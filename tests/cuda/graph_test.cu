// SPDX-License-Identifier: MIT
// A graph captured once is right for every later step.
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

#include "cuda/device_model.cuh"

namespace headwise::test {
namespace {

TEST(CudaGraph, StaysRightWhileSequencesGrowComeAndGo) {
  DeviceModel<f16> model({.group_size = 4,
                          .num_kv_heads = 3,
                          .num_layers = 3,
                          .max_context = 2500,
                          .max_sequences = 6,
                          .max_rollback = 2,
                          .most_rows = 400});
  HEADWISE_NEEDS_DEVICE();
  std::vector<SequenceId> live{model.add()};
  cudaGraphExec_t graph = nullptr;
  std::mt19937 random(7);
  for (int i = 0; i < 150; ++i) {
    std::vector<SequenceChunk> tokens;
    for (const SequenceId id : live) tokens.push_back({id, 1});
    std::shuffle(tokens.begin(), tokens.end(), random);
    model.begin(tokens, Phase::kDecode);
    if (graph == nullptr) graph = model.capture();
    model.replay(graph, tokens);
    if (random() % 5 == 0 && live.size() < 6) {
      live.push_back(model.add());
      model.step({{live.back(), 1 + static_cast<std::int64_t>(random() % 400)}}, Phase::kPrompt, 1);
    } else if (random() % 6 == 0 && live.size() > 1) {
      const auto gone = live.begin() + static_cast<std::ptrdiff_t>(random() % live.size());
      model.release(*gone);
      live.erase(gone);
    } else if (random() % 6 == 0) {
      const SequenceId id = live[random() % live.size()];
      model.rollback(id, std::max<std::int64_t>(model.cache().length(id) - 1,
                                                model.cache().high_water(id) - 2));
    }
  }
  cudaGraphExecDestroy(graph);
}

}  // namespace
}  // namespace headwise::test
