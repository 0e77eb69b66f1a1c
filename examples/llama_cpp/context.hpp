// SPDX-License-Identifier: MIT
/// @file context.hpp
/// A llama_context as this example uses it, and the one hook that it offers for attention: cb_eval.
#pragma once

#include <ggml.h>
#include <llama.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "headwise/adapters/ggml.hpp"

namespace in_llama {

/// One token of a batch.
struct Row {
  llama_token token = 0;
  llama_pos pos = 0;
  llama_seq_id sequence = 0;
  bool wants_logits = false;
};

struct ContextOptions {
  int num_cells = 0;  ///< tokens that the stock KV cache holds; llama.cpp rounds up to 256
  int max_rows = 0;   ///< of a batch
  int max_sequences = 1;
  int num_threads = 1;
  bool flash_attention = true;
};

/// The layer whose cache a FLASH_ATTN_EXT node reads, or -1: llama.cpp names its tensors.
/// @param prefix  "cache_k_l" or "cache_v_l"
inline int layer_of(const ggml_tensor* cache, const char* prefix) {
  int layer = -1;
  if (cache->view_src == nullptr) return -1;
  const std::string pattern = std::string(prefix) + "%d";
  return std::sscanf(cache->view_src->name, pattern.c_str(), &layer) == 1 ? layer : -1;
}

/// What a FLASH_ATTN_EXT node of an empty stock cache was given: the batch's own rows.
struct NewRows {
  int layer;
  std::int64_t num_rows;
  headwise::TensorView<const float> q;  ///< [rows, num_qo_heads, k_dim], in place
  headwise::TensorView<const float> k;  ///< [rows, num_kv_heads, k_dim], made floats again
  headwise::TensorView<const float> v;  ///< [rows, num_kv_heads, v_dim], likewise
  headwise::TensorView<float> out;      ///< [rows, num_qo_heads, v_dim]: the node's own result
};

/// A context without a GPU, in whose graphs attention may be looked at or replaced.
class Context {
 public:
  /// Called once for each FLASH_ATTN_EXT node after it was computed; what it leaves in the node is
  /// what the layer goes on with. False: the batch is given up.
  using OnAttention = std::function<bool(ggml_tensor& node)>;

  /// @throws ConfigError where llama.cpp makes no context.
  Context(llama_model* model, const ContextOptions& options, OnAttention on_attention = {})
      : on_attention_(std::move(on_attention)) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx = static_cast<std::uint32_t>(options.num_cells);
    params.n_batch = params.n_ubatch = static_cast<std::uint32_t>(options.max_rows);
    params.n_seq_max = static_cast<std::uint32_t>(options.max_sequences);
    params.kv_unified = true;  // rows of a batch lie in its order
    params.n_threads = params.n_threads_batch = options.num_threads;
    params.flash_attn_type =
        options.flash_attention ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
    params.offload_kqv = false;
    params.op_offload = false;
    if (on_attention_) {
      params.cb_eval = &Context::eval;
      params.cb_eval_user_data = this;
    }
    context_.reset(llama_init_from_model(model, params));
    if (!context_)
      headwise::fail<headwise::ConfigError>("llama.cpp makes no context for the model");
    vocab_ = static_cast<std::size_t>(llama_vocab_n_tokens(llama_model_get_vocab(model)));
    batch_ = llama_batch_init(options.max_rows, 0, 1);
  }
  ~Context() { llama_batch_free(batch_); }
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  /// Runs the model over the rows, which the stock cache keeps until clear().
  /// @return whether it went through
  bool decode(std::span<const Row> rows) {
    batch_.n_tokens = static_cast<std::int32_t>(rows.size());
    for (std::size_t i = 0; i < rows.size(); ++i) {
      batch_.token[i] = rows[i].token;
      batch_.pos[i] = rows[i].pos;
      batch_.n_seq_id[i] = 1;
      batch_.seq_id[i][0] = rows[i].sequence;
      batch_.logits[i] = static_cast<std::int8_t>(rows[i].wants_logits);
    }
    gave_up_ = false;
    return llama_decode(context_.get(), batch_) == 0 && !gave_up_;
  }
  /// [vocabulary] of row `i` of the last batch, which wanted them.
  std::span<const float> logits(std::size_t i) const {
    return {llama_get_logits_ith(context_.get(), static_cast<std::int32_t>(i)), vocab_};
  }
  llama_context* get() const { return context_.get(); }
  llama_memory_t memory() const { return llama_get_memory(context_.get()); }

  /// The node as a layer's new rows: those of the batch are the first cells of an empty cache.
  /// The views are good until the next call.
  NewRows new_rows(ggml_tensor& node) {
    const ggml_tensor& q = *node.src[0];  // [dim, rows, heads]
    const headwise::TensorView<float> queries = headwise::heads_of(q);
    return {layer_of(node.src[1], "cache_k_l"),
            q.ne[1],
            {queries.data, queries.stride_h, queries.stride_n},
            floats(*node.src[1], q.ne[1], k_),
            floats(*node.src[2], q.ne[1], v_),
            headwise::heads_of(node)};
  }

 private:
  static bool eval(ggml_tensor* node, bool ask, void* self) {
    if (node->op != GGML_OP_FLASH_ATTN_EXT) return !ask;  // no need to see it; go on
    if (ask) return true;
    Context& context = *static_cast<Context*>(self);
    if (!context.gave_up_) context.gave_up_ = !context.on_attention_(*node);
    return !context.gave_up_;
  }

  /// The first `rows` cells of a stock cache of f16 [dim, cells, heads].
  static headwise::TensorView<const float> floats(const ggml_tensor& cache, std::int64_t rows,
                                                  std::vector<float>& to) {
    to.resize(static_cast<std::size_t>(rows * cache.ne[2] * cache.ne[0]));
    float* row = to.data();
    for (std::int64_t i = 0; i < rows; ++i) {
      for (std::int64_t head = 0; head < cache.ne[2]; ++head, row += cache.ne[0]) {
        ggml_fp16_to_fp32_row(
            reinterpret_cast<const ggml_fp16_t*>(static_cast<const char*>(cache.data) +
                                                 static_cast<std::size_t>(i) * cache.nb[1] +
                                                 static_cast<std::size_t>(head) * cache.nb[2]),
            row, cache.ne[0]);
      }
    }
    return headwise::TensorView<const float>::nhd(to.data(), cache.ne[2], cache.ne[0]);
  }

  OnAttention on_attention_;
  std::unique_ptr<llama_context, decltype(&llama_free)> context_{nullptr, &llama_free};
  std::size_t vocab_ = 0;
  llama_batch batch_{};
  bool gave_up_ = false;
  std::vector<float> k_, v_;
};

}  // namespace in_llama
