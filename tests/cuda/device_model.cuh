// SPDX-License-Identifier: MIT
/// @file device_model.cuh
/// A device cache beside a host's full memory of every row: runs steps and compares each output
/// with the double oracle.
#pragma once

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <map>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <variant>
#include <vector>

#include "cuda/kernels.cuh"
#include "headwise/core/alibi.hpp"
#include "headwise/core/dtype.hpp"
#include "headwise/headwise.cuh"
#include "support/sight.hpp"

namespace headwise::test {

/// The types of stored rows that every kernel has.
using DeviceRows = ::testing::Types<f16, bf16>;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

/// Whether there is a device. HEADWISE_DEVICE_TESTS=required: a machine without one fails.
inline bool has_device() {
  int devices = 0;
  const bool found = cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0;
  const char* wish = std::getenv("HEADWISE_DEVICE_TESTS");
  if (!found && wish != nullptr && std::string(wish) == "required") {
    ADD_FAILURE() << "no CUDA device, and HEADWISE_DEVICE_TESTS says required";
  }
  return found;
}

/// Skips the rest of the running test where there is no device. Comes after the first model: what a
/// test asks for is checked everywhere, so that none can be wrong unseen.
#define HEADWISE_NEEDS_DEVICE() \
  if (!has_device()) GTEST_SKIP() << "no CUDA device"

/// Largest relative error in the Euclidean norm: weights and outputs are rounded to Row.
template <class Row>
constexpr double kBound = std::is_same_v<Row, f16> ? 1e-3 : 8e-3;

/// What a query head's softmax has besides a scale.
struct OracleSoftmax {
  double soft_cap = 0.0;    ///< 0: none
  double sink = -HUGE_VAL;  ///< a logit without a value; -infinity: none
  double slope = 0.0;       ///< ALiBi's
};

/// The mean of rows that a head has dropped, and how many there were.
struct OracleMean {
  std::vector<double> k, v;
  std::int64_t count = 0;  ///< 0: none
};

/// Attention of one query, at position n - 1, in double over the rows that `sees(j)` names.
/// @param k,v  rows of `dim` floats, `stride` apart.
template <class Sees>
std::vector<double> oracle_row(const float* q, const float* k, const float* v, std::int64_t n,
                               int dim, std::int64_t stride, double scale, Sees sees,
                               const OracleSoftmax& softmax = {}, const OracleMean& mean = {}) {
  std::vector<double> out(static_cast<std::size_t>(dim), 0.0);
  const bool has_sink = softmax.sink > -HUGE_VAL;
  double top = has_sink ? softmax.sink : -1e300;
  double sum = has_sink ? 1.0 : 0.0;
  const auto add = [&](double dot, double bias, const auto* value) {
    double score = dot * scale;
    if (softmax.soft_cap > 0.0) score = softmax.soft_cap * std::tanh(score / softmax.soft_cap);
    score += bias;
    if (score > top) {
      const double factor = std::exp(top - score);
      for (double& x : out) x *= factor;
      sum *= factor;
      top = score;
    }
    const double weight = std::exp(score - top);
    sum += weight;
    for (int d = 0; d < dim; ++d) {
      out[static_cast<std::size_t>(d)] += weight * static_cast<double>(value[d]);
    }
  };
  for (std::int64_t j = 0; j < n; ++j) {
    if (!sees(j)) continue;
    double dot = 0.0;
    for (int d = 0; d < dim; ++d) dot += static_cast<double>(q[d]) * k[j * stride + d];
    add(dot, softmax.slope * static_cast<double>(j - (n - 1)), v + j * stride);
  }
  if (mean.count > 0) {
    double dot = 0.0;
    for (int d = 0; d < dim; ++d) {
      dot += static_cast<double>(q[d]) * mean.k[static_cast<std::size_t>(d)];
    }
    add(dot, std::log(static_cast<double>(mean.count)), mean.v.data());
  }
  for (double& x : out) x = sum == 0.0 ? 0.0 : x / sum;  // NaN stays NaN
  return out;
}

struct DeviceModelOptions {
  int dim = 64;
  int group_size = 1;
  int num_kv_heads = 2;
  int num_layers = 1;
  Window window{4, 60};        ///< of every second head, the first keeps everything
  bool first_streams = false;  ///< the first head streams, too
  std::optional<KeepGrowingWindow> growing = {};  ///< of every third head, if any
  std::int64_t max_context = 4096;
  int max_sequences = 4;
  std::int64_t max_rollback = 0;
  std::int64_t checkpoint_tokens = 0;
  PrefillMode prefill = PrefillMode::kWindowed;
  std::int64_t most_rows = 0;  ///< rows that buffers have from the start, so that they never move
  std::int64_t max_converted_rows = 0;  ///< of chunks, where Io is not Row
  float soft_cap = 0.0F;
  bool alibi = false;             ///< the paper's slopes
  std::vector<float> sinks = {};  ///< of the query heads, in turn; none: no sinks
};

/// @tparam Row  of the pages
/// @tparam Dims  head widths that kernels are there for
/// @tparam Io  of q, k, v and out
/// @tparam Softmax  what the kernels' softmax has
template <class Row, class Dims = cuda::AllHeadDims, class Io = Row,
          class Softmax = cuda::PlainSoftmax>
class DeviceModel {
 public:
  /// Where there is no device, checks what it is asked for and is good for nothing else.
  explicit DeviceModel(const DeviceModelOptions& options, unsigned seed = 1)
      : options_(options), shape_(shape(options)), plan_(plan(options, shape_)), random_(seed) {
    cuda::DeviceLimits an_h100;
    an_h100.num_sms = 132;
    an_h100.smem_per_block = 227 * 1024;
    planned_ =
        cuda::estimate_device<Row, Dims, Softmax>(shape_, plan_, base_options(options), an_h100);
    if (!has_device()) return;
    pages_ = poisoned(options, shape_, plan_);
    cache_.emplace(shape_, plan_, cache_options());
    attention_.emplace(*cache_, options.max_converted_rows);
    cuda::require(cudaStreamCreate(&stream_), "cudaStreamCreate");
  }
  ~DeviceModel() {
    if (stream_ != nullptr) cudaStreamDestroy(stream_);
  }

