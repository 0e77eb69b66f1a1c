// SPDX-License-Identifier: MIT
// Decode: one token over a filled cache, beside the time that reading as many bytes takes.
#include <benchmark/benchmark.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "support/attention_setup.hpp"
#include "support/ceilings.hpp"
#include "support/pinned_threads.hpp"

namespace {

using namespace headwise;
using namespace headwise::bench;

constexpr std::size_t kThreads[] = {1, 2};

/// A buffer at least this large, the same for all rows.
const float* read_buffer(std::size_t bytes) {
  static std::unique_ptr<HugeBuffer> buffer;
  if (buffer == nullptr || buffer->num_bytes() < bytes) {
    buffer.reset();
    buffer = std::make_unique<HugeBuffer>(bytes);
  }
  return buffer->data();
}

/// The layers of the row before, where only the number of threads differs: a dense one, and one
/// whose heads stream in part.
template <class Row>
BenchLayer<Row>& layer_of(const BenchShape& shape, const BenchPlan& plan, std::int64_t kv) {
  static std::unique_ptr<BenchLayer<Row>> layers[2];
  static std::string built[2];
  const std::size_t i = plan.streams ? 1 : 0;
  const std::string wanted = std::string(shape.name) + '/' + plan.name + '/' + std::to_string(kv);
  if (built[i] != wanted) {
    layers[i].reset();
    layers[i] = std::make_unique<BenchLayer<Row>>(shape, plan, kv, 1);
    built[i] = wanted;
  }
  return *layers[i];
}

/// Each iteration reads a buffer, multiplies in registers and decodes; medians of each. Where heads
/// stream it decodes with a dense cache as well, and where rows are integers with one of f16, in
/// turns: rows that were timed one after the other compare the machine with itself a minute later.
template <class Row>
void decode(benchmark::State& state, BenchShape shape, BenchPlan plan, std::int64_t kv,
            std::size_t num_threads) {
  BenchLayer<Row>& layer = layer_of<Row>(shape, plan, kv);
  const auto rows = static_cast<double>(layer.rows_read());
  const double kv_bytes = rows * row_bytes<Row>();
  const int group = shape.num_qo_heads / shape.num_kv_heads;
  const double flop = rows * 2 * kHeadDim * 2 * group;  // q.k and p.v, a multiply and an add each
  const float* buffer = read_buffer(static_cast<std::size_t>(kv_bytes));
  PinnedThreads threads(num_threads);

  layer.step(1, Phase::kDecode, threads);  // first touch
  BenchLayer<Row>* dense = plan.streams ? &layer_of<Row>(shape, kDense, kv) : nullptr;
  if (dense != nullptr) dense->step(1, Phase::kDecode, threads);
  const auto step = [&](BenchLayer<Row>& of) {
    return seconds_of([&] { of.step(1, Phase::kDecode, threads); });
  };
  constexpr bool kIsQuantised = !RowElement<Row>;
  BenchLayer<f16>* half = kIsQuantised ? &layer_of<f16>(shape, plan, kv) : nullptr;
  if (half != nullptr) half->step(1, Phase::kDecode, threads);
  Samples read, flops, decode, over_dense, over_f16;
  for (auto _ : state) {
    state.PauseTiming();
    if constexpr (kIsQuantised) {
      over_f16.add([&] {
        const double of_half = seconds_of([&] { half->step(1, Phase::kDecode, threads); });
        return step(layer) / of_half;
      });
    }
    if (dense != nullptr) {
      over_dense.add([&] {
        const double whole = step(*dense);
        return step(layer) / whole;
      });
    }
    read.add([&] { return read_seconds(threads, buffer, static_cast<std::size_t>(kv_bytes)); });
    flops.add([&] { return fma_flops(threads); });
    state.ResumeTiming();
    decode.add([&] { return step(layer); });
  }
  state.counters["kv_bytes"] = kv_bytes;
  state.counters["clean"] = decode.num_clean();
  state.counters["ms"] = decode.median() * 1e3;
  state.counters["GB/s"] = kv_bytes / decode.median() * 1e-9;
  state.counters["of_ceiling"] = read.median() / decode.median();
  state.counters["of_fma"] = flop / decode.median() / flops.median();
  if (dense != nullptr) {
    const double kept = rows / static_cast<double>(dense->rows_read());
    state.counters["over_kept_bytes"] = over_dense.median() / kept;
  }
  if constexpr (kIsQuantised) state.counters["over_f16"] = over_f16.median();
}

void ceiling_read(benchmark::State& state, std::size_t num_threads) {
  constexpr std::size_t kBytes = std::size_t{256} << 20;
  const float* buffer = read_buffer(kBytes);
  PinnedThreads threads(num_threads);
  Samples one, two, four, eight;
  for (auto _ : state) {
    one.add([&] { return read_seconds<1>(threads, buffer, kBytes); });
    two.add([&] { return read_seconds<2>(threads, buffer, kBytes); });
    four.add([&] { return read_seconds<4>(threads, buffer, kBytes); });
    eight.add([&] { return read_seconds<8>(threads, buffer, kBytes); });
  }
  const double best = std::min({two.median(), four.median(), eight.median()});
  state.counters["GB/s"] = kBytes / one.median() * 1e-9;
  state.counters["multi_stream_GB/s"] = kBytes / best * 1e-9;
}

void ceiling_fma(benchmark::State& state, std::size_t num_threads) {
  PinnedThreads threads(num_threads);
  Samples flops;
  for (auto _ : state) flops.add([&] { return fma_flops(threads); });
  state.counters["GFLOP/s"] = flops.median() * 1e-9;
}

template <class Row>
void add_rows(BenchShape shape, std::initializer_list<BenchPlan> plans,
              std::initializer_list<std::int64_t> contexts) {
  for (const std::int64_t kv : contexts) {
    for (const BenchPlan& plan : plans) {
      for (const std::size_t threads : kThreads) {
        const std::string name = std::string("decode/") + shape.name + '/' + format_name<Row>() +
                                 "/kv=" + std::to_string(kv) + '/' + plan.name +
                                 "/threads=" + std::to_string(threads);
        benchmark::RegisterBenchmark(name.c_str(), decode<Row>, shape, plan, kv, threads)
            ->Unit(benchmark::kMillisecond);
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  for (const std::size_t threads : kThreads) {
    const std::string suffix = "/threads=" + std::to_string(threads);
    benchmark::RegisterBenchmark(("ceiling/read" + suffix).c_str(), ceiling_read, threads)
        ->Unit(benchmark::kMillisecond);
    benchmark::RegisterBenchmark(("ceiling/fma" + suffix).c_str(), ceiling_fma, threads)
        ->Unit(benchmark::kMillisecond);
  }
  const auto plans = {kDense, kDuo50, kRlkv50};
  add_rows<f16>(kLlama3, plans, {4096, 16384, 32768, 65536, 131072});
  add_rows<f16>(kLlama2, plans, {16384, 32768, 65536, 131072});
  add_rows<f16>(kQwen2, {kDense, kDuo50}, {32768});
  add_rows<f16>(kGroup8, {kDense}, {16384, 32768, 65536});
  add_rows<Int8Rows>(kLlama3, {kDense}, {16384, 65536, 131072});
  add_rows<Int8Rows>(kLlama2, {kDense}, {16384, 65536});
  add_rows<Int8Rows>(kGroup8, {kDense}, {16384, 65536});
  add_rows<Int4Rows>(kLlama3, {kDense}, {16384, 65536, 131072});
  add_rows<Int4Rows>(kLlama2, {kDense}, {16384, 65536});
  add_rows<KvRows<Int8Rows, Int4Rows>>(kLlama3, {kDense}, {16384});
  add_rows<bf16>(kLlama3, {kDense}, {32768});
  add_rows<f32>(kLlama3, {kDense}, {32768});

  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::AddCustomContext("isa", std::string(simd::isa_name<simd::BestIsa>()));
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}
