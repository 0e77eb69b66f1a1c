// SPDX-License-Identifier: MIT
/// @file model.hpp
/// A GGUF model, and its attention as the engine itself asks for it: refused by name where Headwise
/// has no answer.
#pragma once

#include <ggml.h>
#include <llama.h>

#include <cstring>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "context.hpp"
#include "headwise/core/check.hpp"
#include "headwise/core/shape.hpp"

namespace in_llama {

/// A model that llama.cpp has loaded into the CPU's memory.
class Model {
 public:
  /// @throws ConfigError in one sentence: no such file, no GGUF that llama.cpp loads, or a kind of
  ///   model whose attention cannot be taken over.
  explicit Model(const std::string& path) : path_(path) {
    if (!std::filesystem::is_regular_file(path)) refuse("no such file, expected a GGUF model");
    llama_log_set(&Model::keep_errors, &llama_says_);
    load(/*vocab_only=*/true);  // what kind of model it is, before its weights are read
    if (llama_model_has_encoder(get())) {
      refuse("a model with an encoder, expected a decoder alone");
    }
    if (llama_model_is_recurrent(get()) || llama_model_is_hybrid(get())) {
      refuse("layers with a recurrent state, expected K and V in every layer");
    }
    if (!meta(meta("general.architecture") + ".attention.kv_lora_rank").empty()) {
      refuse("latent attention (MLA), which has no KV heads to plan for");
    }
    if (llama_model_n_swa(get()) > 0) {
      refuse("layers with a sliding window of ", llama_model_n_swa(get()),
             " of their own, expected every layer to see everything");
    }
    load(/*vocab_only=*/false);
    find_shape();
  }

  llama_model* get() const { return model_.get(); }
  /// Attention layer by layer.
  const headwise::ModelShape& shape() const { return *shape_; }
  /// Tokens that the model was trained on at a time.
  int trained_context() const { return llama_model_n_ctx_train(get()); }
  /// A value of the file, or nothing.
  std::string meta(const std::string& key) const {
    char value[256];
    const int length = llama_model_meta_val_str(get(), key.c_str(), value, sizeof value);
    return length < 0 ? std::string() : std::string(value);
  }

  std::vector<llama_token> tokens(const std::string& text, bool special = false) const {
    const llama_vocab* vocab = llama_model_get_vocab(get());
    std::vector<llama_token> tokens(text.size() + 8);
    const int count =
        llama_tokenize(vocab, text.data(), static_cast<std::int32_t>(text.size()), tokens.data(),
                       static_cast<std::int32_t>(tokens.size()), false, special);
    if (count < 0) refuse("llama.cpp cannot tokenize a text of ", text.size(), " bytes");
    tokens.resize(static_cast<std::size_t>(count));
    return tokens;
  }
  std::string text(llama_token token) const {
    char piece[256];
    const int length =
        llama_token_to_piece(llama_model_get_vocab(get()), token, piece, sizeof piece, 0, false);
    return {piece, static_cast<std::size_t>(std::max(0, length))};
  }
  bool ends_text(llama_token token) const {
    return llama_vocab_is_eog(llama_model_get_vocab(get()), token);
  }

 private:
  template <class... Parts>
  [[noreturn]] void refuse(const Parts&... parts) const {
    headwise::fail<headwise::ConfigError>(path_, ": ", parts...);
  }

  void load(bool vocab_only) {
    llama_model_params params = llama_model_default_params();
    params.n_gpu_layers = 0;
    params.vocab_only = vocab_only;
    llama_says_.clear();
    model_.reset(llama_model_load_from_file(path_.c_str(), params));
    if (!model_) refuse("llama.cpp cannot load it: ", llama_says_);
  }

  static void keep_errors(ggml_log_level level, const char* text, void* to) {
    std::string& says = *static_cast<std::string*>(to);
    if (level != GGML_LOG_LEVEL_ERROR || !says.empty()) return;
    says = text;
    says.erase(says.find_last_not_of('\n') + 1);
  }

  /// Runs one token and looks at what every layer asks of its attention.
  void find_shape() {
    std::map<int, headwise::LayerShape> layers;
    std::string refusal;  // no exception passes through llama.cpp
    const auto look = [&](ggml_tensor& node) {
      refusal = refusal_of(node);
      if (!refusal.empty()) return false;
      const auto kv_heads = static_cast<int>(node.src[1]->ne[2]);
      headwise::LayerShape layer;
      layer.num_kv_heads = kv_heads;
      layer.group_size = static_cast<int>(node.src[0]->ne[2]) / kv_heads;
      layer.k_dim = static_cast<int>(node.src[1]->ne[0]);
      layer.v_dim = static_cast<int>(node.src[2]->ne[0]);
      layer.sm_scale = parameter(node, 0);
      layer.softmax.alibi_slopes =
          headwise::alibi_slopes_of(parameter(node, 1), layer.num_qo_heads());
      layer.softmax.soft_cap = parameter(node, 2);
      if (const ggml_tensor* sinks = node.src[4]; sinks != nullptr) {
        const auto* values = static_cast<const float*>(sinks->data);
        layer.softmax.sinks.assign(values, values + layer.num_qo_heads());
      }
      layers[layer_of(node.src[1], "cache_k_l")] = layer;
      return true;
    };
    Context context(get(), {.num_cells = 32, .max_rows = 1}, look);
    const bool decoded = context.decode(std::vector<Row>{{.token = 0, .wants_logits = true}});
    if (!refusal.empty()) refuse(refusal);
    if (!decoded) refuse("llama.cpp cannot run it: ", llama_says_);
    if (static_cast<int>(layers.size()) != llama_model_n_layer(get()) ||
        layers.rbegin()->first + 1 != llama_model_n_layer(get())) {
      refuse(layers.size(), " layers with flash attention, expected all ",
             llama_model_n_layer(get()));
    }
    std::vector<headwise::LayerShape> in_order;
    for (const auto& [idx, layer] : layers) in_order.push_back(layer);
    shape_ = std::make_unique<headwise::ModelShape>(in_order);
  }

  /// Why the node cannot be taken over; empty where it can.
  static std::string refusal_of(const ggml_tensor& node) {
    const std::string in_layer = " in layer " + std::to_string(layer_of(node.src[1], "cache_k_l"));
    if (layer_of(node.src[1], "cache_k_l") < 0) {
      return "attention without a KV cache (an encoder), expected a decoder";
    }
    if (layer_of(node.src[2], "cache_v_l") < 0) {
      return "K and V in one latent row" + in_layer + " (MLA), which has no KV heads to plan for";
    }
    if (node.src[1]->type != GGML_TYPE_F16 || node.src[2]->type != GGML_TYPE_F16) {
      return "a stock cache that is not of f16" + in_layer;
    }
    return "";
  }

  /// Of ggml_flash_attn_ext(): 0 the scale, 1 max_bias, 2 logit_softcap.
  static float parameter(const ggml_tensor& node, int i) {
    float value = 0.0F;
    std::memcpy(&value, node.op_params + i, sizeof value);
    return value;
  }

  std::string path_;
  std::string llama_says_;  // its first error since load()
  std::unique_ptr<llama_model, decltype(&llama_model_free)> model_{nullptr, &llama_model_free};
  std::unique_ptr<headwise::ModelShape> shape_;
};

}  // namespace in_llama
