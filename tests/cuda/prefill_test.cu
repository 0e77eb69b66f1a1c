// SPDX-License-Identifier: MIT
// Prefill at the edges that its kernels introduce: tiles of 128 query rows, blocks of keys, windows
// smaller than a block, chunks that cross the sinks, more tiles than a launch has blocks.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "cuda/device_model.cuh"

namespace headwise::test {
namespace {

/// A past of each length, then a chunk of each length.
template <class Row>
void check_chunks(DeviceModelOptions options, const std::vector<std::int64_t>& pasts,
                  const std::vector<std::int64_t>& chunks) {
  options.max_context = 1024;
  for (const std::int64_t past : pasts) {
    for (const std::int64_t chunk : chunks) {
      SCOPED_TRACE("past " + std::to_string(past) + " chunk " + std::to_string(chunk));
      DeviceModel<Row> model(options);
      if (!has_device()) continue;
      const SequenceId id = model.add();
      if (past > 0) model.step({{id, past}}, Phase::kPrompt, 1);
      model.step({{id, chunk}}, Phase::kPrompt, 9);
    }
  }
}

TEST(CudaPrefill, SeesTheSameAtTheEdgesOfTiles) {
  // 128 rows are 128, 32, 25 or 10 tokens.
  check_chunks<bf16>({.dim = 128, .group_size = 1, .window = {16, 64}}, {0, 100},
                     {127, 128, 129, 257});
  check_chunks<f16>({.dim = 128, .group_size = 4, .window = {64, 256}}, {0, 2, 320},
                    {2, 31, 32, 33, 65});
  check_chunks<bf16>({.dim = 64, .group_size = 5, .window = {4, 60}}, {0, 70}, {24, 25, 26});
  check_chunks<f16>({.dim = 64, .group_size = 12, .window = {4, 60}}, {0, 70}, {9, 10, 11, 21});
  HEADWISE_NEEDS_DEVICE();
}

TEST(CudaPrefill, SeesTheSameAtTheEdgesOfKeyBlocks) {
  for (const Window window : {Window{0, 1}, Window{0, 63}, Window{1, 64}, Window{3, 20},
                              Window{32, 32}, Window{63, 65}, Window{100, 30}, Window{64, 128}}) {
    SCOPED_TRACE(std::to_string(window.sink) + "+" + std::to_string(window.recent));
    for (const PrefillMode mode : {PrefillMode::kWindowed, PrefillMode::kChunkCausal}) {
      check_chunks<f16>({.dim = 64, .group_size = 4, .window = window, .prefill = mode},
                        {0, 2, 62, 63, 64, 129, 300}, {2, 63, 64, 66, 130});
    }
  }
  HEADWISE_NEEDS_DEVICE();
}

TEST(CudaPrefill, SeesTheSameWhereAChunkCrossesTheSinks) {
  for (const PrefillMode mode : {PrefillMode::kWindowed, PrefillMode::kChunkCausal}) {
    check_chunks<bf16>({.dim = 128, .group_size = 4, .window = {40, 24}, .prefill = mode},
                       {0, 2, 39, 40, 41, 63, 64, 65}, {2, 38, 39, 40, 41, 90});
  }
  HEADWISE_NEEDS_DEVICE();
}

TEST(CudaPrefill, DrawsMoreTilesThanALaunchHasBlocks) {
  DeviceModel<bf16> model({.dim = 64,
                           .group_size = 4,
                           .num_kv_heads = 6,
                           .num_layers = 2,
                           .window = {16, 64},
                           .max_context = 700,
                           .max_sequences = 40});
  HEADWISE_NEEDS_DEVICE();
  std::vector<SequenceChunk> chunks;
  for (int i = 0; i < 40; ++i) chunks.push_back({model.add(), 2 + i * 89 % 600});
  model.step(chunks, Phase::kPrompt, 1);
  // Again: the counter of tiles is where it began.
  for (SequenceChunk& chunk : chunks) chunk.num_tokens = 70;
  model.step(chunks, Phase::kPrompt, 1);
}

}  // namespace
}  // namespace headwise::test
