// SPDX-License-Identifier: MIT
/// @file ggml.hpp
/// GgmlAttention: a layer's attention and its KV cache as one node of a ggml graph.
/// Not in headwise.hpp: include it by name where ggml is.
#pragma once

#if !__has_include(<ggml.h>)
#error "headwise/adapters/ggml.hpp needs ggml's headers (ggml or llama.cpp, installed)"
#endif

#include <ggml.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <iterator>
#include <span>
#include <vector>

#include "headwise/attention/attend.hpp"
#include "headwise/attention/scratch.hpp"
#include "headwise/cache/kv_cache.hpp"
#include "headwise/core/alibi.hpp"
#include "headwise/core/check.hpp"
#include "headwise/core/checked.hpp"
#include "headwise/core/dtype.hpp"
#include "headwise/core/shape.hpp"
#include "headwise/core/tensor_view.hpp"

namespace headwise::inline v0 {

/// What a model asks of ggml_flash_attn_ext() beside q, k, v and a mask, under ggml's names.
/// GgmlAttention compares it with its shape: a model that wants another softmax is told so.
struct GgmlSoftmax {
  float scale = 0.0F;          ///< factor on q.k; 0: whatever the shape says
  float max_bias = 0.0F;       ///< ALiBi: alibi_slopes_of() are the shape's; 0: none
  float logit_softcap = 0.0F;  ///< SoftmaxOptions::soft_cap; 0: none
  /// Learned sink logits, as ggml_flash_attn_ext_add_sinks() takes them; null: none. Their number
  /// is compared, their values are SoftmaxOptions::sinks': a graph may have none yet.
  const ggml_tensor* sinks = nullptr;
};

/// SoftmaxOptions::alibi_slopes of what ggml calls max_bias; 0: none.
inline std::vector<float> alibi_slopes_of(float max_bias, int num_qo_heads) {
  return max_bias == 0.0F ? std::vector<float>{} : alibi_slopes(num_qo_heads, max_bias);
}

/// A ggml tensor [dim, heads, tokens] of floats with contiguous rows as attention reads it.
/// @pre type GGML_TYPE_F32, nb[0] 4, ne[3] 1, and data: inside an op, or after the graph has run.
inline TensorView<float> heads_of(const ggml_tensor& tensor) {
  return {static_cast<float*>(tensor.data), static_cast<std::int64_t>(tensor.nb[2] / sizeof(float)),
          static_cast<std::int64_t>(tensor.nb[1] / sizeof(float))};
}

/// Attention with its KV cache for graphs of ggml's CPU backend: ggml's own threads share each
/// layer, and no node's shape depends on the context, so that one decode graph serves every step.
///
///     GgmlAttention attention(shape, plan, {.max_context = 32768}, num_threads);
///     SequenceId chat = *attention.cache().add_sequence();
///     // building a graph, once for each number of tokens:
///     ggml_tensor* out = attention.attend(ctx, layer, q, k, v, {.scale = scale});
///     // each step:
///     if (attention.begin({{chat, num_tokens}}) != StepStatus::kOk) ...;
///     ggml_backend_graph_compute(cpu, graph);
///     if (attention.commit() != StepStatus::kOk) ...;
///
/// It outlives every graph that it has a node in, and neither moves nor copies: nodes point to it.
/// begin, commit and the graph's threads allocate nothing. Positions for RoPE start at
/// `cache().length(sequence)`.
///
/// @tparam Rows  KvCache's: f16, f32, bf16 or a row format.
template <class Rows = f16>
class GgmlAttention {
 public:
  /// @param options  max_chunk bounds the tokens of a sequence in a step, and with it the scratch
  /// @param num_threads  that will compute a graph, at most
  /// @throws ConfigError as KvCache, or for num_threads below 1.
  GgmlAttention(const ModelShape& shape, const HeadPlan& plan, const CacheOptions& options,
                std::size_t num_threads)
      : shape_(shape), cache_(shape, plan, options), num_threads_(num_threads) {
    reserve_scratch(step_, cache_, num_threads);
    for (int l = 0; l < shape.num_layers(); ++l) layers_.push_back({this, l});
  }
  GgmlAttention(const GgmlAttention&) = delete;
  GgmlAttention& operator=(const GgmlAttention&) = delete;

