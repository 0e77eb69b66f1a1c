// SPDX-License-Identifier: MIT
/// @file weights.hpp
/// A Llama-style model's weights as float matrices, loaded from HuggingFace-named safetensors.
#pragma once

#include <Eigen/Core>
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "config.hpp"
#include "safetensors.hpp"

namespace needle_lm {

/// [out, in], row-major as in the file: `weight * activations` is a linear layer.
using Weight = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

struct LayerWeights {
  Eigen::VectorXf attention_norm;  ///< [hidden]
  Weight qkv;                      ///< [q_size + 2 kv_size, hidden]: one product for Q, K and V
  Weight output;                   ///< [hidden, q_size]
  Eigen::VectorXf mlp_norm;        ///< [hidden]
  Weight gate_up;                  ///< [2 intermediate, hidden]: gate, then up
  Weight down;                     ///< [hidden, intermediate]
};

struct Model {
  ModelConfig config;
  Weight embedding;  ///< [vocab, hidden]: tied, it also makes the logits
  std::vector<LayerWeights> layers;
  Eigen::VectorXf final_norm;  ///< [hidden]
};

namespace detail {

/// The named matrices [rows_i, columns], one below the other.
inline Weight load_stacked(const SafeTensors& file, const std::vector<std::string>& names,
                           const std::vector<int>& rows, int columns) {
  Eigen::Index total = 0;
  for (std::size_t i = 0; i < names.size(); ++i) {
    file.require_shape(names[i], {rows[i], columns});  // before a config's numbers become memory
    total += rows[i];
  }
  Weight weight(total, columns);
  Eigen::Index first = 0;
  for (std::size_t i = 0; i < names.size(); ++i) {
    const std::vector<float> values = file.floats(names[i], {rows[i], columns});
    weight.middleRows(first, rows[i]) = Eigen::Map<const Weight>(values.data(), rows[i], columns);
    first += rows[i];
  }
  return weight;
}

inline Eigen::VectorXf load_vector(const SafeTensors& file, const std::string& name, int size) {
  const std::vector<float> values = file.floats(name, {size});
  return Eigen::Map<const Eigen::VectorXf>(values.data(), size);
}

}  // namespace detail

/// @throws FormatError for a tensor that is absent or of another shape than the config says.
inline Model load_model(const ModelConfig& config, const SafeTensors& file) {
  using detail::load_stacked;
  using detail::load_vector;
  const int hidden = config.hidden_size;
  const int mlp = config.intermediate_size;
  Model model;
  model.config = config;
  model.embedding = load_stacked(file, {"model.embed_tokens.weight"}, {config.vocab_size}, hidden);
  for (int i = 0; i < config.num_layers; ++i) {
    const std::string layer = "model.layers." + std::to_string(i) + ".";
    const std::string attention = layer + "self_attn.";
    LayerWeights weights;
    weights.attention_norm = load_vector(file, layer + "input_layernorm.weight", hidden);
    weights.qkv = load_stacked(
        file,
        {attention + "q_proj.weight", attention + "k_proj.weight", attention + "v_proj.weight"},
        {config.q_size(), config.kv_size(), config.kv_size()}, hidden);
    weights.output = load_stacked(file, {attention + "o_proj.weight"}, {hidden}, config.q_size());
    weights.mlp_norm = load_vector(file, layer + "post_attention_layernorm.weight", hidden);
    weights.gate_up = load_stacked(
        file, {layer + "mlp.gate_proj.weight", layer + "mlp.up_proj.weight"}, {mlp, mlp}, hidden);
    weights.down = load_stacked(file, {layer + "mlp.down_proj.weight"}, {hidden}, mlp);
    model.layers.push_back(std::move(weights));
  }
  model.final_norm = load_vector(file, "model.norm.weight", hidden);
  return model;
}

/// A model file and the config.json beside it.
inline Model load_model(const std::string& path) {
  const auto beside = std::filesystem::path(path).parent_path() / "config.json";
  const ModelConfig config = load_config(beside.string());
  return load_model(config, SafeTensors(path));
}

}  // namespace needle_lm
