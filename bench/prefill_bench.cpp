// SPDX-License-Identifier: MIT
// Prefill: a whole prompt in one step, beside the multiply-adds that registers alone can do.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "support/attention_setup.hpp"
#include "support/ceilings.hpp"
#include "support/pinned_threads.hpp"

namespace {

using namespace headwise;
using namespace headwise::bench;

constexpr std::size_t kThreads[] = {1, 2};

/// Pairs of a query and a row that it sees, in a prompt of n tokens.
double visible_pairs(const Window& window, std::int64_t n) {
  double pairs = 0.0;
  for (std::int64_t i = 0; i < n; ++i) {
    const std::int64_t recent = i - window.oldest_recent(Pos{i}).value + 1;
    pairs += static_cast<double>(std::min(i + 1, recent + std::min(window.sink, i + 1 - recent)));
  }
  return pairs;
}

/// Where heads stream, each iteration runs a dense layer as well, in turns: rows that are timed
/// minutes apart compare the machine with itself.
template <class Row>
void prefill(benchmark::State& state, BenchShape shape, BenchPlan plan, std::int64_t n,
             std::size_t num_threads) {
  BenchLayer<Row> layer(shape, plan, 0, n);
  PinnedThreads threads(num_threads);
  const int group = shape.num_qo_heads / shape.num_kv_heads;
  const int streaming = plan.streams ? (shape.num_kv_heads + 1) / 2 : 0;
  const double pairs = visible_pairs(Window::everything(), n) * (shape.num_kv_heads - streaming) +
                       visible_pairs(plan.window, n) * streaming;
  const double flop = pairs * group * 2 * kHeadDim * 2;  // q.k and p.v, a multiply and an add each

  std::optional<BenchLayer<Row>> dense;
  if (plan.streams) dense.emplace(shape, kDense, 0, n);

  const auto prompt = [&](BenchLayer<Row>& of) {
    return seconds_of([&] { of.step(n, Phase::kPrompt, threads); });
  };
  layer.step(1, Phase::kPrompt, threads);  // first touch
  if (dense) dense->step(1, Phase::kPrompt, threads);
  Samples prefill, flops, over_dense;
  for (auto _ : state) {
    state.PauseTiming();
    if (dense) {
      over_dense.add([&] {
        const double whole = prompt(*dense);
        return prompt(layer) / whole;
      });
    }
    flops.add([&] { return fma_flops(threads); });
    state.ResumeTiming();
    prefill.add([&] { return prompt(layer); });
    state.PauseTiming();
    flops.add([&] { return fma_flops(threads); });
    state.ResumeTiming();
  }
  state.counters["kv_bytes"] =
      static_cast<double>(n) * shape.num_kv_heads * 2 * kHeadDim * sizeof(Row);
  state.counters["clean"] = prefill.num_clean();
  state.counters["ms"] = prefill.median() * 1e3;
  state.counters["GFLOP/s"] = flop / prefill.median() * 1e-9;
  state.counters["of_ceiling"] = flop / prefill.median() / flops.median();
  if (dense) state.counters["over_dense"] = over_dense.median();
}

void ceiling_fma(benchmark::State& state, std::size_t num_threads) {
  PinnedThreads threads(num_threads);
  Samples flops;
  for (auto _ : state) flops.add([&] { return fma_flops(threads); });
  state.counters["GFLOP/s"] = flops.median() * 1e-9;
}

template <class Row>
void add_rows(BenchShape shape, std::initializer_list<BenchPlan> plans,
              std::initializer_list<std::int64_t> lengths) {
  for (const std::int64_t n : lengths) {
    for (const BenchPlan& plan : plans) {
      for (const std::size_t threads : kThreads) {
        const std::string name = std::string("prefill/") + shape.name + '/' + format_name<Row>() +
                                 "/n=" + std::to_string(n) + '/' + plan.name +
                                 "/threads=" + std::to_string(threads);
        benchmark::RegisterBenchmark(name.c_str(), prefill<Row>, shape, plan, n, threads)
            ->Unit(benchmark::kMillisecond);
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  for (const std::size_t threads : kThreads) {
    benchmark::RegisterBenchmark(("ceiling/fma/threads=" + std::to_string(threads)).c_str(),
                                 ceiling_fma, threads)
        ->Unit(benchmark::kMillisecond);
  }
  add_rows<f16>(kLlama3, {kDense, kDuo50, kRlkv50}, {2048, 8192});
  add_rows<f16>(kLlama2, {kDense, kDuo50}, {2048});
  add_rows<f16>(kQwen2, {kDense}, {2048});
  add_rows<f16>(kGroup8, {kDense}, {2048});
  add_rows<bf16>(kLlama3, {kDense}, {2048});
  add_rows<f32>(kLlama3, {kDense}, {2048});

  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::AddCustomContext("isa", std::string(simd::isa_name<simd::BestIsa>()));
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}
