// SPDX-License-Identifier: MIT
// Prefill of one prompt on a device: bf16, width 128, 32 query and 8 KV heads.
//
//   prefill_bench <out.json>
//
// "streaming_half" is a layer of the four streaming heads alone (64+256), "dense_half" one of four
// that keep everything, "all" one of both; TFLOP/s count the arithmetic that the window rule asks
// for, and no more.
#include <algorithm>
#include <cstdio>
#include <memory>
#include <string>

#include "headwise/headwise.cuh"
#include "timing.cuh"

namespace headwise::bench {
namespace {

constexpr int kDim = 128;
constexpr int kGroup = 4;
using Dims = cuda::HeadDims<kDim>;

struct Result {
  std::string name;
  double us = 0.0;
  double tflops = 0.0;
};

/// Query-key pairs of one head times 4 x width operations.
double operations(std::int64_t n, const Window& window) {
  double pairs = 0.0;
  for (std::int64_t i = 0; i < n; ++i) {
    pairs +=
        static_cast<double>(std::min(i + 1, window.bounded() ? window.sink + window.recent : n));
  }
  return pairs * 4 * kDim;
}

class Prompt {
 public:
  /// @param dense, streaming  KV heads of either kind
  Prompt(std::int64_t n, int dense, int streaming) : n_(n), kv_heads_(dense + streaming) {
    const ModelShape shape = ModelShape::uniform(1, kv_heads_ * kGroup, kv_heads_, kDim);
    HeadPlan plan(shape);
    for (int h = dense; h < kv_heads_; ++h) plan.set(0, h, KeepWindow{kWindow});
    cache_ = std::make_unique<cuda::DeviceCache<bf16>>(shape, plan, CacheOptions{.max_context = n});
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
    if (cache_->begin(step_, {{id, n}}, stream_) != StepStatus::kOk) std::abort();
  }
  ~Prompt() { cudaStreamDestroy(stream_); }

  double microseconds_to_attend(double guess) {
    const auto& launches = attention_->launches();
    return microseconds(stream_, guess, [&](int) {
      return launches.prefill(cache_->place().step(), 0, launches.num_tiles(0, n_), n_, {},
                              view<const bf16>(q_, kv_heads_ * kGroup),
                              view<const bf16>(k_, kv_heads_), view<const bf16>(v_, kv_heads_),
                              view<bf16>(out_, kv_heads_ * kGroup), stream_);
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

int run(const char* path) {
  std::FILE* json = std::fopen(path, "w");
  if (json == nullptr) return 1;
  std::fprintf(json, "[");
  const char* comma = "\n";
  for (const std::int64_t n : {8192, 32768, 65536}) {
    const auto row = [&](const char* what, double us, double flop) {
      std::printf("prefill/32_8/bf16/n=%lld/%s  %.1f us  %.0f TFLOP/s\n", static_cast<long long>(n),
                  what, us, flop / us * 1e-6);
      std::fflush(stdout);
      std::fprintf(
          json, "%s  {\"name\": \"prefill/32_8/bf16/n=%lld/%s\", \"us\": %.2f, \"tflops\": %.1f}",
          comma, static_cast<long long>(n), what, us, flop / us * 1e-6);
      comma = ",\n";
    };
    const double streaming = 16 * operations(n, Prompt::kWindow);
    const double retrieval = 16 * operations(n, Window::everything());
    row("streaming_half_64+256", Prompt(n, 0, 4).microseconds_to_attend(500.0), streaming);
    row("dense_half", Prompt(n, 4, 0).microseconds_to_attend(20000.0), retrieval);
    Prompt prompt(n, 4, 4);
    row("all", prompt.microseconds_to_attend(20000.0), streaming + retrieval);
    row("append", prompt.microseconds_to_append(), 0.0);
  }
  std::fprintf(json, "\n]\n");
  std::fclose(json);
  return 0;
}

}  // namespace
}  // namespace headwise::bench

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: prefill_bench <out.json>\n");
    return 1;
  }
  return headwise::bench::run(argv[1]);
}
