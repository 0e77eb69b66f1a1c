// SPDX-License-Identifier: MIT
// Decode on a device, each row beside a kernel that only reads the same bytes, in the same run.
//
//   decode_bench <out.json> [part of a row's name]
//
// f16, width 128, one token a sequence or as many as the row's name says; the layers of one cache
// are the rotating buffers, 512 MiB of K and V or more (8.5 x the L2 cache of an H200). Pages are
// those of prompts in one chunk; the rows named "interleaved" grew by a page at a time, all heads
// in turn. Those that end in /sinks, /cap or /growing have more than a scale in their softmax, and
// other kernels: learned sinks, a soft-cap, or streaming heads that keep a compensation row beside
// as large a window. All rows use one allocation, made first, as an engine makes its own: in one
// that follows the freeing of another of gigabytes, some rows of many heads take 12 % longer, from
// one run to the next (bench/results).
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <map>
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

enum class Softmax { kPlain, kSinks, kCap, kGrowing };
constexpr const char* kSoftmaxNames[] = {"", "/sinks", "/cap", "/growing"};

struct Row {
  int num_qo_heads;
  int num_kv_heads;
  int batch;
  std::int64_t length;
  Window window;
  bool dense;
  bool interleaved;
  std::int64_t tokens = 1;  ///< of each sequence's step
  Softmax softmax = Softmax::kPlain;
};

/// Equal layers that keep what the row says: as many as make the rotating buffers.
struct Layers {
  explicit Layers(const Row& row)
      : bytes(bytes_of(row)),
        count(std::max(2, static_cast<int>(std::ceil(512.0 * (1 << 20) / bytes)))),
        shape(std::vector<LayerShape>(static_cast<std::size_t>(count), layer_of(row))),
        plan(shape) {
    for (int l = 0; l < count; ++l) {
      for (int h = 0; h < row.num_kv_heads; ++h) {
        if (streams(row, h)) plan.set(l, h, budget_of(row));
      }
    }
    if (row.softmax == Softmax::kGrowing) options.prefill = PrefillMode::kChunkCausal;
    options.max_sequences = row.batch;
    options.max_context = row.length;
    options.max_rollback = row.tokens - 1;  // as a speculating engine has it
  }
  static double bytes_of(const Row& row) {
    const auto window = std::min<double>(static_cast<double>(row.length),
                                         static_cast<double>(row.window.sink + row.window.recent));
    double rows = 0.0;
    for (int h = 0; h < row.num_kv_heads; ++h) {
      rows += streams(row, h) ? window : static_cast<double>(row.length);
    }
    return row.batch * rows * 2.0 * kDim * 2;
  }
  static bool streams(const Row& row, int head) {
    return !row.dense && head >= (row.num_kv_heads + 1) / 2;
  }
  static LayerShape layer_of(const Row& row) {
    LayerShape layer{row.num_kv_heads, row.num_qo_heads / row.num_kv_heads, kDim, kDim};
    if (row.softmax == Softmax::kCap) layer.softmax.soft_cap = 50.0F;
    if (row.softmax == Softmax::kSinks) {
      layer.softmax.sinks.assign(static_cast<std::size_t>(row.num_qo_heads), 0.5F);
    }
    return layer;
  }
  static HeadBudget budget_of(const Row& row) {
    if (row.softmax != Softmax::kGrowing) return KeepWindow{row.window};
    return KeepGrowingWindow{.sink = row.window.sink,
                             .min_recent = row.window.recent,
                             .divisor = row.length};  // it does not grow
  }
  std::size_t page_bytes() const {
    return CacheGeometry(shape, plan, options, &PlainRows<f16>::page_bytes).pool_bytes();
  }

  double bytes;  ///< of K and V that a layer's step reads
  int count;
  ModelShape shape;
  HeadPlan plan;
  CacheOptions options;
};

/// A cache at the row's length, and its attention.
template <class Kind>
class Decoder {
 public:
  /// @param pages  Layers::page_bytes() or more
  Decoder(const Row& row, std::byte* pages) : row_(row), layers_(row) {
    layers_.options.page_memory = {pages, layers_.page_bytes()};
    cache_ = std::make_unique<cuda::DeviceCache<f16>>(layers_.shape, layers_.plan, layers_.options);
    attention_ = std::make_unique<Attention>(*cache_);
    const std::size_t elements =
        static_cast<std::size_t>(row.batch * row.tokens * row.num_qo_heads) * kDim;
    q_ = cuda::DeviceMemory(elements * 2);
    out_ = cuda::DeviceMemory(elements * 2);
    fill<false>(q_.data(), q_.num_bytes(), 2);
    cuda::require(cudaStreamCreate(&stream_), "stream");
    grow();
  }
  ~Decoder() { cudaStreamDestroy(stream_); }

  const Layers& layers() const { return layers_; }
  cudaStream_t stream() const { return stream_; }