  // Building a graph ------------------------------------------------------------------------------

  /// A node that attends one layer of the step that is open when the graph is computed, and stores
  /// the step's K and V. Exactly one for each layer of the shape in a graph.
  ///
  /// Tensors may be views with any strides, of a fused QKV for example, or permuted. f16 and bf16
  /// are cast to f32 and rows that are not contiguous are copied, by nodes of ggml's own.
  ///
  /// @param q    [k_dim, num_qo_heads, tokens]: ggml's order, the innermost extent first
  /// @param k,v  [k_dim, num_kv_heads, tokens], [v_dim, num_kv_heads, tokens]; keys after RoPE
  /// @param wanted  the model's softmax
  /// @return [v_dim, num_qo_heads, tokens], f32, contiguous
  /// @throws ConfigError for a layer that the shape has not, a tensor of another shape or a
  ///   quantised type, or a softmax that is not the shape's; the values and the limits are named.
  ggml_tensor* attend(ggml_context* ctx, int layer, ggml_tensor* q, ggml_tensor* k, ggml_tensor* v,
                      const GgmlSoftmax& wanted = {}) {
    detail::checked_range(layer, 0, shape_.num_layers() - 1, "layer");
    const LayerShape& expected = shape_.layer(layer);
    check_softmax(layer, expected, wanted);
    check(layer, "q", *q, expected.k_dim, expected.num_qo_heads(), q->ne[2]);
    check(layer, "k", *k, expected.k_dim, expected.num_kv_heads, q->ne[2]);
    check(layer, "v", *v, expected.v_dim, expected.num_kv_heads, q->ne[2]);
    ggml_tensor* rows[] = {as_rows(ctx, q), as_rows(ctx, k), as_rows(ctx, v)};
    return ggml_custom_4d(ctx, GGML_TYPE_F32, expected.v_dim, expected.num_qo_heads(), q->ne[2], 1,
                          rows, 3, &attend_share_of, GGML_N_TASKS_MAX,
                          &layers_[static_cast<std::size_t>(layer)]);
  }

  // Steps -----------------------------------------------------------------------------------------

  /// Opens a step; rows of q, k and v are the chunks' tokens in this order. See KvCache::begin().
  StepStatus begin(std::span<const SequenceChunk> chunks) {
    refused_.store(StepStatus::kOk, std::memory_order_relaxed);
    const StepStatus begun = cache_.begin(step_, chunks);
    return begun == StepStatus::kOk ? plan_work(cache_, step_, num_threads_) : begun;
  }
  /// @copydoc begin
  StepStatus begin(std::initializer_list<SequenceChunk> chunks) {
    return begin(std::span<const SequenceChunk>{chunks.begin(), chunks.size()});
  }
  /// Makes the step's tokens part of their sequences, once its graph has been computed.
  /// @return what a node refused, if one did, else as KvCache::commit(). Then the step is still
  ///   open and what the graph computed is worthless: drop(), and begin() again.
  ///   - kTooManyThreads: the graph was computed by more threads than the constructor was told
  ///   - kInvalidChunk: the graph's tokens are not as many as the step's
  ///   - kStale: it was computed while no step was open
  ///   - kAttended, kNotPlanned: it was computed twice, or has two nodes of a layer
  ///   - kIncomplete: a layer was not computed
  StepStatus commit() {
    const StepStatus refused = refused_.load(std::memory_order_relaxed);
    return refused == StepStatus::kOk ? cache_.commit(step_) : refused;
  }
  /// Closes the step without a trace.
  StepStatus drop() { return cache_.drop(step_); }

  /// Where the sequences are.
  KvCache<Rows>& cache() & { return cache_; }
  const KvCache<Rows>& cache() const& { return cache_; }  ///< likewise
  const KvCache<Rows>& cache() const&& = delete;
  /// The step in use, open or not.
  const Step& step() const& { return step_; }
  const Step& step() const&& = delete;
  /// Threads that may compute a graph.
  std::size_t num_threads() const { return num_threads_; }

 private:
  /// A node's userdata: its address is good for as long as graphs are reused.
  struct Layer {
    GgmlAttention* owner;
    int idx;
  };

