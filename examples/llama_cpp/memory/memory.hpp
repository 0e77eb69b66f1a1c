// SPDX-License-Identifier: MIT
/// @file memory.hpp
/// A memory of llama.cpp's own kind, all of whose rows and attention are Headwise: with it every
/// program of llama.cpp runs on a plan. Needs a llama.cpp with hooks.patch.
#pragma once

#include <ggml-cpu.h>
#include <llama-batch.h>
#include <llama-cparams.h>
#include <llama-impl.h>
#include <llama-io.h>
#include <llama-memory.h>
#include <llama-model.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "headwise/adapters/ggml.hpp"
#include "headwise/cache/kv_cache.hpp"
#include "headwise/core/check.hpp"
#include "headwise/core/shape.hpp"
#include "headwise/heads/plan.hpp"

namespace in_llama {

/// Attention layer by layer of a model that llama.cpp has loaded.
/// @throws ConfigError for a kind of model that has no K and V to plan for in every layer, or whose
///   scores are not those of attend().
inline headwise::ModelShape shape_of(const llama_model& model) {
  using headwise::ConfigError;
  using headwise::fail;
  const llama_hparams& hparams = model.hparams;
  if (hparams.is_mla()) {
    fail<ConfigError>("latent attention (MLA), which has no KV heads to plan for");
  }
  if (llm_arch_is_recurrent(model.arch) || llm_arch_is_hybrid(model.arch)) {
    fail<ConfigError>("layers with a recurrent state, expected K and V in every layer");
  }
  if (llama_model_has_encoder(&model) || !hparams.causal_attn) {
    fail<ConfigError>("a model with an encoder, expected a decoder alone");
  }
  if (hparams.swa_type != LLAMA_SWA_TYPE_NONE && hparams.swa_type != LLAMA_SWA_TYPE_STANDARD) {
    fail<ConfigError>("layers with chunked or two-sided windows, expected sliding ones or none");
  }
  if (hparams.n_layer_kv_from_start >= 0) {
    fail<ConfigError>("layers that read another layer's K and V, expected each to have its own");
  }
  if (model.arch == LLM_ARCH_GROK) {
    fail<ConfigError>("scores capped by a rule of this model's own (Grok)");
  }
  std::vector<headwise::LayerShape> layers;
  for (std::uint32_t il = 0; il < hparams.n_layer(); ++il) {
    const auto kv_heads = static_cast<int>(hparams.n_head_kv(il));
    if (kv_heads == 0) fail<ConfigError>("layer ", il, " has no KV heads");
    headwise::LayerShape layer;
    layer.num_kv_heads = kv_heads;
    layer.group_size = static_cast<int>(hparams.n_head(il)) / kv_heads;
    layer.k_dim = static_cast<int>(hparams.n_embd_head_k(il));
    layer.v_dim = static_cast<int>(hparams.n_embd_head_v(il));
    if (hparams.is_swa(il)) layer.sliding_window = hparams.n_swa;
    if (hparams.attn_soft_cap) layer.softmax.soft_cap = hparams.f_attn_logit_softcapping;
    layer.softmax.alibi_slopes =
        headwise::alibi_slopes_of(hparams.f_max_alibi_bias, layer.num_qo_heads());
    if (const ggml_tensor* sinks = model.layers[il].attn_sinks; sinks != nullptr) {
      const auto* values = static_cast<const float*>(sinks->data);
      layer.softmax.sinks.assign(values, values + layer.num_qo_heads());
    }
    layers.push_back(layer);
  }
  return headwise::ModelShape(layers);
}

/// Sequences of a context. What the stock memory refuses this one refuses: an engine that asks
/// seq_pos_min() never meets a rollback that the plan has no rows for.
class Memory final : public llama_memory_i {
 public:
  /// @param max_rollback  tokens that can be taken back where some head streams; a plan that keeps
  ///   everything takes any number back
  /// @throws ConfigError as GgmlAttention, and for a plan of another shape.
  Memory(const llama_model& model, const headwise::HeadPlan& plan, const llama_cparams& cparams,
         std::int64_t max_rollback)
      : hparams_(model.hparams),
        attention_(std::make_unique<headwise::GgmlAttention<>>(
            shape_of(model), plan,
            headwise::CacheOptions{
                .max_sequences = static_cast<int>(cparams.n_seq_max),
                .max_context = cparams.n_ctx_seq,
                .max_chunk = std::min(cparams.n_ubatch, cparams.n_ctx_seq),
                .max_rollback = plan.sparsity() > 0.0 ? max_rollback : cparams.n_ctx_seq},
            static_cast<std::size_t>(std::max(cparams.n_threads, cparams.n_threads_batch)))) {}
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  ~Memory() override {
    clear(true);
    LLAMA_LOG_INFO("headwise: %lld pages in use at the end\n",
                   static_cast<long long>(cache().pages_in_use()));
  }

