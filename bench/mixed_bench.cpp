// SPDX-License-Identifier: MIT
// Mixed attention, the gates' training step of one layer: forward and backward, beside the
// multiply-adds that registers alone can do.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

#include "headwise/attention/mixed_attention.hpp"
#include "headwise/core/scratch.hpp"
#include "support/attention_setup.hpp"
#include "support/ceilings.hpp"
#include "support/pinned_threads.hpp"

namespace {

using namespace headwise;
using namespace headwise::bench;

constexpr std::size_t kThreads[] = {1, 2};
constexpr Window kTrainingWindow{128, 256};

/// Who has a gradient by the full half.
enum class Full { kShared, kConstant };

void backward(benchmark::State& state, BenchShape shape, int width, Full full, std::int64_t n,
              std::size_t num_threads) {
  const int qo = shape.num_qo_heads;
  const int kv = shape.num_kv_heads;
  const LayerShape layer{kv, qo / kv, width, width};
  const auto floats = [&](int heads) { return static_cast<std::size_t>(n * heads * width); };
  const std::vector<float> q = random_floats(floats(qo), 1);
  const std::vector<float> k = random_floats(floats(kv), 2);
  const std::vector<float> v = random_floats(floats(kv), 3);
  const std::vector<float> constant = random_floats(floats(qo), 4);
  const std::vector<float> d_out = random_floats(floats(qo), 5);
  const std::vector<double> gates(static_cast<std::size_t>(kv), 0.5);
  std::vector<float> out(floats(qo)), d_q(floats(qo)), d_k(floats(kv)), d_v(floats(kv));
  std::vector<double> d_gates(gates.size());
  const auto view = [&](auto& x, int heads) {
    return TensorView<std::remove_reference_t<decltype(x[0])>>::nhd(x.data(), heads, width);
  };
  MixedAttention mixed{layer, kTrainingWindow, gates, n, view(q, qo), view(k, kv), view(v, kv)};
  if (full == Full::kConstant) mixed.constant_full = view(constant, qo);

  PinnedThreads threads(num_threads);
  MixedTape tape;
  Scratch scratch;
  const auto forward = [&] {
    return seconds_of([&] { mixed_attention(mixed, view(out, qo), tape, scratch, threads); });
  };
  const auto back = [&] {
    return seconds_of([&] {
      mixed_attention_backward(mixed, tape, view(d_out, qo),
                               {view(d_q, qo), view(d_k, kv), view(d_v, kv), d_gates}, scratch,
                               threads);
    });
  };
  forward();
  back();
  Samples forwards, backwards, flops;
  for (auto _ : state) {
    state.PauseTiming();
    forwards.add(forward);
    flops.add([&] { return fma_flops(threads); });
    state.ResumeTiming();
    backwards.add(back);
    state.PauseTiming();
    flops.add([&] { return fma_flops(threads); });
    state.ResumeTiming();
  }
  const Window seen = full == Full::kConstant ? kTrainingWindow : Window::everything();
  double pairs = 0.0;  // of a query and a key that it sees
  for (std::int64_t i = 0; i < n; ++i) {
    const std::int64_t recent = i - seen.oldest_recent(Pos{i}).value + 1;
    pairs += static_cast<double>(std::min(i + 1, recent + std::min(seen.sink, i + 1 - recent)));
  }
  const double flop = pairs * qo * 5 * 2 * width;  // five products, a multiply and an add each
  state.counters["clean"] = backwards.num_clean();
  state.counters["ms"] = backwards.median() * 1e3;
  state.counters["forward_ms"] = forwards.median() * 1e3;
  state.counters["GFLOP/s"] = flop / backwards.median() * 1e-9;
  state.counters["of_ceiling"] = flop / backwards.median() / flops.median();
}

}  // namespace

int main(int argc, char** argv) {
  const auto add = [](BenchShape shape, int width, Full full, std::int64_t n) {
    for (const std::size_t threads : kThreads) {
      const std::string name = std::string("mixed_backward/") + shape.name +
                               "/d=" + std::to_string(width) + "/n=" + std::to_string(n) +
                               (full == Full::kConstant ? "/constant_full" : "/shared") +
                               "/threads=" + std::to_string(threads);
      benchmark::RegisterBenchmark(name.c_str(), backward, shape, width, full, n, threads)
          ->Unit(benchmark::kMillisecond);
    }
  };
  constexpr BenchShape kSmall{"needle_lm", 6, 3};
  add(kLlama3, kHeadDim, Full::kShared, 2048);
  add(kLlama3, kHeadDim, Full::kConstant, 2048);
  add(kLlama2, kHeadDim, Full::kShared, 2048);
  add(kGroup8, kHeadDim, Full::kShared, 2048);
  add(kSmall, 64, Full::kShared, 2048);

  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::AddCustomContext("isa", std::string(simd::isa_name<simd::BestIsa>()));
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}
