// SPDX-License-Identifier: MIT
// Prefill of one sequence on a device: bf16, width 128, 32 query and 8 KV heads.
//
//   prefill_bench <out.json> [filter]
//
// n tokens, the whole prompt or after past=... stored ones. "streaming_half" is a layer of the four
// streaming heads alone (64+256), "dense_half" one of four that keep everything, "all" one of both,
// "dense" one of eight that keep everything; TFLOP/s count the arithmetic that the window rule asks
// for, and no more. `filter`: only rows whose names contain it.
#include <algorithm>
#include <cstdio>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include "headwise/headwise.cuh"
#include "timing.cuh"

namespace headwise::bench {
namespace {

constexpr int kDim = 128;
constexpr int kGroup = 4;
using Dims = cuda::HeadDims<kDim>;

/// Query-key pairs of one head times 4 x width operations.
double operations(std::int64_t past, std::int64_t n, const Window& window) {
  double pairs = 0.0;
  for (std::int64_t i = past; i < past + n; ++i) {
    pairs += static_cast<double>(window.bounded() ? std::min(i + 1, window.sink + window.recent)
                                                  : i + 1);
  }
  return pairs * 4 * kDim;
}

class Chunk {
 public:
  /// @param past  tokens that are stored
  /// @param dense, streaming  KV heads of either kind
  Chunk(std::int64_t past, std::int64_t n, int dense, int streaming)
      : n_(n), kv_heads_(dense + streaming) {
    const ModelShape shape = ModelShape::uniform(1, kv_heads_ * kGroup, kv_heads_, kDim);
    HeadPlan plan(shape);
    for (int h = dense; h < kv_heads_; ++h) plan.set(0, h, KeepWindow{kWindow});
    cache_ = std::make_unique<cuda::DeviceCache<bf16>>(shape, plan,
                                                       CacheOptions{.max_context = past + n});
    attention_ = std::make_unique<cuda::DeviceAttention<bf16, Dims>>(*cache_);
    const std::size_t row = static_cast<std::size_t>(n) * kDim * 2;
    for (cuda::DeviceMemory* memory : {&q_, &out_}) {
      *memory = cuda::DeviceMemory(row * static_cast<std::size_t>(kv_heads_ * kGroup));
    }
    for (cuda::DeviceMemory* memory : {&k_, &v_}) {
      *memory = cuda::DeviceMemory(row * static_cast<std::size_t>(kv_heads_));
    }
    unsigned seed = 0;
    for (cuda::DeviceMemory* memory : {&q_, &k_, &v_}) {
      fill<true>(memory->data(), memory->num_bytes(), ++seed);
    }
    cuda::require(cudaStreamCreate(&stream_), "stream");
    const SequenceId id = *cache_->add_sequence();
    fill<true>(cache_->place().step().pages, cache_->geometry().pool_bytes(), ++seed);
    if (past > 0) {
      if (cache_->begin(step_, {{id, past}}, stream_) != StepStatus::kOk ||
          cuda::commit_replayed<bf16>(*cache_, step_) != StepStatus::kOk) {
        std::abort();
      }
    }
    if (cache_->begin(step_, {{id, n}}, stream_) != StepStatus::kOk) std::abort();
  }
  ~Chunk() { cudaStreamDestroy(stream_); }

  double microseconds_to_attend(double guess) {
    const auto& launches = attention_->launches();
    cuda::require(launches.plan_prefill(cache_->place().step(), stream_), "plan");
    return microseconds(stream_, guess, [&](int) {
      return launches.prefill(cache_->place().step(), 0, launches.num_tiles(0, n_), n_, {},
                              view<const bf16>(q_, kv_heads_ * kGroup),
                              view<const bf16>(k_, kv_heads_), view<const bf16>(v_, kv_heads_),
                              view<bf16>(out_, kv_heads_ * kGroup), stream_, true);
    });
  }
  double microseconds_to_append() {
    return microseconds(stream_, 50.0, [&](int) {
      return attention_->launches().append(
          cache_->place().step(), 0, view<const bf16>(k_, kv_heads_),
          view<const bf16>(v_, kv_heads_), cache_->place().most_rows_stored(), 1, stream_);
    });
  }

