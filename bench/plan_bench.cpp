// SPDX-License-Identifier: MIT
// Planning: scores to plan and its fingerprint, once per model load.
#include <benchmark/benchmark.h>

#include <cstddef>
#include <vector>

#include "headwise/heads/fingerprint.hpp"
#include "headwise/heads/scores.hpp"
#include "headwise/heads/select.hpp"
#include "headwise/heads/splitmix64.hpp"

namespace {

using namespace headwise;

/// As many KV heads as Llama-2-7B has: 32 layers of 32.
HeadScores scores() {
  SplitMix64 random(1);
  std::vector<double> values(32 * 32);
  for (double& value : values) value = random.next_unit();
  return HeadScores::dense(32, 32, values);
}

void select_half(benchmark::State& state) {
  const HeadScores gates = scores();
  for (auto _ : state) {
    benchmark::DoNotOptimize(
        select(gates, {.sparsity = 0.5, .window = {.sink = 64, .recent = 256}}));
  }
}
BENCHMARK(select_half)->Name("plan/llama2_7b/select");

void take_fingerprint(benchmark::State& state) {
  const HeadPlan plan = select(scores(), {.sparsity = 0.5, .window = {.sink = 64, .recent = 256}});
  for (auto _ : state) benchmark::DoNotOptimize(fingerprint(plan));
}
BENCHMARK(take_fingerprint)->Name("plan/llama2_7b/fingerprint");

}  // namespace

BENCHMARK_MAIN();
