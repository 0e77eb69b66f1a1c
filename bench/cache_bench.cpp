// SPDX-License-Identifier: MIT
// What a cache costs beside attention: begin and commit for all layers, storing a step's rows,
// forks, snapshots.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "headwise/cache/kv_cache.hpp"
#include "headwise/core/shape.hpp"
#include "headwise/heads/plan.hpp"
#include "headwise/simd/simd.hpp"

namespace {

using namespace headwise;

constexpr int kLayers = 32;
constexpr int kKvHeads = 8;
constexpr int kHeadDim = 128;

/// Llama-3-8B with every second head streaming at 64 + 256.
HeadPlan half_streaming(const ModelShape& shape) {
  HeadPlan plan(shape);
  for (int layer = 0; layer < shape.num_layers(); ++layer) {
    for (int head = 0; head < kKvHeads; head += 2) plan.set(layer, head, KeepWindow{{64, 256}});
  }
  return plan;
}

/// Claims the whole step's rows without storing them: only the bookkeeping is timed.
void skip_rows(Step& step) {
  for (int layer = 0; layer < kLayers; ++layer) {
    for (std::size_t i = 0; i < step.chunks().size() * kKvHeads; ++i) step.note_head_done(layer);
  }
}

/// begin + commit of one decode step; every 64th takes a page for each retrieval head.
void begin_commit(benchmark::State& state) {
  const int sequences = static_cast<int>(state.range(0));
  const ModelShape shape = ModelShape::uniform(kLayers, 32, kKvHeads, kHeadDim);
  constexpr std::int64_t kContext = 4096;
  KvCache<f16> cache(shape, half_streaming(shape),
                     {.max_sequences = sequences, .max_context = kContext, .max_rollback = 8});
  std::vector<SequenceChunk> chunks;
  for (int i = 0; i < sequences; ++i) chunks.push_back({*cache.add_sequence(), 1});
  Step step;
  for (auto _ : state) {
    if (cache.begin(step, chunks) != StepStatus::kOk) {
      state.PauseTiming();  // the context is full: start over
      for (SequenceChunk& chunk : chunks) {
        cache.release(chunk.sequence);
        chunk.sequence = *cache.add_sequence();
      }
      state.ResumeTiming();
      continue;
    }
    skip_rows(step);
    benchmark::DoNotOptimize(cache.commit(step));
  }
  state.SetItemsProcessed(state.iterations() * sequences);
}
BENCHMARK(begin_commit)->Name("step/llama3_8b/duo50/sequences")->Arg(1)->Arg(16)->Arg(64);

/// Encodes `tokens` rows of one head into its pages.
template <class Row>
void append(benchmark::State& state) {
  const std::int64_t tokens = state.range(0);
  const ModelShape shape = ModelShape::uniform(1, 4, 1, kHeadDim);
  KvCache<Row> cache(shape, HeadPlan(shape), {.max_context = tokens});
  const SequenceId id = *cache.add_sequence();
  const std::vector<float> rows(static_cast<std::size_t>(tokens) * kHeadDim, 0.5F);
  const auto view = TensorView<const float>::nhd(rows.data(), 1, kHeadDim);
  Step step;
  if (cache.begin(step, {{id, tokens}}) != StepStatus::kOk) {
    state.SkipWithError("the cache refused the step");
    return;
  }
  for (auto _ : state) {
    cache.template append<simd::BestIsa>(step, step.chunks()[0], 0, 0, view, view);
    benchmark::ClobberMemory();
  }
  state.SetBytesProcessed(state.iterations() * tokens * 2 * kHeadDim *
                          static_cast<std::int64_t>(sizeof(float)));
  state.SetItemsProcessed(state.iterations() * tokens);
}
BENCHMARK(append<f16>)->Name("append/d128/f16/rows")->Arg(1)->Arg(64)->Arg(4096);
BENCHMARK(append<bf16>)->Name("append/d128/bf16/rows")->Arg(4096);
BENCHMARK(append<f32>)->Name("append/d128/f32/rows")->Arg(4096);

/// `layers` layers of Llama-3-8B's, one sequence of `tokens` tokens in memory that was written to.
struct OneSequence {
  OneSequence(int layers, std::int64_t tokens, std::int64_t max_rollback, int sequences)
      : shape(ModelShape::uniform(layers, 32, kKvHeads, kHeadDim)),
        cache(shape, half_streaming(shape),
              {.max_sequences = sequences,
               .max_context = tokens,
               .max_chunk = 512,
               .max_rollback = max_rollback}),
        id(*cache.add_sequence()) {
    std::memset(cache.place().pages(), 1, cache.geometry().pool_bytes());
    Step step;
    while (cache.length(id) < tokens) {
      const std::int64_t chunk = std::min<std::int64_t>(512, tokens - cache.length(id));
      if (cache.begin(step, {{id, chunk}}) != StepStatus::kOk) std::abort();
      for (int layer = 0; layer < layers; ++layer) step.note_heads_done(layer, kKvHeads);
      if (cache.commit(step) != StepStatus::kOk) std::abort();
    }
  }
  ModelShape shape;
  KvCache<f16> cache;
  SequenceId id;
};

/// Forks a sequence of 131072 tokens of some layers, and releases the fork untimed.
void fork(benchmark::State& state) {
  OneSequence one(static_cast<int>(state.range(0)), 131072, state.range(1), 2);
  std::int64_t copied = 0;
  for (auto _ : state) {
    const std::int64_t used = one.cache.pages_in_use();
    SequenceId child;
    const auto start = std::chrono::steady_clock::now();
    if (one.cache.fork(one.id, child) != StepStatus::kOk) {
      state.SkipWithError("the cache refused the fork");
      return;
    }
    state.SetIterationTime(
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    copied = one.cache.pages_in_use() - used;
    one.cache.release(child);
  }
  state.counters["copied_MiB"] = static_cast<double>(copied) * 32.0 / 1024.0;
}
BENCHMARK(fork)
    ->Name("fork/llama3_8b/duo50/128k/layers:rollback")
    ->Args({1, 0})
    ->Args({1, 8})
    ->Args({4, 8})
    ->UseManualTime();

/// What snapshots are held against: as many bytes, from and to memory that is not near.
void copy(benchmark::State& state) {
  const auto bytes = static_cast<std::size_t>(state.range(0)) << 20;
  const std::vector<std::byte> from(bytes, std::byte{1});
  std::vector<std::byte> to(bytes);
  for (auto _ : state) {
    std::memcpy(to.data(), from.data(), bytes);
    benchmark::ClobberMemory();
  }
  state.SetBytesProcessed(state.iterations() * static_cast<std::int64_t>(bytes));
}
/// 4 layers at 32768 tokens: 272 MiB.
void snapshot(benchmark::State& state) {
  OneSequence one(4, 32768, 8, 2);
  std::vector<std::byte> bytes(one.cache.snapshot_bytes(one.id));
  for (auto _ : state) {
    if (one.cache.snapshot(one.id, bytes) != StepStatus::kOk) {
      state.SkipWithError("the cache refused the snapshot");
      return;
    }
    benchmark::ClobberMemory();
  }
  state.SetBytesProcessed(state.iterations() * static_cast<std::int64_t>(bytes.size()));
}
void restore(benchmark::State& state) {
  OneSequence one(4, 32768, 8, 2);
  std::vector<std::byte> bytes(one.cache.snapshot_bytes(one.id));
  if (one.cache.snapshot(one.id, bytes) != StepStatus::kOk) std::abort();
  for (auto _ : state) {
    SequenceId twin;
    if (one.cache.restore(bytes, twin) != StepStatus::kOk) {
      state.SkipWithError("the cache refused the snapshot");
      return;
    }
    benchmark::ClobberMemory();
    one.cache.release(twin);
  }
  state.SetBytesProcessed(state.iterations() * static_cast<std::int64_t>(bytes.size()));
}
BENCHMARK(copy)->Name("memcpy/MiB")->Arg(272)->Unit(benchmark::kMillisecond);
BENCHMARK(snapshot)->Name("snapshot/llama3_8b/duo50/32k/4_layers")->Unit(benchmark::kMillisecond);
BENCHMARK(restore)->Name("restore/llama3_8b/duo50/32k/4_layers")->Unit(benchmark::kMillisecond);

}  // namespace

BENCHMARK_MAIN();