  double microseconds_a_layer() {
    cuda::require(plan(), "plan");
    const auto q = TensorView<const f16>::nhd(reinterpret_cast<const f16*>(q_.data()),
                                              row_.num_qo_heads, kDim);
    const auto out =
        TensorView<f16>::nhd(reinterpret_cast<f16*>(out_.data()), row_.num_qo_heads, kDim);
    // The step's own K and V: any rows will do.
    const auto kv = TensorView<const f16>::nhd(reinterpret_cast<const f16*>(q_.data()),
                                               row_.num_kv_heads, kDim);
    const auto& launches = attention_->launches();
    const int size = launches.rule(0).decode_size(row_.tokens);
    const std::int64_t tiles = row_.batch * launches.num_tiles(0, row_.tokens);
    return microseconds(stream_, 4.0 + layers_.bytes / 4.4e6, [&](int i) {
      const cuda::DeviceStep step = cache_->place().step();
      const int layer = i % layers_.count;
      return size == cuda::ChunkRule::kNone
                 ? launches.prefill(step, layer, tiles, row_.batch * row_.tokens, {}, q, kv, kv,
                                    out, stream_, true)
                 : launches.decode(step, layer, 1U << size, q, kv, kv, false, out, stream_);
    });
  }
  /// The same with the step's rows stored, as a model's step has it: its work is cut once.
  double microseconds_to_attend() {
    const auto q = TensorView<const f16>::nhd(reinterpret_cast<const f16*>(q_.data()),
                                              row_.num_qo_heads, kDim);
    const auto kv = TensorView<const f16>::nhd(reinterpret_cast<const f16*>(q_.data()),
                                               row_.num_kv_heads, kDim);
    const auto out =
        TensorView<f16>::nhd(reinterpret_cast<f16*>(out_.data()), row_.num_qo_heads, kDim);
    return microseconds(stream_, 4.0 + layers_.bytes / 4.4e6, [&](int i) {
      if (i == 0 && attention_->plan_work(stream_) != StepStatus::kOk) return attention_->error();
      const StepStatus status =
          attention_->attend(step_, i % layers_.count, q, kv, kv, out, stream_);
      return status == StepStatus::kOk ? cudaSuccess : cudaErrorInvalidValue;
    });
  }
  double microseconds_to_plan() {
    return microseconds(stream_, 10.0, [&](int) { return plan(); });
  }

 private:
  using Attention = cuda::DeviceAttention<f16, Dims, f16, Kind>;

  cudaError_t plan() {
    const auto& launches = attention_->launches();
    const cuda::DeviceStep step = cache_->place().step();
    const cudaError_t e = launches.plan_work(step, stream_);
    return e != cudaSuccess || row_.tokens == 1 ? e : launches.plan_prefill(step, stream_);
  }
  /// To a step short of the row's length, then that step is open.
  void grow() {
    std::vector<SequenceChunk> chunks;
    for (int i = 0; i < row_.batch; ++i) chunks.push_back({*cache_->add_sequence(), 0});
    const std::int64_t chunk = row_.interleaved ? cuda::kPageTokens : row_.length;
    for (std::int64_t done = 0; done < row_.length - row_.tokens;) {
      const std::int64_t n = std::min(chunk, row_.length - row_.tokens - done);
      for (SequenceChunk& c : chunks) c.num_tokens = n;
      advance(chunks);
      done += n;
    }
    for (SequenceChunk& c : chunks) c = {c.sequence, row_.tokens, Phase::kDecode};
    if (cache_->begin(step_, chunks, stream_) != StepStatus::kOk) std::abort();
  }
  void advance(const std::vector<SequenceChunk>& chunks) {
    if (cache_->begin(step_, chunks, stream_) != StepStatus::kOk ||
        cuda::commit_replayed<f16>(*cache_, step_) != StepStatus::kOk) {
      std::abort();
    }
  }

  Row row_;
  Layers layers_;
  cuda::DeviceMemory q_, out_;
  std::unique_ptr<cuda::DeviceCache<f16>> cache_;
  std::unique_ptr<Attention> attention_;
  cudaStream_t stream_ = nullptr;
  Step step_;
};

struct Result {
  std::string name;
  double us = 0.0;
  double attend_us = 0.0;  ///< the step's rows stored, too
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
  if (row.tokens > 1) name += "/tokens=" + std::to_string(row.tokens);
  name += kSoftmaxNames[static_cast<int>(row.softmax)];
  return name;
}

template <class Kind>
Result measure_as(const Row& row, std::byte* pages, int num_sms) {
  Decoder<Kind> decoder(row, pages);
  Result result;
  result.name = name_of(row);
  result.us = decoder.microseconds_a_layer();
  result.attend_us = decoder.microseconds_to_attend();
  result.bytes = decoder.layers().bytes;
  result.plan_us = decoder.microseconds_to_plan();
  result.floor = read_floor(decoder.stream(), pages, decoder.layers().page_bytes(),
                            static_cast<std::size_t>(result.bytes), num_sms);
  return result;
}

