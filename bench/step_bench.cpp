// SPDX-License-Identifier: MIT
// What a layer of a step costs that has many sequences, or more query rows a KV head than one
// token's group.
#include <benchmark/benchmark.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "support/attention_setup.hpp"
#include "support/pinned_threads.hpp"

namespace {

using namespace headwise;
using namespace headwise::bench;

void require(StepStatus status) {
  if (status != StepStatus::kOk) throw std::runtime_error(to_string(status));
}

/// One layer of many sequences, each with one row stored and one new one: all that is not reading.
void attend_sequences(benchmark::State& state) {
  constexpr int kHeads = 8;
  constexpr int kDim = 16;  // little to read
  const int sequences = static_cast<int>(state.range(0));
  const ModelShape shape = ModelShape::uniform(1, kHeads, kHeads, kDim);
  KvCache<f16> cache(shape, HeadPlan(shape),
                     {.page_tokens = 16, .max_sequences = sequences, .max_context = 16});
  std::vector<SequenceChunk> chunks;
  for (int i = 0; i < sequences; ++i) chunks.push_back({*cache.add_sequence(), 1});
  const std::vector<float> rows =
      random_floats(static_cast<std::size_t>(sequences) * kHeads * kDim, 1);
  std::vector<float> out(rows.size());
  const auto in = TensorView<const float>::nhd(rows.data(), kHeads, kDim);
  const auto to = TensorView<float>::nhd(out.data(), kHeads, kDim);
  Step step;
  require(cache.begin(step, chunks));
  require(attend(cache, step, 0, in, in, in, to));
  require(cache.commit(step));
  for (auto _ : state) {
    state.PauseTiming();
    require(cache.begin(step, chunks));
    state.ResumeTiming();
    require(attend(cache, step, 0, in, in, in, to));
    state.PauseTiming();
    require(cache.drop(step));
    state.ResumeTiming();
  }
  state.SetItemsProcessed(state.iterations() * sequences);
}
BENCHMARK(attend_sequences)
    ->Name("attend/sequences")
    ->Arg(64)
    ->Arg(256)
    ->Arg(1024)
    ->Arg(4096)
    ->Unit(benchmark::kMicrosecond);

/// A few tokens of one sequence over a long past: speculation, or a chunk of a prompt.
void attend_tokens(benchmark::State& state, BenchShape shape, std::int64_t tokens) {
  constexpr std::int64_t kPast = 32768;
  BenchLayer<f16> layer(shape, kDense, kPast, tokens);
  const auto num_threads = static_cast<std::size_t>(state.range(0));
  PinnedThreads threads(num_threads);
  layer.step(tokens, Phase::kDecode, threads);
  for (auto _ : state) layer.step(tokens, Phase::kDecode, threads);
  state.counters["us/query_row"] = benchmark::Counter(
      static_cast<double>(tokens * shape.num_qo_heads) * 1e-6,
      benchmark::Counter::kIsIterationInvariantRate | benchmark::Counter::kInvert);
}

void add(BenchShape shape, std::initializer_list<std::int64_t> tokens) {
  for (const std::int64_t n : tokens) {
    const std::string name =
        std::string("attend/") + shape.name + "/kv=32768/tokens=" + std::to_string(n) + "/threads";
    benchmark::RegisterBenchmark(name.c_str(), attend_tokens, shape, n)
        ->Arg(1)
        ->Arg(2)
        ->UseRealTime()
        ->Unit(benchmark::kMillisecond);
  }
}

}  // namespace

int main(int argc, char** argv) {
  add({"mqa71", 71, 1}, {1, 2});
  add({"mqa64", 64, 1}, {1, 2, 4});
  add(kLlama3, {1, 8, 16, 17, 32, 64, 96});
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}