  cuda::DeviceCache<Row>& cache() { return *cache_; }
  cuda::DeviceAttention<Row, Dims, Io, Softmax>& attention() { return *attention_; }
  cudaStream_t stream() const { return stream_; }
  const cuda::DeviceEstimate& planned() const { return planned_; }

  SequenceId add() {
    const SequenceId id = *cache_->add_sequence();
    history_[id.index] = {};
    return id;
  }
  void release(SequenceId id) {
    cache_->release(id);
    history_.erase(id.index);
  }
  void rollback(SequenceId id, std::int64_t length) {
    ASSERT_EQ(cache_->rollback(id, length), StepStatus::kOk);
    history_[id.index].resize(static_cast<std::size_t>(length));
  }
  SequenceId fork(SequenceId id) { return fork(id, cache_->length(id)); }
  SequenceId fork(SequenceId id, std::int64_t length) {
    SequenceId child;
    EXPECT_EQ(cache_->fork(id, length, child, stream_), StepStatus::kOk);
    history_[child.index] = history_[id.index];
    history_[child.index].resize(static_cast<std::size_t>(length));
    return child;
  }
  void clear(SequenceId id) {
    ASSERT_EQ(cache_->clear(id), StepStatus::kOk);
    history_[id.index].clear();
  }

  /// Every element of row `row` of the next step's tensor, instead of random ones.
  void plant_q(std::int64_t row, float value) { planted_q_[row] = value; }
  void plant_k(std::int64_t row, float value) { planted_k_[row] = value; }
  void plant_v(std::int64_t row, float value) { planted_v_[row] = value; }