  // Batches ---------------------------------------------------------------------------------------

  llama_memory_context_ptr init_batch(llama_batch_allocr& tokens, std::uint32_t n_ubatch,
                                      bool embd_all) override;
  llama_memory_context_ptr init_full() override;
  llama_memory_context_ptr init_update(llama_context*, bool) override;

  // Sequences -------------------------------------------------------------------------------------

  void clear(bool) override {
    drop();
    for (auto& id : sequences_) release(id);
  }
  /// Takes back the end of a sequence; true where [begin, end) is gone.
  bool seq_rm(llama_seq_id seq, llama_pos begin, llama_pos end) override {
    drop();
    if (seq < 0) {
      bool is_gone = true;
      for (llama_seq_id one = 0; one < LLAMA_MAX_SEQ; ++one) {
        is_gone = seq_rm(one, begin, end) && is_gone;
      }
      return is_gone;
    }
    const llama_pos length = seq_pos_max(seq) + 1;
    begin = std::max(begin, 0);
    if (begin >= length || (end >= 0 && end <= begin)) return true;
    if (end >= 0 && end < length) return false;  // a hole: later rows would have to move
    if (begin > 0) return cache().rollback(*at(seq), begin) == headwise::StepStatus::kOk;
    release(at(seq));
    return true;
  }
  /// Forks, sharing pages: the whole of a sequence, or its beginning as far as its plan allows.
  void seq_cp(llama_seq_id from, llama_seq_id to, llama_pos begin, llama_pos end) override {
    drop();
    if (from == to) return;
    const llama_pos length = seq_pos_max(from) + 1;
    const llama_pos wanted = end < 0 ? length : std::min(end, length);
    release(at(to));
    if (begin >= wanted) return;
    headwise::StepStatus status = headwise::StepStatus::kInvalidChunk;
    headwise::SequenceId child;
    if (begin <= 0) status = cache().fork(*at(from), wanted, child);
    if (status == headwise::StepStatus::kOk) {
      at(to) = child;
    } else {  // nothing can be returned: the sequence is empty, and a batch that goes on is refused
      LLAMA_LOG_ERROR("headwise: sequence %d is no copy of %d's [%d, %d): %s\n", to, from, begin,
                      wanted, headwise::to_string(status));
    }
  }
  void seq_keep(llama_seq_id seq) override {
    drop();
    for (llama_seq_id one = 0; one < LLAMA_MAX_SEQ; ++one) {
      if (one != seq) release(at(one));
    }
  }
  bool get_can_shift() const override { return false; }
  void seq_add(llama_seq_id, llama_pos, llama_pos, llama_pos) override {
    GGML_ABORT("headwise: keys stay where they are (get_can_shift() says so)");
  }
  void seq_div(llama_seq_id, llama_pos, llama_pos, int) override {
    GGML_ABORT("headwise: keys stay where they are (get_can_shift() says so)");
  }
  /// One below the shortest length that a rollback reaches: from there on every token that the
  /// model could ask for is there.
  llama_pos seq_pos_min(llama_seq_id seq) const override {
    if (!has(seq)) return -1;
    const std::int64_t shortest = cache().length(*at(seq)) - cache().max_truncate(*at(seq));
    return static_cast<llama_pos>(std::max<std::int64_t>(0, shortest - 1));
  }
  llama_pos seq_pos_max(llama_seq_id seq) const override {
    return has(seq) ? static_cast<llama_pos>(cache().length(*at(seq))) - 1 : -1;
  }

  // State: a number of sequences, and of each its id, the snapshot's bytes, and the snapshot
  // --------