Result measure(const Row& row, std::byte* pages, int num_sms) {
  switch (row.softmax) {
    case Softmax::kSinks:
      return measure_as<cuda::SinkSoftmax>(row, pages, num_sms);
    case Softmax::kCap:
      return measure_as<cuda::ShapedSoftmax>(row, pages, num_sms);
    case Softmax::kGrowing:
      return measure_as<cuda::CompensatedSoftmax>(row, pages, num_sms);
    case Softmax::kPlain:
      break;
  }
  return measure_as<cuda::PlainSoftmax>(row, pages, num_sms);
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
  std::printf(
      "%-58s %8.2f us  stored, too %8.2f  floor %8.2f (loads %.2f bulk %.2f contig %.2f)  "
      "floor/ours %.3f",
      r.name.c_str(), r.us, r.attend_us, r.floor.best, r.floor.loads, r.floor.bulk,
      r.floor.bulk_contiguous, r.floor.best / r.us);
  if (!row.dense && speed_up > 0.0) {
    std::printf("  over dense %.2fx of %.2fx = %.2f", speed_up, theory(row), share);
  }
  std::printf("  %.0f GB/s  plan %.1f us\n", r.bytes / r.us * 1e-3, r.plan_us);
  std::fflush(stdout);
  std::fprintf(json,
               "%s  {\"name\": \"%s\", \"us\": %.3f, \"attend_us\": %.3f, \"floor_us\": %.3f, "
               "\"floor_loads_us\": %.3f, "
               "\"floor_bulk_us\": %.3f, \"floor_over_ours\": %.4f, \"bytes\": %.0f, "
               "\"dense_us\": %.3f, \"speed_up\": %.4f, \"theory\": %.4f, \"share\": %.4f, "
               "\"plan_us\": %.2f}",
               first ? "" : ",\n", r.name.c_str(), r.us, r.attend_us, r.floor.best, r.floor.loads,
               r.floor.bulk, r.floor.best / r.us, r.bytes, r.dense_us, speed_up,
               row.dense ? 1.0 : theory(row), share, r.plan_us);
}

/// Dense rows before those that stream half of the same heads.
std::vector<Row> all_rows() {
  struct Shape {
    int batch;
    std::int64_t length;
  };
  const Window wide{64, 256};
  const Window narrow{16, 64};
  std::vector<Row> rows;
  for (const int kv_heads : {8, 32}) {
    for (const Shape& s :
         {Shape{1, 4096}, Shape{1, 16384}, Shape{1, 65536}, Shape{1, 131072}, Shape{1, 524288},
          Shape{16, 4096}, Shape{16, 16384}, Shape{64, 4096}, Shape{64, 16384}}) {
      if (kv_heads == 32 && s.batch == 64) continue;
      rows.push_back({32, kv_heads, s.batch, s.length, wide, true, false});
      for (const Window& w : {wide, narrow}) {
        rows.push_back({32, kv_heads, s.batch, s.length, w, false, false});
      }
    }
  }
  for (const Shape& s : {Shape{1, 16384}, Shape{1, 131072}, Shape{16, 16384}}) {
    rows.push_back({32, 8, s.batch, s.length, wide, false, true});
  }
  // Groups of 8 and more: K and V are read once for all query heads.
  for (const int qo_heads : {32, 36, 48, 64, 128, 256}) {
    rows.push_back({qo_heads, 4, 8, 32768, wide, true, false});
  }
  rows.push_back({32, 1, 8, 32768, wide, true, false});
  // Steps of several tokens: speculation.
  for (const bool dense : {true, false}) {
    for (const std::int64_t tokens : {2, 4, 8, 16, 32, 64}) {
      rows.push_back({32, 8, 1, 131072, wide, dense, false, tokens});
    }
    rows.push_back({32, 8, 16, 16384, wide, dense, false, 4});
  }
  for (const std::int64_t tokens : {1, 4}) {
    for (const Softmax softmax :
         {Softmax::kPlain, Softmax::kSinks, Softmax::kCap, Softmax::kGrowing}) {
      rows.push_back({32, 8, 16, 65536, wide, false, false, tokens, softmax});
    }
  }
  return rows;
}

int run(const char* path, const std::string& wanted) {
  std::vector<Row> rows = all_rows();
  std::erase_if(rows,
                [&](const Row& row) { return name_of(row).find(wanted) == std::string::npos; });
  std::size_t page_bytes = 1;
  for (const Row& row : rows) page_bytes = std::max(page_bytes, Layers(row).page_bytes());
  const cuda::DeviceMemory pages(page_bytes);
  fill<false>(pages.data(), pages.num_bytes(), 1);

  std::FILE* json = std::fopen(path, "w");
  if (json == nullptr) return 1;
  std::fprintf(json, "[\n");
  const auto limits = cuda::DeviceLimits::current();
  std::map<std::string, double> dense_us;
  for (const Row& row : rows) {
    Result result = measure(row, pages.data(), limits.num_sms);
    Row dense = row;
    dense.dense = true;
    dense.interleaved = false;
    dense.softmax = Softmax::kPlain;
    if (row.dense) dense_us[name_of(dense)] = result.us;
    const auto found = dense_us.find(name_of(dense));
    if (found != dense_us.end()) result.dense_us = found->second;
    print(json, &row == rows.data(), row, result);
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