  /// One step; checks `most_checked` rows of each sequence, evenly spread, all layers and heads.
  void step(const std::vector<SequenceChunk>& chunks, Phase phase,
            std::int64_t most_checked = 1 << 30) {
    begin(chunks, phase);
    ASSERT_EQ(attention_->plan_work(stream_), StepStatus::kOk);
    for (int l = 0; l < options_.num_layers; ++l) {
      ASSERT_EQ(attend(l), StepStatus::kOk) << cudaGetErrorString(attention_->error());
    }
    ASSERT_EQ(cudaStreamSynchronize(stream_), cudaSuccess);
    check(chunks, phase, most_checked);
    ASSERT_EQ(cache_->commit(step_), StepStatus::kOk);
    remember(chunks);
  }
  StepStatus attend(int l) {
    return attention_->attend(step_, l, q(l), k(l), v(l), out(l), stream_);
  }

  /// The parts of step(), for graphs.
  void begin(const std::vector<SequenceChunk>& chunks, Phase phase) {
    std::vector<SequenceChunk> phased = chunks;
    for (SequenceChunk& chunk : phased) chunk.phase = phase;
    ASSERT_EQ(cache_->begin(step_, phased, stream_), StepStatus::kOk)
        << cudaGetErrorString(cache_->place().error());
    fill(step_.num_rows());
  }
  cudaGraphExec_t capture() {
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t exec = nullptr;
    EXPECT_EQ(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal), cudaSuccess);
    EXPECT_EQ(attention_->plan_work(stream_), StepStatus::kOk);
    for (int l = 0; l < options_.num_layers; ++l) EXPECT_EQ(attend(l), StepStatus::kOk);
    EXPECT_EQ(cudaStreamEndCapture(stream_, &graph), cudaSuccess);
    EXPECT_EQ(cudaGraphInstantiate(&exec, graph, 0), cudaSuccess);
    cudaGraphDestroy(graph);
    return exec;
  }
  void replay(cudaGraphExec_t graph, const std::vector<SequenceChunk>& chunks) {
    ASSERT_EQ(cudaGraphLaunch(graph, stream_), cudaSuccess);
    ASSERT_EQ(cudaStreamSynchronize(stream_), cudaSuccess);
    check(chunks, Phase::kDecode, 1);
    ASSERT_EQ(cuda::commit_replayed<Row>(*cache_, step_), StepStatus::kOk);
    remember(chunks);
  }

  Step& open_step() { return step_; }
  TensorView<const Io> q(int layer) const { return view<const Io>(q_, layer, num_qo_heads()); }
  TensorView<const Io> k(int layer) const { return view<const Io>(k_, layer, kv_heads()); }
  TensorView<const Io> v(int layer) const { return view<const Io>(v_, layer, kv_heads()); }
  TensorView<Io> out(int layer) const { return view<Io>(out_, layer, num_qo_heads()); }

  /// Compares the outputs on the device with the oracle.
  void check(const std::vector<SequenceChunk>& chunks, Phase phase, std::int64_t most_checked) {
    std::vector<Io> got(out_rows_ * static_cast<std::size_t>(options_.num_layers));
    ASSERT_EQ(cudaMemcpy(got.data(), out_.data(), got.size() * sizeof(Io), cudaMemcpyDeviceToHost),
              cudaSuccess);
    std::int64_t row = 0;
    for (const SequenceChunk& chunk : chunks) {
      const std::int64_t every = std::max<std::int64_t>(1, chunk.num_tokens / most_checked);
      for (std::int64_t i = chunk.num_tokens - 1; i >= 0; i -= every) {
        for (int l = 0; l < options_.num_layers; ++l) {
          check_row(chunk, phase, row, i, l, got);
        }
      }
      row += chunk.num_tokens;
    }
  }

  static HeadPlan plan(const DeviceModelOptions& options, const ModelShape& shape) {
    HeadPlan plan(shape);
    for (int l = 0; l < shape.num_layers(); ++l) {
      for (int h = 0; h < options.num_kv_heads; ++h) {
        if ((h + l) % 2 == 1 || options.first_streams) {
          plan.set(l, h, KeepWindow{options.window});
        }
        if ((h + l) % 3 == 1 && options.growing) plan.set(l, h, *options.growing);
      }
    }
    return plan;
  }