  void state_write(llama_io_write_i& io, llama_seq_id seq, llama_state_seq_flags) const override {
    std::uint32_t count = 0;
    for (llama_seq_id one = 0; one < LLAMA_MAX_SEQ; ++one) count += is_meant(one, seq);
    io.write(&count, sizeof count);
    std::vector<std::byte> bytes;
    for (llama_seq_id one = 0; one < LLAMA_MAX_SEQ; ++one) {
      if (!is_meant(one, seq)) continue;
      bytes.resize(cache().snapshot_bytes(*at(one)));
      const headwise::StepStatus status = cache().snapshot(*at(one), bytes);
      if (status != headwise::StepStatus::kOk) {
        headwise::fail<std::runtime_error>("headwise: sequence ", one,
                                           " has no snapshot: ", headwise::to_string(status));
      }
      const std::uint64_t size = bytes.size();
      io.write(&one, sizeof one);
      io.write(&size, sizeof size);
      io.write(bytes.data(), bytes.size());
    }
  }
  /// @throws std::runtime_error for bytes that are no state of this model and plan, or find no
  ///   room; a sequence that was to be replaced is then empty.
  void state_read(llama_io_read_i& io, llama_seq_id seq, llama_state_seq_flags) override {
    drop();
    std::uint32_t count = 0;
    io.read(&count, sizeof count);
    if (count > (seq < 0 ? LLAMA_MAX_SEQ : 1)) {
      headwise::fail<std::runtime_error>("headwise: a state of ", count, " sequences");
    }
    if (seq < 0) {
      clear(true);
    } else {
      release(at(seq));
    }
    std::vector<std::byte> bytes;
    for (std::uint32_t i = 0; i < count; ++i) {
      llama_seq_id one = 0;
      std::uint64_t size = 0;
      io.read(&one, sizeof one);
      io.read(&size, sizeof size);
      if (seq >= 0) one = seq;
      if (one < 0 || one >= LLAMA_MAX_SEQ || size > most_snapshot_bytes()) {
        headwise::fail<std::runtime_error>("headwise: a state of sequence ", one, " in ", size,
                                           " bytes");
      }
      bytes.resize(size);
      io.read(bytes.data(), bytes.size());
      headwise::SequenceId restored;
      const headwise::StepStatus status = cache().restore(bytes, restored);
      if (status != headwise::StepStatus::kOk) {
        headwise::fail<std::runtime_error>("headwise: sequence ", one,
                                           " is not restored: ", headwise::to_string(status));
      }
      release(at(one));
      at(one) = restored;
    }
  }

  std::map<ggml_backend_buffer_type_t, std::size_t> memory_breakdown() const override {
    return {{ggml_backend_cpu_buffer_type(),
             cache().geometry().pool_bytes() + cache().metadata_bytes()}};
  }

 private:
  friend class MemoryContext;
  using Sequence = std::optional<headwise::SequenceId>;

  headwise::KvCache<headwise::f16>& cache() const { return attention_->cache(); }
  Sequence& at(llama_seq_id seq) { return sequences_[static_cast<std::size_t>(seq)]; }
  const Sequence& at(llama_seq_id seq) const { return sequences_[static_cast<std::size_t>(seq)]; }
  bool has(llama_seq_id seq) const { return at(seq) && cache().length(*at(seq)) > 0; }
  bool is_meant(llama_seq_id one, llama_seq_id seq) const {
    return (seq < 0 || one == seq) && has(one);
  }
  /// More than any sequence's that fits.
  std::size_t most_snapshot_bytes() const {
    return cache().geometry().pool_bytes() + cache().metadata_bytes() + (std::size_t{1} << 20);
  }
  void release(Sequence& sequence) const {
    if (sequence) cache().release(*sequence);
    sequence.reset();
  }
  void drop() const {
    if (cache().is_open(attention_->step())) (void)attention_->drop();
  }

  const llama_hparams& hparams_;
  // Nodes of reused graphs point to it; what llama.cpp calls const, a snapshot for one, changes it.
  std::unique_ptr<headwise::GgmlAttention<>> attention_;
  std::array<Sequence, LLAMA_MAX_SEQ> sequences_;
};

/// A batch, ubatch by ubatch: apply() opens a step, next() commits it.
class MemoryContext final : public llama_memory_context_i {
 public:
  MemoryContext(Memory& memory, llama_memory_status status) : memory_(memory), status_(status) {}
  MemoryContext(Memory& memory, std::vector<llama_ubatch> ubatches)
      : memory_(memory), status_(LLAMA_MEMORY_STATUS_SUCCESS), ubatches_(std::move(ubatches)) {}
  MemoryContext(const MemoryContext&) = delete;
  MemoryContext& operator=(const MemoryContext&) = delete;
  ~MemoryContext() override { memory_.drop(); }

