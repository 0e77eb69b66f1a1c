// SPDX-License-Identifier: MIT
/// @file llama_graph.hpp
/// A llama as a plain ggml graph in which the KV cache and attention are one node a layer.
#pragma once

#include <ggml-cpu.h>
#include <ggml.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "../needle_lm/config.hpp"
#include "../needle_lm/safetensors.hpp"
#include "headwise/adapters/ggml.hpp"

using headwise::f16;
using headwise::GgmlAttention;
using Context = std::unique_ptr<ggml_context, decltype(&ggml_free)>;

constexpr int kThreads = 2;

/// Weights under their HuggingFace names, as ggml has them: [in, out].
struct Model {
  ggml_tensor* operator()(const std::string& name, int in, int out) {
    ggml_tensor*& tensor = tensors[name];
    if (tensor != nullptr) return tensor;
    const auto floats =
        out == 1 ? file.floats(name + ".weight", {in}) : file.floats(name + ".weight", {out, in});
    tensor = ggml_new_tensor_2d(context.get(), GGML_TYPE_F32, in, out);
    std::memcpy(tensor->data, floats.data(), floats.size() * sizeof(float));
    return tensor;
  }

  needle_lm::ModelConfig config;
  needle_lm::SafeTensors file;
  Context context{ggml_init({std::size_t{64} << 20, nullptr, false}), &ggml_free};
  std::map<std::string, ggml_tensor*> tensors = {};
};

/// The model for so many tokens, of whichever sequences. No shape in it depends on the context: it
/// is built once and computed in any number of steps.
class Graph {
 public:
  Graph(Model& model, GgmlAttention<f16>& attention, std::size_t num_tokens) {
    const needle_lm::ModelConfig& m = model.config;
    ggml_context* c = context_.get();
    const auto n = static_cast<std::int64_t>(num_tokens);
    tokens_ = ggml_new_tensor_1d(c, GGML_TYPE_I32, n);
    positions_ = ggml_new_tensor_1d(c, GGML_TYPE_I32, n);
    const auto times = [&](const std::string& name, ggml_tensor* x, int out) {
      return ggml_mul_mat(c, model(name, static_cast<int>(x->ne[0]), out), x);
    };
    const auto norm = [&](const std::string& name, ggml_tensor* x) {
      return ggml_mul(c, ggml_rms_norm(c, x, m.norm_epsilon), model(name, m.hidden_size, 1));
    };
    const auto heads = [&](const std::string& name, ggml_tensor* x, int count) {
      return ggml_reshape_3d(c, times(name, x, count * m.head_dim), m.head_dim, count, n);
    };
    const auto rotated = [&](ggml_tensor* x) {
      return ggml_rope_ext(c, x, positions_, nullptr, m.head_dim, GGML_ROPE_TYPE_NEOX, 0,
                           static_cast<float>(m.rope_theta), 1, 0, 1, 0, 0);
    };

    ggml_tensor* x =
        ggml_get_rows(c, model("model.embed_tokens", m.hidden_size, m.vocab_size), tokens_);
    for (int l = 0; l < m.num_layers; ++l) {
      const std::string layer = "model.layers." + std::to_string(l) + ".";
      ggml_tensor* h = norm(layer + "input_layernorm", x);
      ggml_tensor* q = rotated(heads(layer + "self_attn.q_proj", h, m.num_qo_heads));
      ggml_tensor* k = rotated(heads(layer + "self_attn.k_proj", h, m.num_kv_heads));
      ggml_tensor* v = heads(layer + "self_attn.v_proj", h, m.num_kv_heads);

      h = attention.attend(c, l, q, k, v);  // the KV cache and attention: all of it

      h = ggml_reshape_2d(c, h, m.q_size(), n);
      x = ggml_add(c, x, times(layer + "self_attn.o_proj", h, m.hidden_size));
      h = norm(layer + "post_attention_layernorm", x);
      h = ggml_mul(c, ggml_silu(c, times(layer + "mlp.gate_proj", h, m.intermediate_size)),
                   times(layer + "mlp.up_proj", h, m.intermediate_size));
      x = ggml_add(c, x, times(layer + "mlp.down_proj", h, m.hidden_size));
    }
    next_ = ggml_argmax(c, times("model.embed_tokens", norm("model.norm", x), m.vocab_size));
    ggml_build_forward_expand(graph_, next_);
    plan_ = ggml_graph_plan(graph_, kThreads, nullptr);
    work_.resize(plan_.work_size);
    plan_.work_data = work_.data();
  }

  /// The likeliest next token after each of these.
  const int* compute(const std::vector<int>& tokens, const std::vector<int>& positions) {
    std::ranges::copy(tokens, static_cast<int*>(tokens_->data));
    std::ranges::copy(positions, static_cast<int*>(positions_->data));
    if (ggml_graph_compute(graph_, &plan_) != GGML_STATUS_SUCCESS) throw std::runtime_error("ggml");
    return static_cast<const int*>(next_->data);
  }

 private:
  Context context_{ggml_init({std::size_t{128} << 20, nullptr, false}), &ggml_free};
  ggml_cgraph* graph_ = ggml_new_graph(context_.get());
  ggml_tensor *tokens_, *positions_, *next_;
  ggml_cplan plan_;
  std::vector<std::uint8_t> work_;
};
