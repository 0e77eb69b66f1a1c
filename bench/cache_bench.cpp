// SPDX-License-Identifier: MIT
// What a step costs beside attention: begin and commit for all layers, and storing its rows.
#include <benchmark/benchmark.h>

#include <cstddef>
#include <cstdint>
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

}  // namespace

BENCHMARK_MAIN();