 private:
  /// One token of a sequence: K, then V, [layers][kv_heads][dim] each, as stored.
  using Token = std::vector<float>;

  int kv_heads() const { return options_.num_kv_heads; }
  int num_qo_heads() const { return kv_heads() * options_.group_size; }

  static ModelShape shape(const DeviceModelOptions& options) {
    const int num_qo_heads = options.num_kv_heads * options.group_size;
    const ModelShape uniform =
        ModelShape::uniform(options.num_layers, num_qo_heads, options.num_kv_heads, options.dim);
    std::vector<LayerShape> layers(uniform.layers().begin(), uniform.layers().end());
    for (LayerShape& layer : layers) {
      layer.softmax.soft_cap = options.soft_cap;
      if (options.alibi) layer.softmax.alibi_slopes = alibi_slopes(num_qo_heads);
      for (int h = 0; !options.sinks.empty() && h < num_qo_heads; ++h) {
        layer.softmax.sinks.push_back(
            options.sinks[static_cast<std::size_t>(h) % options.sinks.size()]);
      }
    }
    return ModelShape(layers);
  }
  /// What the model has of it for a query head.
  OracleSoftmax softmax_of(int layer, int qo_head) const {
    const SoftmaxOptions& all = shape_.layer(layer).softmax;
    const auto h = static_cast<std::size_t>(qo_head);
    OracleSoftmax softmax;
    softmax.soft_cap = static_cast<double>(all.soft_cap);
    if (!all.sinks.empty()) softmax.sink = static_cast<double>(all.sinks[h]);
    if (!all.alibi_slopes.empty()) softmax.slope = static_cast<double>(all.alibi_slopes[h]);
    return softmax;
  }

  static CacheOptions base_options(const DeviceModelOptions& options) {
    CacheOptions cache;
    cache.max_context = options.max_context;
    cache.max_sequences = options.max_sequences;
    cache.max_rollback = options.max_rollback;
    cache.checkpoint_tokens = options.checkpoint_tokens;
    cache.prefill = options.prefill;
    return cache;
  }
  static cuda::DeviceMemory poisoned(const DeviceModelOptions& options, const ModelShape& shape,
                                     const HeadPlan& plan) {
    const CacheGeometry geometry(shape, plan, base_options(options), &PlainRows<Row>::page_bytes);
    cuda::DeviceMemory pages(geometry.pool_bytes());
    cuda::require(cudaMemset(pages.data(), 0xFF, pages.num_bytes()), "cudaMemset");  // NaN
    return pages;
  }
  CacheOptions cache_options() const {
    CacheOptions cache = base_options(options_);
    cache.page_memory = {pages_.data(), pages_.num_bytes()};
    return cache;
  }

  template <class T>
  TensorView<T> view(const cuda::DeviceMemory& memory, int layer, int heads) const {
    T* data = reinterpret_cast<T*>(memory.data()) +
              static_cast<std::int64_t>(layer) * capacity_ * heads * options_.dim;
    return TensorView<T>::nhd(data, heads, options_.dim);
  }