  /// Two ways to one factor may differ in a bit.
  static bool alike(float a, float b) { return std::fabs(a - b) <= 1e-6F * std::fabs(b); }

  static void check_softmax(int layer, const LayerShape& expected, const GgmlSoftmax& wanted) {
    const SoftmaxOptions& softmax = expected.softmax;
    if (wanted.scale != 0.0F && !alike(wanted.scale, expected.scale())) {
      fail<ConfigError>("layer ", layer, ": the model scales q.k by ", wanted.scale,
                        ", the shape by ", expected.scale(), " (LayerShape::sm_scale)");
    }
    if (!alike(wanted.logit_softcap, softmax.soft_cap)) {
      fail<ConfigError>("layer ", layer, ": the model caps logits at ", wanted.logit_softcap,
                        ", the shape at ", softmax.soft_cap, " (SoftmaxOptions::soft_cap; 0: not)");
    }
    const std::vector<float> slopes = alibi_slopes_of(wanted.max_bias, expected.num_qo_heads());
    if (!std::equal(slopes.begin(), slopes.end(), softmax.alibi_slopes.begin(),
                    softmax.alibi_slopes.end(), &alike)) {
      fail<ConfigError>("layer ", layer, ": the model has ALiBi's max_bias ", wanted.max_bias,
                        " (0: none), the shape ", softmax.alibi_slopes.empty() ? "no" : "other",
                        " slopes (SoftmaxOptions::alibi_slopes)");
    }
    const std::int64_t num_sinks = wanted.sinks == nullptr ? 0 : ggml_nelements(wanted.sinks);
    if (num_sinks != std::ssize(softmax.sinks)) {
      fail<ConfigError>("layer ", layer, ": the model has ", num_sinks,
                        " learned sink logits, the shape ", softmax.sinks.size(),
                        " (SoftmaxOptions::sinks)");
    }
  }

  static void check(int layer, const char* name, const ggml_tensor& tensor, std::int64_t dim,
                    std::int64_t heads, std::int64_t tokens) {
    if (tensor.ne[0] != dim || tensor.ne[1] != heads || tensor.ne[2] != tokens ||
        tensor.ne[3] != 1) {
      fail<ConfigError>("layer ", layer, ": ", name, " must be [", dim, ", ", heads, ", ", tokens,
                        "], got [", tensor.ne[0], ", ", tensor.ne[1], ", ", tensor.ne[2], ", ",
                        tensor.ne[3], "]");
    }
    if (tensor.type != GGML_TYPE_F32 && tensor.type != GGML_TYPE_F16 &&
        tensor.type != GGML_TYPE_BF16) {
      fail<ConfigError>("layer ", layer, ": ", name, " must be of f32, f16 or bf16, got ",
                        ggml_type_name(tensor.type));
    }
  }

  static ggml_tensor* as_rows(ggml_context* ctx, ggml_tensor* tensor) {
    if (tensor->type != GGML_TYPE_F32) return ggml_cast(ctx, tensor, GGML_TYPE_F32);
    return tensor->nb[0] == sizeof(float) ? tensor : ggml_cont(ctx, tensor);
  }

  static void attend_share_of(ggml_tensor* out, int ith, int nth, void* userdata) noexcept {
    const Layer& layer = *static_cast<const Layer*>(userdata);
    GgmlAttention& self = *layer.owner;
    StepStatus status = StepStatus::kStale;
    if (self.cache_.is_open(self.step_)) {
      status = out->ne[2] != self.step_.num_rows()
                   ? StepStatus::kInvalidChunk
                   : attend_share(self.cache_, self.step_, layer.idx, heads_of(*out->src[0]),
                                  heads_of(*out->src[1]), heads_of(*out->src[2]), heads_of(*out),
                                  static_cast<std::size_t>(ith), static_cast<std::size_t>(nth));
    }
    // commit() says it: a node cannot.
    if (status != StepStatus::kOk) self.refused_.store(status, std::memory_order_relaxed);
  }

  ModelShape shape_;
  KvCache<Rows> cache_;
  Step step_;
  std::size_t num_threads_;
  std::vector<Layer> layers_;
  std::atomic<StepStatus> refused_{StepStatus::kOk};  // since begin
};

}  // namespace headwise::inline v0