  static constexpr Window kWindow{64, 256};

 private:
  template <class T>
  TensorView<T> view(const cuda::DeviceMemory& memory, int heads) const {
    return TensorView<T>::nhd(reinterpret_cast<T*>(memory.data()), heads, kDim);
  }

  std::int64_t n_;
  int kv_heads_;
  std::unique_ptr<cuda::DeviceCache<bf16>> cache_;
  std::unique_ptr<cuda::DeviceAttention<bf16, Dims>> attention_;
  cuda::DeviceMemory q_, k_, v_, out_;
  cudaStream_t stream_ = nullptr;
  Step step_;
};

/// Prints rows and writes them.
class Table {
 public:
  Table(const char* path, std::string_view filter) : json_(std::fopen(path, "w")), filter_(filter) {
    if (json_ != nullptr) std::fprintf(json_, "[");
  }
  ~Table() {
    if (json_ == nullptr) return;
    std::fprintf(json_, "\n]\n");
    std::fclose(json_);
  }
  bool is_open() const { return json_ != nullptr; }
  /// @param measure  gives microseconds
  template <class Measure>
  void row(const std::string& shape, const char* what, double operations, Measure measure) {
    const std::string name = "prefill/32_8/bf16/" + shape + "/" + what;
    if (name.find(filter_) == std::string::npos) return;
    const double us = measure();
    const double tflops = operations / us * 1e-6;
    std::printf("%s  %.1f us  %.0f TFLOP/s\n", name.c_str(), us, tflops);
    std::fflush(stdout);
    std::fprintf(json_, "%s  {\"name\": \"%s\", \"us\": %.2f, \"tflops\": %.1f}", comma_,
                 name.c_str(), us, tflops);
    comma_ = ",\n";
  }

 private:
  std::FILE* json_;
  std::string_view filter_;
  const char* comma_ = "\n";
};

int run(const char* path, std::string_view filter) {
  Table table(path, filter);
  if (!table.is_open()) return 1;
  const auto attended = [](std::int64_t past, std::int64_t n, int dense, int streaming) {
    return [=] { return Chunk(past, n, dense, streaming).microseconds_to_attend(20000.0); };
  };
  for (const std::int64_t n : {8192, 32768, 65536}) {
    const std::string shape = "n=" + std::to_string(n);
    const double streaming = 16 * operations(0, n, Chunk::kWindow);
    const double retrieval = 16 * operations(0, n, Window::everything());
    table.row(shape, "streaming_half_64+256", streaming,
              [&] { return Chunk(0, n, 0, 4).microseconds_to_attend(500.0); });
    table.row(shape, "dense_half", retrieval, attended(0, n, 4, 0));
    table.row(shape, "all", streaming + retrieval, attended(0, n, 4, 4));
    table.row(shape, "append", 0.0, [&] { return Chunk(0, n, 4, 4).microseconds_to_append(); });
  }
  for (const auto& [past, n] : {std::pair<std::int64_t, std::int64_t>{131072, 512},
                                {131072, 2048},
                                {131072, 8192},
                                {16384, 512}}) {
    const std::string shape = "n=" + std::to_string(n) + "/past=" + std::to_string(past);
    const double streaming = 16 * operations(past, n, Chunk::kWindow);
    const double retrieval = 16 * operations(past, n, Window::everything());
    table.row(shape, "dense", 2 * retrieval, attended(past, n, 8, 0));
    table.row(shape, "all", streaming + retrieval, attended(past, n, 4, 4));
  }
  return 0;
}

}  // namespace
}  // namespace headwise::bench

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: prefill_bench <out.json> [filter]\n");
    return 1;
  }
  return headwise::bench::run(argv[1], argc > 2 ? argv[2] : "");
}