  bool apply() override {
    if (at_ >= ubatches_.size()) return true;
    const llama_ubatch& ubatch = ubatches_[at_];
    chunks_.clear();
    for (std::uint32_t s = 0; s < ubatch.n_seqs; ++s) {
      auto& sequence = memory_.at(*ubatch.seq_id[s * ubatch.n_seq_tokens]);
      if (!sequence) sequence = memory_.cache().add_sequence();
      if (!sequence) return refuse(headwise::StepStatus::kOutOfSequences);
      chunks_.push_back({*sequence, ubatch.n_seq_tokens});
    }
    const headwise::StepStatus status = memory_.attention_->begin(chunks_);
    return status == headwise::StepStatus::kOk || refuse(status);
  }
  bool next() override {
    if (memory_.cache().is_open(memory_.attention_->step())) {
      // A refusal has no way out but the next batch, whose positions then do not fit.
      const headwise::StepStatus status = memory_.attention_->commit();
      if (status != headwise::StepStatus::kOk) refuse(status);
      memory_.drop();
    }
    return ++at_ < ubatches_.size();
  }
  const llama_ubatch& get_ubatch() const override { return ubatches_[at_]; }
  llama_memory_status get_status() const override { return status_; }

  bool owns_attention() const override { return true; }
  ggml_tensor* build_attention(ggml_context* ctx, ggml_tensor* q, ggml_tensor* k, ggml_tensor* v,
                               ggml_tensor* sinks, float kq_scale, int il) const override {
    const llama_hparams& hparams = memory_.hparams_;
    const float scale = memory_.cache().geometry().layer(il).shape.scale();
    if (kq_scale != scale) q = ggml_scale(ctx, q, kq_scale / scale);
    ggml_tensor* out = memory_.attention_->attend(
        ctx, il, q, k, v,
        {.max_bias = hparams.f_max_alibi_bias,
         .logit_softcap = hparams.attn_soft_cap ? hparams.f_attn_logit_softcapping : 0.0F,
         .sinks = sinks});
    return ggml_reshape_2d(ctx, out, out->ne[0] * out->ne[1], out->ne[2]);
  }

 private:
  static bool refuse(headwise::StepStatus status) {
    LLAMA_LOG_ERROR("headwise: a step was refused: %s\n", headwise::to_string(status));
    return false;
  }

  Memory& memory_;
  llama_memory_status status_;
  std::vector<llama_ubatch> ubatches_;
  std::size_t at_ = 0;
  std::vector<headwise::SequenceChunk> chunks_;
};

inline llama_memory_context_ptr Memory::init_batch(llama_batch_allocr& tokens,
                                                   std::uint32_t n_ubatch, bool) {
  std::vector<llama_ubatch> ubatches;
  std::map<llama_seq_id, std::int64_t> lengths;
  bool fits = true;
  tokens.split_reset();
  for (;;) {
    llama_ubatch ubatch = tokens.split_equal(n_ubatch, /*sequential=*/false, /*n_keep_tail=*/0);
    if (ubatch.n_tokens == 0) break;
    for (std::uint32_t t = 0; t < ubatch.n_tokens; ++t) {
      const llama_seq_id seq = *ubatch.seq_id[t];
      std::int64_t& length = lengths.try_emplace(seq, seq_pos_max(seq) + 1).first->second;
      // A row belongs to one sequence, and is its next: positions are counted, not stored.
      fits = fits && ubatch.n_seq_id[t] == 1 && ubatch.pos[t] == length++;
    }
    ubatches.push_back(std::move(ubatch));
  }
  for (const auto& [seq, length] : lengths) {
    fits = fits && length <= cache().geometry().options().max_context;
  }
  if (!fits || tokens.get_n_used() < tokens.get_n_tokens()) {
    return std::make_unique<MemoryContext>(*this, LLAMA_MEMORY_STATUS_FAILED_PREPARE);
  }
  return std::make_unique<MemoryContext>(*this, std::move(ubatches));
}
inline llama_memory_context_ptr Memory::init_full() {
  return std::make_unique<MemoryContext>(*this, LLAMA_MEMORY_STATUS_SUCCESS);
}
inline llama_memory_context_ptr Memory::init_update(llama_context*, bool) {
  return std::make_unique<MemoryContext>(*this, LLAMA_MEMORY_STATUS_NO_UPDATE);
}

}  // namespace in_llama