  /// Fresh random q, k and v for `rows` rows; outputs are NaN until somebody writes them.
  void fill(std::int64_t rows) {
    if (rows > capacity_) {
      capacity_ = std::max<std::int64_t>({rows, options_.max_sequences, options_.most_rows});
      const auto elements = [&](int heads) {
        return static_cast<std::size_t>(capacity_ * heads * options_.dim * options_.num_layers);
      };
      out_rows_ = elements(num_qo_heads()) / static_cast<std::size_t>(options_.num_layers);
      for (cuda::DeviceMemory* memory : {&q_, &out_}) {
        *memory = cuda::DeviceMemory(elements(num_qo_heads()) * sizeof(Io));
      }
      for (cuda::DeviceMemory* memory : {&k_, &v_}) {
        *memory = cuda::DeviceMemory(elements(kv_heads()) * sizeof(Io));
      }
      host_q_.resize(elements(num_qo_heads()));
      host_k_.resize(elements(kv_heads()));
      host_v_.resize(elements(kv_heads()));
    }
    upload(host_q_, q_, 2.0F, num_qo_heads(), planted_q_);  // peaked, as attention is
    upload(host_k_, k_, 1.0F, kv_heads(), planted_k_);
    upload(host_v_, v_, 1.0F, kv_heads(), planted_v_);
    cuda::require(cudaMemsetAsync(out_.data(), 0xFF, out_.num_bytes(), stream_), "cudaMemset");
  }
  void upload(std::vector<float>& host, const cuda::DeviceMemory& memory, float sigma, int heads,
              std::map<std::int64_t, float>& planted) {
    std::normal_distribution<float> normal(0.0F, sigma);
    std::vector<Io> rows(host.size());
    for (std::size_t i = 0; i < host.size(); ++i) {
      const std::int64_t row = static_cast<std::int64_t>(i) / (heads * options_.dim) % capacity_;
      const auto found = planted.find(row);
      rows[i] = from_float<Io>(found == planted.end() ? normal(random_) : found->second);
      host[i] = to_float(from_float<Row>(to_float(rows[i])));  // as it is stored
    }
    planted.clear();
    cuda::require(cudaMemcpyAsync(memory.data(), rows.data(), rows.size() * sizeof(Io),
                                  cudaMemcpyHostToDevice, stream_),
                  "cudaMemcpy");
  }

  std::size_t kv_at(std::int64_t row, int layer, int head) const {
    return static_cast<std::size_t>(((layer * capacity_ + row) * kv_heads() + head) * options_.dim);
  }

  /// The token at row `row` of the open step, as a Token.
  Token token_of(std::int64_t row) const {
    Token token;
    for (const std::vector<float>* rows : {&host_k_, &host_v_}) {
      for (int l = 0; l < options_.num_layers; ++l) {
        for (int h = 0; h < kv_heads(); ++h) {
          const auto first = rows->begin() + static_cast<std::ptrdiff_t>(kv_at(row, l, h));
          token.insert(token.end(), first, first + options_.dim);
        }
      }
    }
    return token;
  }

  void remember(const std::vector<SequenceChunk>& chunks) {
    std::int64_t row = 0;
    for (const SequenceChunk& chunk : chunks) {
      for (std::int64_t i = 0; i < chunk.num_tokens; ++i) {
        history_[chunk.sequence.index].push_back(token_of(row++));
      }
    }
  }

  /// Of the raw rows that `is_folded(j)` names.
  template <class IsFolded>
  OracleMean mean_of(const std::vector<float>& k, const std::vector<float>& v, std::int64_t n,
                     IsFolded is_folded) const {
    const auto dim = static_cast<std::size_t>(options_.dim);
    OracleMean mean{std::vector<double>(dim), std::vector<double>(dim), 0};
    for (std::int64_t j = 0; j < n; ++j) {
      if (!is_folded(j)) continue;
      ++mean.count;
      for (std::size_t d = 0; d < dim; ++d) {
        mean.k[d] += static_cast<double>(k[static_cast<std::size_t>(j) * dim + d]);
        mean.v[d] += static_cast<double>(v[static_cast<std::size_t>(j) * dim + d]);
      }
    }
    for (std::vector<double>* sums : {&mean.k, &mean.v}) {
      for (double& x : *sums) x /= std::max(1.0, static_cast<double>(mean.count));
    }
    return mean;
  }

