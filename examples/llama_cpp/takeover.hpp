// SPDX-License-Identifier: MIT
/// @file takeover.hpp
/// An unpatched libllama whose attention and KV cache are Headwise.
///
/// llama.cpp stores a batch's K and V in its own cache and computes attention over them; the hook
/// then stores them in ours and writes attention over the whole past into the same node. The stock
/// cache is forgotten after each batch, so that it is one batch small however long the sequences.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "context.hpp"
#include "headwise/attention/attend.hpp"
#include "headwise/attention/scratch.hpp"
#include "headwise/cache/kv_cache.hpp"
#include "headwise/core/executor.hpp"
#include "model.hpp"

namespace in_llama {

#ifdef _OPENMP
using Threads = headwise::OpenMpExecutor;
inline Threads threads(int num_threads) { return Threads(num_threads); }
#else
using Threads = headwise::SerialExecutor;
inline Threads threads(int) { return {}; }
#endif

/// New tokens of one sequence.
struct NewTokens {
  headwise::SequenceId sequence;
  std::span<const llama_token> tokens;
  headwise::Phase phase = headwise::Phase::kPrompt;
  bool wants_all_logits = false;  ///< else the last token's
};

class Takeover {
 public:
  /// @param options  max_chunk: the most tokens of a step, all sequences together
  /// @throws ConfigError for a plan of another shape than the model's, and as KvCache.
  Takeover(const Model& model, const headwise::HeadPlan& plan,
           const headwise::CacheOptions& options, int num_threads)
      : cache_(model.shape(), plan, options),
        threads_(threads(num_threads)),
        context_(model.get(),
                 {.num_cells = static_cast<int>(options.max_chunk),
                  .max_rows = static_cast<int>(options.max_chunk),
                  .max_sequences = options.max_sequences,
                  .num_threads = num_threads},
                 [this](ggml_tensor& node) { return on_attention(node); }) {
    headwise::reserve_scratch(step_, cache_, threads_.num_threads());
  }

  /// Runs the model over new tokens of any sequences of cache().
  /// @return as begin, attend and commit; what is not kOk has left no trace.
  headwise::StepStatus forward(std::span<const NewTokens> pieces) {
    rows_.clear();
    chunks_.clear();
    for (const NewTokens& piece : pieces) {
      auto pos = static_cast<llama_pos>(cache_.length(piece.sequence));
      for (const llama_token& token : piece.tokens) {
        rows_.push_back({token, pos++, static_cast<llama_seq_id>(chunks_.size()),
                         piece.wants_all_logits || &token == &piece.tokens.back()});
      }
      chunks_.push_back({piece.sequence, std::ssize(piece.tokens), piece.phase});
    }
    refused_ = cache_.begin(step_, chunks_);
    if (refused_ != headwise::StepStatus::kOk) return refused_;
    const bool decoded = context_.decode(rows_);
    llama_memory_clear(context_.memory(), false);
    if (decoded) return cache_.commit(step_);
    (void)cache_.drop(step_);
    return refused_ == headwise::StepStatus::kOk ? headwise::StepStatus::kIncomplete : refused_;
  }
  /// Grows a sequence to `length` with the K and V that the chunk gets by itself, again and again:
  /// for measurements at a length, not for answers. The model runs once.
  headwise::StepStatus fill(headwise::SequenceId id, std::span<const llama_token> chunk,
                            std::int64_t length) {
    kept_.assign(static_cast<std::size_t>(cache_.geometry().layers().size()), {});
    const NewTokens first{.sequence = id, .tokens = chunk};
    headwise::StepStatus status = forward({&first, 1});
    while (status == headwise::StepStatus::kOk && cache_.length(id) < length) {
      status = cache_.begin(step_, {{id, std::min(std::ssize(chunk), length - cache_.length(id))}});
      if (status != headwise::StepStatus::kOk) break;
      for (std::size_t layer = 0; layer < kept_.size(); ++layer) store(static_cast<int>(layer));
      status = cache_.commit(step_);
    }
    kept_.clear();
    return status;
  }

  /// [vocabulary] of row `i` of the last forward(), in the order of its tokens.
  std::span<const float> logits(std::size_t i) const { return context_.logits(i); }
  headwise::KvCache<headwise::f16>& cache() { return cache_; }

 private:
  bool on_attention(ggml_tensor& node) {
    const NewRows rows = context_.new_rows(node);
    if (!kept_.empty()) keep(rows);
    refused_ =
        headwise::attend(cache_, step_, rows.layer, rows.q, rows.k, rows.v, rows.out, threads_);
    return refused_ == headwise::StepStatus::kOk;
  }

  /// K and V of a layer: [rows, num_kv_heads, dim].
  struct KeptRows {
    std::vector<float> k, v;
  };

  void keep(const NewRows& rows) {
    const headwise::LayerShape& shape = cache_.geometry().layer(rows.layer).shape;
    const auto size = [&](int dim) { return rows.num_rows * shape.num_kv_heads * dim; };
    kept_[static_cast<std::size_t>(rows.layer)] = {{rows.k.data, rows.k.data + size(shape.k_dim)},
                                                   {rows.v.data, rows.v.data + size(shape.v_dim)}};
  }

  /// Puts a layer's kept rows into the open step.
  void store(int layer) {
    const headwise::LayerShape& shape = cache_.geometry().layer(layer).shape;
    const KeptRows& rows = kept_[static_cast<std::size_t>(layer)];
    for (int head = 0; head < shape.num_kv_heads; ++head) {
      const auto of_head = [&](const std::vector<float>& x, int dim) {
        return headwise::TensorView<const float>{x.data() + head * dim, shape.num_kv_heads * dim,
                                                 0};
      };
      cache_.append<headwise::simd::BestIsa>(step_, step_.chunks()[0], layer, head,
                                             of_head(rows.k, shape.k_dim),
                                             of_head(rows.v, shape.v_dim));
      step_.note_head_done(layer);
    }
  }

  headwise::KvCache<headwise::f16> cache_;
  headwise::Step step_;
  Threads threads_;
  Context context_;
  std::vector<KeptRows> kept_;  // [layer], of the chunk that fill() repeats
  headwise::StepStatus refused_ = headwise::StepStatus::kOk;
  std::vector<Row> rows_;
  std::vector<headwise::SequenceChunk> chunks_;
};

}  // namespace in_llama
