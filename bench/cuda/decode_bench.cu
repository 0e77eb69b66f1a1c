// SPDX-License-Identifier: MIT
// Decode on a device, each row beside a kernel that only reads the same bytes, in the same run.
//
//   decode_bench <out.json> [part of a row's name]
//
// f16, width 128, one token a sequence; the layers of one cache are the rotating buffers, 512 MiB
// of K and V or more (8.5 x the L2 cache of an H200). Pages are those of prompts in one chunk; the
// rows named "interleaved" grew by a page at a time, all heads in turn.
#include <cmath>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "headwise/headwise.cuh"
#include "read_floor.cuh"
#include "timing.cuh"

namespace headwise::bench {
namespace {

constexpr int kDim = 128;
using Dims = cuda::HeadDims<kDim>;

struct Row {
  int num_qo_heads;
  int num_kv_heads;
  int batch;
  std::int64_t length;
  Window window;
  bool dense;
  bool interleaved;
};

/// A cache of equal layers at the row's length, and its attention.
class Decoder {
 public:
  explicit Decoder(const Row& row) : row_(row) {
    const double row_bytes = 2.0 * kDim * 2;
    layer_bytes_ = 0.0;
    for (int h = 0; h < row.num_kv_heads; ++h) {
      const double rows =
          streams(h) ? std::min<double>(static_cast<double>(row.length),
                                        static_cast<double>(row.window.sink + row.window.recent))
                     : static_cast<double>(row.length);
      layer_bytes_ += row.batch * rows * row_bytes;
    }
    num_layers_ = std::max(2, static_cast<int>(std::ceil(512.0 * (1 << 20) / layer_bytes_)));
    const ModelShape shape =
        ModelShape::uniform(num_layers_, row.num_qo_heads, row.num_kv_heads, kDim);
    HeadPlan plan(shape);
    for (int l = 0; l < num_layers_; ++l) {
      for (int h = 0; h < row.num_kv_heads; ++h) {
        if (streams(h)) plan.set(l, h, KeepWindow{row.window});
      }
    }
    CacheOptions options;
    options.max_sequences = row.batch;
    options.max_context = row.length;
    const CacheGeometry geometry(shape, plan, options, 2);
    pages_ =
        cuda::DeviceMemory(static_cast<std::size_t>(geometry.num_pages()) * geometry.page_bytes());
    fill<false>(pages_.data(), pages_.num_bytes(), 1);
    options.page_memory = {pages_.data(), pages_.num_bytes()};
    options.page_memory_place = PageMemory::kDevice;
    cache_ = std::make_unique<cuda::DeviceCache<f16>>(shape, plan, options);
    attention_ = std::make_unique<cuda::DeviceAttention<f16, Dims>>(*cache_);
    const std::size_t elements =
        static_cast<std::size_t>(row.batch) * static_cast<std::size_t>(row.num_qo_heads) * kDim;
    q_ = cuda::DeviceMemory(elements * 2);
    out_ = cuda::DeviceMemory(elements * 2);
    fill<false>(q_.data(), q_.num_bytes(), 2);
    cuda::require(cudaStreamCreate(&stream_), "stream");
    grow();
  }
  ~Decoder() { cudaStreamDestroy(stream_); }

  double layer_bytes() const { return layer_bytes_; }
  cudaStream_t stream() const { return stream_; }
  const cuda::DeviceMemory& pages() const { return pages_; }

  double microseconds_a_layer() {
    cuda::require(attention_->plan(stream_), "plan");
    const auto q = TensorView<const f16>::nhd(reinterpret_cast<const f16*>(q_.data()),
                                              row_.num_qo_heads, kDim);
    const auto out =
        TensorView<f16>::nhd(reinterpret_cast<f16*>(out_.data()), row_.num_qo_heads, kDim);
    return microseconds(stream_, 4.0 + layer_bytes_ / 4.4e6, [&](int i) {
      return attention_->decode(i % num_layers_, q, out, stream_);
    });
  }
  double microseconds_to_plan() {
    return microseconds(stream_, 10.0, [&](int) { return attention_->plan(stream_); });
  }

 private:
  bool streams(int head) const { return !row_.dense && head >= (row_.num_kv_heads + 1) / 2; }

  /// To one token short of the row's length, then an open step of one token a sequence.
  void grow() {
    std::vector<SequenceChunk> chunks;
    for (int i = 0; i < row_.batch; ++i) chunks.push_back({*cache_->add_sequence(), 0});
    const std::int64_t chunk = row_.interleaved ? cuda::kPageTokens : row_.length;
    for (std::int64_t done = 0; done < row_.length - 1;) {
      const std::int64_t n = std::min(chunk, row_.length - 1 - done);
      for (SequenceChunk& c : chunks) c.num_tokens = n;
      advance(chunks);
      done += n;
    }
    for (SequenceChunk& c : chunks) c.num_tokens = 1;
    if (cache_->begin(step_, chunks, Phase::kDecode, stream_) != StepStatus::kOk) std::abort();
    cuda::require(cache_->error(), "begin");
  }
  void advance(const std::vector<SequenceChunk>& chunks) {
    if (cache_->begin(step_, chunks, Phase::kPrompt, stream_) != StepStatus::kOk ||
        cache_->commit_replayed(step_) != StepStatus::kOk) {
      std::abort();
    }
  }

