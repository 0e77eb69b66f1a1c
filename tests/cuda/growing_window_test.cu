// SPDX-License-Identifier: MIT
// Growing windows (RazorAttention) on a device: rows folded into a compensation row, and attention
// that sees it, against double over the raw rows.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "cuda/device_model.cuh"
#include "headwise/cache/cuda/fold_state.cuh"
#include "headwise/cache/keep/growing_window.hpp"

namespace headwise::test {
namespace {

template <class Row>
using GrowingModel = DeviceModel<Row, cuda::ShapedDims<Row>, Row, cuda::CompensatedSoftmax>;

/// The two widths of ShapedDims: of warpgroup prefill, and not.
template <class Row>
constexpr int kGroupWidth = std::same_as<Row, f16> ? 64 : 128;
template <class Row>
constexpr int kMmaWidth = std::same_as<Row, f16> ? 80 : 256;

/// Three kinds of heads: all, growing, and a ring.
DeviceModelOptions growing_options(int dim, KeepGrowingWindow growing) {
  return {.dim = dim,
          .group_size = 2,
          .num_kv_heads = 4,
          .growing = growing,
          .prefill = PrefillMode::kChunkCausal};
}

template <class Row>
class CudaGrowingWindow : public ::testing::Test {};
TYPED_TEST_SUITE(CudaGrowingWindow, DeviceRows);

/// Sinks that end before, at and behind a page's end.
TYPED_TEST(CudaGrowingWindow, DecodesAtEveryBoundaryLength) {
  for (const std::int64_t sink : {0, 4, 64, 70}) {
    SCOPED_TRACE(sink);
    DeviceModelOptions options = growing_options(kGroupWidth<TypeParam>, {sink, 40, 3});
    options.max_context = 420;
    GrowingModel<TypeParam> model(options);
    if (!has_device()) continue;
    const SequenceId id = model.add();
    for (int i = 0; i < 420; ++i) model.step({{id, 1}}, Phase::kDecode);
  }
  HEADWISE_NEEDS_DEVICE();
}

TYPED_TEST(CudaGrowingWindow, EveryGroupAndWidthEqualsTheOracle) {
  for (const int dim : {kGroupWidth<TypeParam>, kMmaWidth<TypeParam>}) {
    for (const int group : {1, 3, 8, 9, 16, 17, 33, 64, 100}) {
      SCOPED_TRACE("width " + std::to_string(dim) + " group " + std::to_string(group));
      DeviceModelOptions options = growing_options(dim, {4, 60, 4});
      options.group_size = group;
      options.max_context = 1024;
      GrowingModel<TypeParam> model(options);
      if (!has_device()) continue;
      const SequenceId id = model.add();
      model.step({{id, 333}}, Phase::kPrompt, 3);
      for (const std::int64_t n : {1, 2, 4, 7}) model.step({{id, n}}, Phase::kDecode);
      model.step({{id, 70}}, Phase::kPrompt, 6);
      model.step({{id, 1}}, Phase::kDecode);
    }
  }
  HEADWISE_NEEDS_DEVICE();
}

TYPED_TEST(CudaGrowingWindow, EveryChunkingOfAPromptEqualsTheOracle) {
  for (const int dim : {kGroupWidth<TypeParam>, kMmaWidth<TypeParam>}) {
    for (const std::int64_t rollback : {0, 5, 70, 200}) {
      for (const std::int64_t chunk : {33, 64, 100, 128, 517}) {
        SCOPED_TRACE("width " + std::to_string(dim) + " rollback " + std::to_string(rollback) +
                     " chunk " + std::to_string(chunk));
        DeviceModelOptions options =
            growing_options(dim, {20, std::max<std::int64_t>(40, rollback), 5});
        options.max_rollback = rollback;
        GrowingModel<TypeParam> model(options);
        if (!has_device()) continue;
        const SequenceId id = model.add();
        for (int i = 0; i < 4; ++i) model.step({{id, chunk}}, Phase::kPrompt, 8);
        model.step({{id, 1}}, Phase::kPrompt);
        model.step({{id, 1}}, Phase::kDecode);
        model.step({{id, 9}}, Phase::kDecode);
      }
    }
  }
  HEADWISE_NEEDS_DEVICE();
}

/// Long rows are shared by many blocks, and prefill tiles cut: the row is added once.
TYPED_TEST(CudaGrowingWindow, SharedRowsHaveOneCompensationRow) {
  for (const int group : {1, 4, 8}) {
    SCOPED_TRACE(group);
    DeviceModelOptions options = growing_options(kGroupWidth<TypeParam>, {64, 3000, 2});
    options.group_size = group;
    options.num_kv_heads = 2;
    options.max_context = 40000;
    options.sinks = {2.0F};
    options.soft_cap = 20.0F;
    GrowingModel<TypeParam> model(options);
    if (!has_device()) continue;
    const SequenceId id = model.add();
    for (int i = 0; i < 3; ++i) model.step({{id, 10007}}, Phase::kPrompt, 1);
    for (const std::int64_t n : {1, 2, 4, 8}) model.step({{id, n}}, Phase::kDecode, 2);
    model.step({{id, 512}}, Phase::kPrompt, 2);
  }
  HEADWISE_NEEDS_DEVICE();
}

/// One item a worker each, and sequences without tokens among those with some.
TYPED_TEST(CudaGrowingWindow, LargeBatchesEqualTheOracle) {
  for (const int group : {2, 9, 32}) {
    SCOPED_TRACE(group);
    DeviceModelOptions options = growing_options(kGroupWidth<TypeParam>, {16, 100, 4});
    options.group_size = group;
    options.num_kv_heads = 2;
    options.num_layers = 2;
    options.max_context = 1100;
    options.max_sequences = 40;
    GrowingModel<TypeParam> model(options);
    if (!has_device()) continue;
    std::vector<SequenceChunk> prompts;
    std::vector<SequenceChunk> tokens;
    for (int i = 0; i < 40; ++i) {
      const SequenceId id = model.add();
      prompts.push_back({id, 1 + i * 397 % 1000});
      tokens.push_back({id, i % 5 == 2 ? 0 : group == 2 ? 1 + i % 16 : 1});
    }
    model.step(prompts, Phase::kPrompt, 1);
    model.step(tokens, Phase::kDecode, 1);
    model.step(tokens, Phase::kDecode, 1);
  }
  HEADWISE_NEEDS_DEVICE();
}

/// A rollback behind a fold sees the row before it, and folds the pages anew.
TYPED_TEST(CudaGrowingWindow, RollsBackBehindAFold) {
  for (const std::int64_t rollback : {5, 64, 130}) {
    SCOPED_TRACE(rollback);
    DeviceModelOptions options = growing_options(kGroupWidth<TypeParam>, {4, 130, 4});
    options.max_context = 1000;
    options.max_rollback = rollback;
    GrowingModel<TypeParam> model(options);
    if (!has_device()) continue;
    const SequenceId id = model.add();
    model.step({{id, 190}}, Phase::kPrompt, 2);
    for (int i = 0; i < 12; ++i) {
      model.step({{id, 60}}, i % 2 == 0 ? Phase::kPrompt : Phase::kDecode, 3);
      const std::int64_t length = model.cache().length(id);
      const std::int64_t back =
          std::min<std::int64_t>(model.cache().max_truncate(id), 1 + i * 37 % rollback);
      model.rollback(id, length - back);
      model.step({{id, 1}}, Phase::kDecode);
      model.step({{id, 3}}, Phase::kDecode);
    }
  }
  HEADWISE_NEEDS_DEVICE();
}

/// What a dropped step folded is folded again, from the same rows.
TYPED_TEST(CudaGrowingWindow, ADroppedStepLeavesNoTrace) {
  DeviceModelOptions options = growing_options(kGroupWidth<TypeParam>, {4, 64, 4});
  options.max_rollback = 10;
  GrowingModel<TypeParam> model(options);
  HEADWISE_NEEDS_DEVICE();
  const SequenceId id = model.add();
  for (int i = 0; i < 6; ++i) {
    model.step({{id, 130}}, Phase::kPrompt, 2);
    model.begin({{id, 150}}, Phase::kPrompt);
    ASSERT_EQ(model.attention().plan_work(model.stream()), StepStatus::kOk);
    ASSERT_EQ(model.attend(0), StepStatus::kOk);
    ASSERT_EQ(model.cache().drop(model.open_step()), StepStatus::kOk);
    model.step({{id, 1}}, Phase::kDecode);
    model.step({{id, 70}}, Phase::kPrompt, 2);
  }
}

/// A fork has rows of its own, whatever becomes of its parent; so has one from a checkpoint.
TYPED_TEST(CudaGrowingWindow, ForksAndClearsEqualTheOracle) {
  DeviceModelOptions options = growing_options(kGroupWidth<TypeParam>, {4, 64, 4});
  options.max_rollback = 20;
  options.max_context = 2000;
  options.checkpoint_tokens = 300;
  GrowingModel<TypeParam> model(options);
  HEADWISE_NEEDS_DEVICE();
  const SequenceId parent = model.add();
  model.step({{parent, 400}}, Phase::kPrompt, 2);
  const SequenceId child = model.fork(parent);
  model.step({{parent, 200}}, Phase::kPrompt, 2);
  model.step({{child, 90}, {parent, 1}}, Phase::kDecode, 2);
  const SequenceId old = model.fork(parent, model.cache().reuse_limit(parent, 450).length);
  ASSERT_GT(model.cache().length(old), 0);
  model.clear(parent);
  model.step({{parent, 150}, {old, 1}}, Phase::kPrompt, 2);
  model.step({{child, 1}, {old, 100}, {parent, 130}}, Phase::kPrompt, 2);
  model.release(child);
  const SequenceId other = model.fork(old);
  model.step({{other, 70}, {old, 1}, {parent, 1}}, Phase::kPrompt, 2);
  for (int i = 0; i < 70; ++i) {
    model.step({{other, 1}, {old, 1}, {parent, 1}}, Phase::kDecode, 1);
  }
}

/// A row so heavy, or so near to the query, that all others are light beside it; and one so far
/// away that it is nothing.
TYPED_TEST(CudaGrowingWindow, DominatingAndVanishingRowsEqualTheOracle) {
  for (const int dim : {kGroupWidth<TypeParam>, kMmaWidth<TypeParam>}) {
    for (const float key : {8.0F, -8.0F, 1.0F}) {
      SCOPED_TRACE("width " + std::to_string(dim) + " key " + std::to_string(key));
      DeviceModelOptions options = growing_options(dim, {4, 64, 1000});
      options.max_context = 2000;
      GrowingModel<TypeParam> model(options);
      if (!has_device()) continue;
      const SequenceId id = model.add();
      for (std::int64_t row = 4; row < 900; ++row) model.plant_k(row, key);
      model.step({{id, 900}}, Phase::kPrompt, 1);
      for (const std::int64_t n : {70, 1, 3, 40}) {
        for (std::int64_t row = 0; row < n; ++row) model.plant_q(row, 2.0F);
        model.step({{id, n}}, Phase::kDecode, 4);
      }
    }
  }
  HEADWISE_NEEDS_DEVICE();
}

/// Infinite and NaN rows among those that are folded, and beside them.
TYPED_TEST(CudaGrowingWindow, ValuesThatAreNoNumbersEndWhereTheyAreSeen) {
  for (const float value : {kInf, kNan}) {
    for (const std::int64_t place : {1, 30, 150, 290}) {
      SCOPED_TRACE(std::to_string(value) + " at " + std::to_string(place));
      DeviceModelOptions options = growing_options(kGroupWidth<TypeParam>, {4, 64, 1000});
      options.max_context = 1000;
      GrowingModel<TypeParam> model(options);
      if (!has_device()) continue;
      const SequenceId id = model.add();
      model.plant_v(place, value);
      model.step({{id, 300}}, Phase::kPrompt, 3);
      for (const std::int64_t n : {1, 5, 80, 1}) model.step({{id, n}}, Phase::kDecode, 3);
    }
  }
  HEADWISE_NEEDS_DEVICE();
}

TYPED_TEST(CudaGrowingWindow, AGraphFoldsWhileSequencesGrow) {
  DeviceModelOptions options = growing_options(kGroupWidth<TypeParam>, {4, 70, 4});
  options.num_layers = 2;
  options.max_context = 900;
  options.max_rollback = 2;
  options.most_rows = 200;
  GrowingModel<TypeParam> model(options);
  HEADWISE_NEEDS_DEVICE();
  std::vector<SequenceId> live{model.add(), model.add()};
  model.step({{live[0], 120}, {live[1], 60}}, Phase::kPrompt, 1);
  cudaGraphExec_t graph = nullptr;
  for (int i = 0; i < 200; ++i) {
    std::vector<SequenceChunk> tokens;
    for (const SequenceId id : live) tokens.push_back({id, 1});
    model.begin(tokens, Phase::kDecode);
    if (graph == nullptr) graph = model.capture();
    model.replay(graph, tokens);
    if (i == 50) live.push_back(model.fork(live[0]));
    if (i % 7 == 3) model.rollback(live[1], model.cache().length(live[1]) - 2);
  }
  cudaGraphExecDestroy(graph);
}

TYPED_TEST(CudaGrowingWindow, EveryOutputIsTheOraclesOnRandomWalks) {
  for (unsigned seed = 1; seed <= 4; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    DeviceModelOptions options = growing_options(
        seed % 2 == 0 ? kGroupWidth<TypeParam> : kMmaWidth<TypeParam>, {seed * 20, 80, 3});
    options.max_context = 1200;
    options.max_sequences = 5;
    options.max_rollback = seed < 3 ? 20 : 75;
    GrowingModel<TypeParam> model(options, seed);
    if (!has_device()) continue;
    std::mt19937 random(seed);
    std::vector<SequenceId> live{model.add()};
    for (int i = 0; i < 120 && !::testing::Test::HasFailure(); ++i) {
      const SequenceId some = live[random() % live.size()];
      const std::int64_t length = model.cache().length(some);
      switch (random() % 9) {
        case 0:
          if (live.size() < 5) live.push_back(model.add());
          break;
        case 1:
          if (live.size() < 5) live.push_back(model.fork(some));
          break;
        case 2:
          if (live.size() > 1 && random() % 2 == 0) {
            model.release(some);
            live.erase(std::find(live.begin(), live.end(), some));
          } else if (random() % 3 == 0) {
            model.clear(some);
          }
          break;
        case 3: {
          const std::int64_t back = std::min(length - 1, model.cache().max_truncate(some));
          if (back > 0) {
            model.rollback(some, length - 1 - static_cast<std::int64_t>(random()) % back);
          }
          break;
        }
        default: {
          std::vector<SequenceChunk> chunks;
          for (const SequenceId id : live) {
            const std::int64_t room = 1200 - model.cache().length(id);
            const std::int64_t n = random() % 3 == 0 ? 1 : static_cast<std::int64_t>(random() % 90);
            chunks.push_back({id, std::min(room, n)});
          }
          if (std::all_of(chunks.begin(), chunks.end(),
                          [](const SequenceChunk& chunk) { return chunk.num_tokens == 0; })) {
            break;
          }
          model.step(chunks, random() % 2 == 0 ? Phase::kPrompt : Phase::kDecode, 4);
        }
      }
    }
  }
  HEADWISE_NEEDS_DEVICE();
}

/// Sums in float of as many rows with a mean of 3 would be wrong from the third digit on.
TYPED_TEST(CudaGrowingWindow, AMillionRowsHaveTheRightMean) {
  constexpr int kDim = kGroupWidth<TypeParam>;
  constexpr std::int64_t kChunk = 1 << 16;
  constexpr std::int64_t kTokens = 17 * kChunk;
  const ModelShape shape = ModelShape::uniform(1, 1, 1, kDim);
  const HeadPlan plan(shape, KeepGrowingWindow{4, 64, 1'000'000'000});
  CacheOptions options;
  options.max_context = kTokens;
  options.max_chunk = kChunk;
  options.max_sequences = 1;
  options.prefill = PrefillMode::kChunkCausal;
  HEADWISE_NEEDS_DEVICE();
  cuda::DeviceCache<TypeParam> cache(shape, plan, options);
  cuda::DeviceAttention<TypeParam, cuda::ShapedDims<TypeParam>, TypeParam, cuda::CompensatedSoftmax>
      attention(cache);
  const std::size_t bytes = static_cast<std::size_t>(kChunk * kDim) * sizeof(TypeParam);
  const cuda::DeviceMemory q(bytes), k(bytes), v(bytes), out(bytes);
  cuda::require(cudaMemset(q.data(), 0, bytes), "cudaMemset");
  const auto view = [&]<class T>(const cuda::DeviceMemory& memory, T*) {
    return TensorView<T>::nhd(reinterpret_cast<T*>(memory.data()), 1, kDim);
  };
  const SequenceId id = *cache.add_sequence();
  std::vector<long double> sums(2 * kDim);
  std::mt19937 random(3);
  std::int64_t done = 0;
  std::vector<TypeParam> rows[2];
  for (auto& of : rows) of.resize(static_cast<std::size_t>(kChunk * kDim));
  const auto& rule = *cache.geometry().classes()[0].rule.template get_if<GrowingWindowRule>();
  while (done < kTokens) {
    const std::int64_t fold = rule.fold(kTokens);
    for (std::size_t of = 0; of < 2; ++of) {
      for (std::size_t i = 0; i < rows[of].size(); ++i) {
        const float x = 3.0F + static_cast<float>(random() % 2000) * 1e-3F;
        rows[of][i] = from_float<TypeParam>(x);
        const std::int64_t pos = done + static_cast<std::int64_t>(i) / kDim;
        if (pos < 4 || pos >= fold) continue;
        sums[of * kDim + i % kDim] += static_cast<long double>(to_float(rows[of][i]));
      }
      cuda::require(
          cudaMemcpy((of == 0 ? k : v).data(), rows[of].data(), bytes, cudaMemcpyHostToDevice),
          "cudaMemcpy");
    }
    Step step;
    ASSERT_EQ(cache.begin(step, {{id, kChunk, Phase::kPrompt}}), StepStatus::kOk);
    ASSERT_EQ(attention.plan_work(nullptr), StepStatus::kOk);
    const TypeParam* in = nullptr;
    TypeParam* to = nullptr;
    ASSERT_EQ(
        attention.attend(step, 0, view(q, in), view(k, in), view(v, in), view(out, to), nullptr),
        StepStatus::kOk);
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    ASSERT_EQ(cache.commit(step), StepStatus::kOk);
    done += kChunk;
  }
  const AnyKeepState& kept = cache.books().keep_state(id.index, 0);
  const FoldedRows folded = cache.geometry().classes()[0].rule.folded(kept, kTokens);
  ASSERT_GT(folded.count, 1'000'000);
  std::vector<float> means(2 * kDim);
  const std::size_t row_bytes = 2 * kDim * (sizeof(double) + sizeof(float));
  ASSERT_EQ(
      cudaMemcpy(means.data(),
                 cache.place().folded(0).sums + static_cast<std::size_t>(folded.row) * row_bytes +
                     2 * kDim * sizeof(double),
                 means.size() * sizeof(float), cudaMemcpyDeviceToHost),
      cudaSuccess);
  for (std::size_t d = 0; d < means.size(); ++d) {
    const auto wanted = static_cast<double>(sums[d] / static_cast<long double>(folded.count));
    ASSERT_NEAR(static_cast<double>(means[d]), wanted, 1e-5 * wanted) << d;
  }
}

// Without a device -------------------------------------------------------------------------------

/// Rows as the device makes them, with positions in place of K and V, hold what the rule asks for
/// at every length in reach, whatever the steps were.
TEST(CudaFoldState, ListsOfFoldsMakeTheRowsThatTheRuleNames) {
  std::mt19937 random(5);
  for (const std::int64_t rollback : {0, 1, 63, 64, 65, 200}) {
    for (const std::int64_t sink : {0, 4, 64, 100}) {
      const GrowingWindowRule rule = GrowingWindowRule::make(
          {sink, 200, 3}, {64, 30000, rollback, 30000, PrefillMode::kChunkCausal});
      const auto most = static_cast<std::int32_t>(rule.compensation_rows() / 2);
      std::vector<std::int64_t> rows(static_cast<std::size_t>(2 * most));
      std::vector<cuda::RowFold> folds(static_cast<std::size_t>(most) + 3);
      GrowingWindowRule::State state{};
      std::int64_t length = 0;
      std::int64_t high_water = 0;
      for (int i = 0; i < 300 && length < 28000; ++i) {
        if (random() % 3 == 0) {
          const std::int64_t lowest = std::max<std::int64_t>(0, high_water - rollback);
          if (length > lowest)
            length -= static_cast<std::int64_t>(random()) % (length - lowest + 1);
        }
        const auto most_tokens = random() % 4 == 0 ? 1500U : 70U;
        const std::int64_t tokens = 1 + static_cast<std::int64_t>(random() % most_tokens);
        const StepLengths lengths{length, high_water, length + tokens};
        const cuda::FoldState listed =
            cuda::fold_state(rule, state, lengths, 7, folds.data(), 3, most);
        EXPECT_EQ(listed.place, 7);
        EXPECT_EQ(listed.first_fold, 3);
        ASSERT_LE(listed.num_folds, most);
        EXPECT_EQ(listed.seen_row >= 0, rule.fold(length) > 0);
        for (std::int32_t f = 0; f < listed.num_folds; ++f) {
          const cuda::RowFold& fold = folds[static_cast<std::size_t>(3 + f)];
          std::int64_t sum = fold.from < 0 ? 0 : rows[static_cast<std::size_t>(fold.from)];
          for (std::int64_t pos = fold.first_entry * 64 + fold.first_row; pos < fold.end_entry * 64;
               ++pos) {
            sum += pos;
          }
          rows[static_cast<std::size_t>(fold.to)] = sum;
        }
        state = rule.changes(state, lengths).next;
        length += tokens;
        high_water = std::max(high_water, length);
        const std::int64_t reach = std::max<std::int64_t>(0, high_water - rollback);
        for (std::int64_t at = reach; at <= high_water; ++at) {
          const FoldedRows folded = rule.folded(state, at);
          const std::int64_t end = rule.fold(at);
          if (folded.count == 0) continue;
          const std::int64_t wanted = (end - 1) * end / 2 - (sink - 1) * sink / 2;
          ASSERT_EQ(rows[static_cast<std::size_t>(folded.row)], wanted)
              << "length " << at << " of " << high_water << " sink " << sink << " rollback "
              << rollback;
        }
      }
    }
  }
}

TEST(CudaFoldState, KernelsWithoutCompensationRefuseGrowingWindows) {
  const ModelShape shape = ModelShape::uniform(1, 2, 2, 64);
  HeadPlan plan(shape);
  const CacheOptions options{.max_context = 100, .prefill = PrefillMode::kChunkCausal};
  const cuda::DeviceLimits limits{132, 232448, true};
  const auto bytes = [&]<class Kind>(Kind) {
    return cuda::estimate_device<f16, cuda::HeadDims<64>, Kind>(shape, plan, options, limits);
  };
  const cuda::DeviceEstimate plain = bytes(cuda::CompensatedSoftmax{});
  plan.set(0, 1, KeepGrowingWindow{});
  EXPECT_THROW((void)bytes(cuda::PlainSoftmax{}), ConfigError);
  EXPECT_THROW((void)bytes(cuda::SinkSoftmax{}), ConfigError);
  EXPECT_THROW((void)bytes(cuda::ShapedSoftmax{}), ConfigError);
  // Of one sequence and head two rows of 128 sums and means.
  EXPECT_GE(bytes(cuda::CompensatedSoftmax{}).cache_bytes, plain.cache_bytes + 2 * 128 * 12);
}

}  // namespace
}  // namespace headwise::test
