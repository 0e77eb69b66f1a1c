// SPDX-License-Identifier: MIT
// A device cache over many steps: growth, rings, rollback, ragged batches, recycled sequences.
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

#include "cuda/device_model.cuh"

namespace headwise::test {
namespace {

TEST(CudaCache, RefusesWhatTheDeviceCannotHold) {
  const ModelShape shape = ModelShape::uniform(1, 2, 2, 64);
  const HeadPlan plan(shape);
  const auto refused = [&](const ModelShape& s, const HeadPlan& p, CacheOptions options) {
    EXPECT_THROW(cuda::DeviceCache<f16>(s, p, options), ConfigError);
  };
  refused(shape, plan, {.page_tokens = 32, .max_context = 100});
  refused(shape, plan, {.max_context = std::int64_t{1} << 31});
  refused(ModelShape({{2, 1, 64, 128}}), plan, {.max_context = 100});
  refused(shape, HeadPlan(shape, KeepWindowFrom{{{4, 60}}, 90}), {.max_context = 100});
  LayerShape shared = shape.layer(0);
  shared.kv_layer = 0;
  const ModelShape two({shape.layer(0), shared});
  refused(two, HeadPlan(two), {.max_context = 100});
}

TEST(CudaCache, KeepsTheSmallerOfALayersOwnWindowAndItsBudget) {
  LayerShape local = ModelShape::uniform(1, 2, 2, 64).layer(0);
  local.sliding_window = 60;
  const ModelShape shape({local});
  const CacheGeometry geometry(shape, HeadPlan(shape), {.max_context = 1000},
                               &PlainRows<f16>::page_bytes);
  EXPECT_EQ(geometry.bytes_held(1000, 1000), 2 * PlainRows<f16>::page_bytes({64, 64, 64}));
  HEADWISE_NEEDS_DEVICE();
  EXPECT_NO_THROW(cuda::DeviceCache<f16>(shape, HeadPlan(shape), {.max_context = 1000}));
}

TEST(CudaCache, DecodesAtEveryBoundaryLength) {
  DeviceModel<f16> model({.group_size = 4, .max_context = 300, .max_rollback = 3});
  HEADWISE_NEEDS_DEVICE();
  const SequenceId id = model.add();
  for (int i = 0; i < 300; ++i) model.step({{id, 1}}, Phase::kDecode);
}

TEST(CudaCache, GivesTheSameForEveryChunkingOfAPrompt) {
  for (const PrefillMode mode : {PrefillMode::kWindowed, PrefillMode::kChunkCausal}) {
    for (const std::int64_t chunk : {2, 63, 64, 65, 100, 128, 200, 517}) {
      SCOPED_TRACE(chunk);
      DeviceModel<bf16> model({.group_size = 2, .max_rollback = 5, .prefill = mode});
      HEADWISE_NEEDS_DEVICE();
      const SequenceId id = model.add();
      for (int i = 0; i < 4; ++i) model.step({{id, chunk}}, Phase::kPrompt, 12);
      model.step({{id, 1}}, Phase::kPrompt);
      model.step({{id, 1}}, Phase::kDecode);
      model.step({{id, 9}}, Phase::kDecode);
      model.step({{id, 1}}, Phase::kDecode);
    }
  }
}

TEST(CudaCache, RollsBackAcrossAWrap) {
  DeviceModel<f16> model({.max_context = 2000, .max_rollback = 9});
  HEADWISE_NEEDS_DEVICE();
  const SequenceId id = model.add();
  std::mt19937 random(3);
  std::int64_t length = 0;
  std::int64_t high_water = 0;
  for (int i = 0; i < 120; ++i) {
    if (random() % 3 == 0) {
      const std::int64_t lowest = std::max<std::int64_t>(0, high_water - 9);
      length = lowest + static_cast<std::int64_t>(random()) % (length - lowest + 1);
      model.rollback(id, length);
    }
    const std::int64_t n = random() % 4 == 0 ? 1 + static_cast<std::int64_t>(random() % 40) : 1;
    model.step({{id, n}}, Phase::kDecode, 6);
    length += n;
    high_water = std::max(high_water, length);
  }
}

TEST(CudaCache, ServesARaggedBatch) {
  DeviceModel<f16> model({.dim = 128,
                          .group_size = 4,
                          .num_kv_heads = 4,
                          .num_layers = 2,
                          .window = {64, 256},
                          .max_sequences = 8});
  HEADWISE_NEEDS_DEVICE();
  std::vector<SequenceId> ids;
  std::vector<SequenceChunk> prompts;
  for (const std::int64_t n : {1, 2, 63, 64, 65, 321, 1500, 3000}) {
    ids.push_back(model.add());
    prompts.push_back({ids.back(), n});
  }
  model.step(prompts, Phase::kPrompt, 2);
  for (int i = 0; i < 3; ++i) {
    std::vector<SequenceChunk> tokens;
    for (const SequenceId id : ids) tokens.push_back({id, 1});
    model.step(tokens, Phase::kDecode);
  }
  // Chunks and single tokens together, and a sequence that waits.
  model.step({{ids[3], 1}, {ids[0], 70}, {ids[6], 0}, {ids[1], 1}}, Phase::kPrompt, 3);
}

/// A prompt of length_of(i) tokens for each of `count` sequences, then a token for each.
template <class RowT, class LengthOf>
void prompt_and_decode(DeviceModel<RowT>& model, int count, LengthOf length_of) {
  std::vector<SequenceChunk> prompts;
  std::vector<SequenceChunk> tokens;
  for (int i = 0; i < count; ++i) {
    const SequenceId id = model.add();
    prompts.push_back({id, length_of(i)});
    tokens.push_back({id, 1});
  }
  model.step(prompts, Phase::kPrompt, 1);
  model.step(tokens, Phase::kDecode);
}

TEST(CudaCache, KeepsManySmallHeadsApart) {
  // More items than warps of the grid, most of them a few tiles.
  DeviceModel<f16> model({.dim = 64,
                          .num_kv_heads = 32,
                          .window = {16, 64},
                          .first_streams = true,
                          .max_context = 256,
                          .max_sequences = 96});
  HEADWISE_NEEDS_DEVICE();
  ASSERT_GT(model.attention().launches().layout().cut_items, 0) << "they do not fit";
  prompt_and_decode(model, 96, [](int i) { return 1 + i * 37 % 200; });
}

TEST(CudaCache, CutsMoreItemsThanSharedMemoryLists) {
  // 200 sequences x 32 heads could be 6400 items: see LaunchLayout.
  DeviceModel<f16> model({.dim = 32,
                          .num_kv_heads = 32,
                          .window = {16, 64},
                          .first_streams = true,
                          .max_context = 256,
                          .max_sequences = 200});
  HEADWISE_NEEDS_DEVICE();
  ASSERT_EQ(model.attention().launches().layout().cut_items, 0) << "they fit";
  prompt_and_decode(model, 40, [](int i) { return 1 + i * 41 % 210; });
}

TEST(CudaCache, KeepsManyLongHeadsApart) {
  // Several heads a block of the grid, each longer than what one warp does: all but a block's last
  // one are merged while the next is under way.
  DeviceModel<bf16> model({.dim = 128,
                           .num_kv_heads = 8,
                           .window = {16, 128},
                           .max_context = 512,
                           .max_sequences = 90});
  HEADWISE_NEEDS_DEVICE();
  prompt_and_decode(model, 90, [](int i) { return 190 + i * 53 % 300; });
}

TEST(CudaCache, RecyclesPagesAndSequences) {
  DeviceModel<bf16> model({.max_context = 700, .max_sequences = 3});
  HEADWISE_NEEDS_DEVICE();
  std::mt19937 random(5);
  std::vector<SequenceId> live;
  for (int i = 0; i < 30; ++i) {
    if (live.size() == 3) {
      const auto gone = live.begin() + static_cast<std::ptrdiff_t>(random() % 3);
      model.release(*gone);
      live.erase(gone);
    }
    live.push_back(model.add());
    model.step({{live.back(), 1 + static_cast<std::int64_t>(random() % 300)}}, Phase::kPrompt, 2);
    std::vector<SequenceChunk> tokens;
    for (const SequenceId id : live) tokens.push_back({id, 1});
    model.step(tokens, Phase::kDecode);
  }
}

TEST(CudaCache, LeavesNoTraceOfADroppedStep) {
  DeviceModel<f16> model({.max_context = 1000, .max_rollback = 4});
  HEADWISE_NEEDS_DEVICE();
  const SequenceId id = model.add();
  model.step({{id, 300}}, Phase::kPrompt, 2);
  for (const std::int64_t n : {1, 50, 300}) {
    model.begin({{id, n}}, Phase::kPrompt);
    ASSERT_EQ(model.attention().plan_work(model.stream()), StepStatus::kOk);
    ASSERT_EQ(model.attend(0), StepStatus::kOk);
    ASSERT_EQ(model.cache().drop(model.open_step()), StepStatus::kOk);
    model.step({{id, 1}}, Phase::kDecode);
  }
}

TEST(CudaCache, GivesTheSameBitsForTheSameBatch) {
  std::vector<std::vector<std::uint16_t>> outs;
  for (int run = 0; run < 2; ++run) {
    DeviceModel<f16> model({.dim = 128, .group_size = 4, .num_kv_heads = 4, .max_context = 3000});
    HEADWISE_NEEDS_DEVICE();
    const SequenceId id = model.add();
    model.step({{id, 2500}}, Phase::kPrompt, 1);
    model.step({{id, 1}}, Phase::kDecode);
    outs.emplace_back(16 * 128);
    ASSERT_EQ(
        cudaMemcpy(outs.back().data(), model.out(0).data, 16 * 128 * 2, cudaMemcpyDeviceToHost),
        cudaSuccess);
  }
  EXPECT_EQ(outs[0], outs[1]);
}

}  // namespace
}  // namespace headwise::test