  Row row_;
  double layer_bytes_ = 0.0;
  int num_layers_ = 0;
  cuda::DeviceMemory pages_, q_, out_;
  std::unique_ptr<cuda::DeviceCache<f16>> cache_;
  std::unique_ptr<cuda::DeviceAttention<f16, Dims>> attention_;
  cudaStream_t stream_ = nullptr;
  Step step_;
};

struct Result {
  std::string name;
  double us = 0.0;
  double dense_us = 0.0;
  ReadFloor floor;
  double bytes = 0.0;
  double plan_us = 0.0;
};

std::string name_of(const Row& row) {
  std::string name = "decode/" + std::to_string(row.num_qo_heads) + "_" +
                     std::to_string(row.num_kv_heads) + "/f16/b" + std::to_string(row.batch) +
                     "/kv=" + std::to_string(row.length);
  name += row.dense ? "/dense"
                    : "/half_" + std::to_string(row.window.sink) + "+" +
                          std::to_string(row.window.recent);
  if (row.interleaved) name += "/interleaved";
  return name;
}

Result measure(const Row& row, int num_sms) {
  Decoder decoder(row);
  Result result;
  result.name = name_of(row);
  result.us = decoder.microseconds_a_layer();
  result.bytes = decoder.layer_bytes();
  result.plan_us = decoder.microseconds_to_plan();
  result.floor = read_floor(decoder.stream(), decoder.pages().data(), decoder.pages().num_bytes(),
                            static_cast<std::size_t>(result.bytes), num_sms);
  return result;
}

/// 1 / ((1 - s) + s W / L): what half of the heads streaming would give if time were bytes.
double theory(const Row& row) {
  const double kept =
      static_cast<double>(row.window.sink + row.window.recent) / static_cast<double>(row.length);
  return 1.0 / (0.5 + 0.5 * std::min(1.0, kept));
}

void print(std::FILE* json, bool first, const Row& row, const Result& r) {
  const double speed_up = r.dense_us > 0.0 ? r.dense_us / r.us : 0.0;
  const double share = row.dense ? 0.0 : speed_up / theory(row);
  std::printf("%-58s %8.2f us  floor %8.2f (loads %.2f bulk %.2f contig %.2f)  floor/ours %.3f",
              r.name.c_str(), r.us, r.floor.best, r.floor.loads, r.floor.bulk,
              r.floor.bulk_contiguous, r.floor.best / r.us);
  if (!row.dense && speed_up > 0.0) {
    std::printf("  over dense %.2fx of %.2fx = %.2f", speed_up, theory(row), share);
  }
  std::printf("  %.0f GB/s  plan %.1f us\n", r.bytes / r.us * 1e-3, r.plan_us);
  std::fflush(stdout);
  std::fprintf(json,
               "%s  {\"name\": \"%s\", \"us\": %.3f, \"floor_us\": %.3f, \"floor_loads_us\": %.3f, "
               "\"floor_bulk_us\": %.3f, \"floor_over_ours\": %.4f, \"bytes\": %.0f, "
               "\"dense_us\": %.3f, \"speed_up\": %.4f, \"theory\": %.4f, \"share\": %.4f, "
               "\"plan_us\": %.2f}",
               first ? "" : ",\n", r.name.c_str(), r.us, r.floor.best, r.floor.loads, r.floor.bulk,
               r.floor.best / r.us, r.bytes, r.dense_us, speed_up, row.dense ? 1.0 : theory(row),
               share, r.plan_us);
}

int run(const char* path, const std::string& wanted) {
  const auto limits = cuda::DeviceLimits::current();
  std::FILE* json = std::fopen(path, "w");
  if (json == nullptr) return 1;
  std::fprintf(json, "[\n");
  bool first = true;
  const auto measure_row = [&](const Row& row, double dense_us) {
    if (name_of(row).find(wanted) == std::string::npos) return 0.0;
    Result result = measure(row, limits.num_sms);
    result.dense_us = dense_us;
    print(json, first, row, result);
    first = false;
    return result.us;
  };
  struct Shape {
    int batch;
    std::int64_t length;
  };
  const std::vector<Shape> shapes = {{1, 4096},  {1, 16384},  {1, 65536}, {1, 131072}, {1, 524288},
                                     {16, 4096}, {16, 16384}, {64, 4096}, {64, 16384}};
  const Window wide{64, 256};
  const Window narrow{16, 64};
  for (const int kv_heads : {8, 32}) {
    for (const Shape& shape : shapes) {
      if (kv_heads == 32 && shape.batch == 64) continue;
      Row row{32, kv_heads, shape.batch, shape.length, wide, true, false};
      const double dense_us = measure_row(row, 0.0);
      row.dense = false;
      for (const Window& window : {wide, narrow}) {
        row.window = window;
        measure_row(row, dense_us);
      }
    }
  }
  for (const Shape& shape : {Shape{1, 16384}, Shape{1, 131072}, Shape{16, 16384}}) {
    measure_row({32, 8, shape.batch, shape.length, wide, false, true}, 0.0);
  }
  std::fprintf(json, "\n]\n");
  std::fclose(json);
  return 0;
}

}  // namespace
}  // namespace headwise::bench

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fprintf(stderr, "usage: decode_bench <out.json> [part of a row's name]\n");
    return 1;
  }
  return headwise::bench::run(argv[1], argc > 2 ? argv[2] : "");
}