  void check_row(const SequenceChunk& chunk, Phase phase, std::int64_t first_row, std::int64_t i,
                 int l, const std::vector<Io>& got) {
    const std::vector<Token>& past = history_[chunk.sequence.index];
    const auto length = static_cast<std::int64_t>(past.size());
    const std::int64_t pos = length + i;
    const bool chunk_causal =
        phase == Phase::kPrompt && options_.prefill == PrefillMode::kChunkCausal;
    for (int h = 0; h < kv_heads(); ++h) {
      std::vector<float> k, v;
      for (std::int64_t j = 0; j <= pos; ++j) {
        const Token own = j < length ? Token{} : token_of(first_row + j - length);
        const Token& token = j < length ? past[static_cast<std::size_t>(j)] : own;
        const auto at = token.begin() + (l * kv_heads() + h) * options_.dim;
        const auto v_at = at + options_.num_layers * kv_heads() * options_.dim;
        k.insert(k.end(), at, at + options_.dim);
        v.insert(v.end(), v_at, v_at + options_.dim);
      }
      const auto* keep = std::get_if<KeepWindow>(&plan_.budget(l, h));
      const bool grows = std::holds_alternative<KeepGrowingWindow>(plan_.budget(l, h));
      const auto is_folded = [&](std::int64_t j) {
        return grows && sight(plan_.budget(l, h), options_.prefill, cuda::kPageTokens, phase,
                              length, pos, j) == Sight::kFolded;
      };
      const OracleMean mean = mean_of(k, v, pos + 1, is_folded);
      const auto sees = [&](std::int64_t j) {
        if (grows) return !is_folded(j);
        if (keep == nullptr) return true;
        if (!chunk_causal) return keep->window.sees(Pos{pos}, Pos{j});
        return j >= length || j < keep->window.sink || length - j < keep->window.recent;
      };
      bool not_finite = true;  // where the truth is not
      double error = 0.0;
      double norm = 0.0;
      for (int g = 0; g < options_.group_size; ++g) {
        const std::size_t at = static_cast<std::size_t>(
            ((l * capacity_ + first_row + i) * num_qo_heads() + h * options_.group_size + g) *
            options_.dim);
        const std::vector<double> truth = oracle_row(
            host_q_.data() + at, k.data(), v.data(), pos + 1, options_.dim, options_.dim,
            1.0 / std::sqrt(options_.dim), sees, softmax_of(l, h * options_.group_size + g), mean);
        for (int d = 0; d < options_.dim; ++d) {
          const double x = static_cast<double>(to_float(got[at + static_cast<std::size_t>(d)]));
          const double wanted = truth[static_cast<std::size_t>(d)];
          if (!std::isfinite(wanted)) {
            not_finite = not_finite && !std::isfinite(x);
            continue;
          }
          error += (x - wanted) * (x - wanted);
          norm += wanted * wanted;
        }
      }
      const auto where = [&] {
        return "sequence " + std::to_string(chunk.sequence.index) + " token " + std::to_string(i) +
               " of " + std::to_string(chunk.num_tokens) + " after " + std::to_string(length) +
               ", layer " + std::to_string(l) + ", head " + std::to_string(h);
      };
      EXPECT_TRUE(not_finite) << where();
      const double bound = std::max(kBound<Row>, std::is_same_v<Io, bf16> ? kBound<bf16> : 0.0);
      // A row that is nearly all its sink's is small: f16 has steps of 2^-24 there.
      const double least =
          options_.sinks.empty() ? 0.0 : std::sqrt(options_.group_size * options_.dim) * 0x1p-25;
      EXPECT_LE(std::sqrt(error), bound * std::sqrt(norm) + least) << where();
    }
  }

  DeviceModelOptions options_;
  ModelShape shape_;
  HeadPlan plan_;
  cuda::DeviceEstimate planned_;
  cuda::DeviceMemory pages_;
  std::optional<cuda::DeviceCache<Row>> cache_;
  std::optional<cuda::DeviceAttention<Row, Dims, Io, Softmax>> attention_;
  std::mt19937 random_;
  cudaStream_t stream_ = nullptr;
  Step step_;
  std::map<std::int32_t, std::vector<Token>> history_;  // by SequenceId::index
  std::map<std::int64_t, float> planted_q_, planted_k_, planted_v_;
  std::int64_t capacity_ = 0;
  std::size_t out_rows_ = 0;  // elements of one layer's output
  cuda::DeviceMemory q_, k_, v_, out_;
  std::vector<float> host_q_, host_k_, host_v_;
};

}  // namespace headwise::test
