// SPDX-License-Identifier: MIT
/// @file random_model.hpp
/// Small random models, written as the files that the example reads.
#pragma once

#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

#include "headwise/core/dtype.hpp"

namespace needle_lm::testing {

struct NamedTensor {
  std::vector<std::int64_t> shape;
  std::vector<float> values;  ///< all of them representable in f16 and bf16
};
using NamedTensors = std::map<std::string, NamedTensor>;

/// A folder that disappears with the test.
class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string name = (std::filesystem::temp_directory_path() / "needle_lm_XXXXXX").string();
    path_ = mkdtemp(name.data());
  }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  ~TemporaryFolder() { std::filesystem::remove_all(path_); }

  std::string file(const std::string& name) const { return path_ + "/" + name; }

 private:
  std::string path_;
};

inline void write_text(const std::string& path, const std::string& text) {
  std::ofstream(path, std::ios::binary) << text;
}

/// The bytes of a safetensors file with this header and this data.
inline std::string safetensors_bytes(const std::string& header, const std::string& data,
                                     std::uint64_t header_bytes) {
  std::string bytes(sizeof header_bytes, '\0');
  std::memcpy(bytes.data(), &header_bytes, sizeof header_bytes);
  return bytes + header + data;
}
inline std::string safetensors_bytes(const std::string& header, const std::string& data) {
  return safetensors_bytes(header, data, header.size());
}

template <class Stored>
void write_safetensors(const std::string& path, const NamedTensors& tensors,
                       const std::string& dtype) {
  nlohmann::json header = nlohmann::json::object();
  std::string data;
  for (const auto& [name, tensor] : tensors) {
    const std::size_t begin = data.size();
    for (const float value : tensor.values) {
      const Stored stored = headwise::from_float<Stored>(value);
      data.append(reinterpret_cast<const char*>(&stored), sizeof stored);
    }
    header[name] = {
        {"dtype", dtype}, {"shape", tensor.shape}, {"data_offsets", {begin, data.size()}}};
  }
  write_text(path, safetensors_bytes(header.dump(), data));
}

/// Grouped queries, several layers, sizes that are no multiples of one another.
inline nlohmann::json small_config() {
  return {{"model_type", "llama"},
          {"vocab_size", 41},
          {"hidden_size", 48},
          {"num_hidden_layers", 3},
          {"num_attention_heads", 4},
          {"num_key_value_heads", 2},
          {"head_dim", 16},
          {"intermediate_size", 80},
          {"rope_theta", 1000.0},
          {"rms_norm_eps", 1e-5},
          {"hidden_act", "silu"},
          {"tie_word_embeddings", true},
          {"max_position_embeddings", 4096}};
}

inline NamedTensors random_weights(const nlohmann::json& config, unsigned seed) {
  std::mt19937 random(seed);
  NamedTensors tensors;
  const auto add = [&](const std::string& name, std::vector<std::int64_t> shape, float mean,
                       float deviation) {
    std::normal_distribution<float> normal(mean, deviation);
    std::int64_t count = 1;
    for (const auto dim : shape) count *= dim;
    NamedTensor tensor{std::move(shape), {}};
    for (std::int64_t i = 0; i < count; ++i) {
      // bf16's 8 bits of mantissa fit into f16's 11; f16's smaller range is far away.
      const float value = headwise::to_float(headwise::from_float<headwise::bf16>(normal(random)));
      tensor.values.push_back(std::abs(value) < 0x1p-10F ? 0.0F : value);
    }
    tensors.emplace(name, std::move(tensor));
  };
  const auto size = [&](const char* key) { return config.at(key).get<std::int64_t>(); };
  const auto linear = [&](const std::string& name, std::int64_t out, std::int64_t in) {
    add(name, {out, in}, 0.0F, 1.5F / std::sqrt(static_cast<float>(in)));
  };
  const std::int64_t hidden = size("hidden_size");
  const std::int64_t q = size("num_attention_heads") * size("head_dim");
  const std::int64_t kv = size("num_key_value_heads") * size("head_dim");
  const std::int64_t mlp = size("intermediate_size");
  add("model.embed_tokens.weight", {size("vocab_size"), hidden}, 0.0F, 0.4F);
  add("model.norm.weight", {hidden}, 1.0F, 0.2F);
  for (std::int64_t i = 0; i < size("num_hidden_layers"); ++i) {
    const std::string layer = "model.layers." + std::to_string(i) + ".";
    add(layer + "input_layernorm.weight", {hidden}, 1.0F, 0.2F);
    add(layer + "post_attention_layernorm.weight", {hidden}, 1.0F, 0.2F);
    linear(layer + "self_attn.q_proj.weight", q, hidden);
    linear(layer + "self_attn.k_proj.weight", kv, hidden);
    linear(layer + "self_attn.v_proj.weight", kv, hidden);
    linear(layer + "self_attn.o_proj.weight", hidden, q);
    linear(layer + "mlp.gate_proj.weight", mlp, hidden);
    linear(layer + "mlp.up_proj.weight", mlp, hidden);
    linear(layer + "mlp.down_proj.weight", hidden, mlp);
  }
  return tensors;
}

/// Writes model.safetensors and config.json; returns the model's path.
inline std::string write_model(const TemporaryFolder& folder, const nlohmann::json& config,
                               const NamedTensors& weights) {
  write_text(folder.file("config.json"), config.dump());
  write_safetensors<headwise::f16>(folder.file("model.safetensors"), weights, "F16");
  return folder.file("model.safetensors");
}

}  // namespace needle_lm::testing
