// SPDX-License-Identifier: MIT
/// @file config.hpp
/// The model's geometry, read from HuggingFace's config.json.
#pragma once

#include <cmath>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>

#include "files.hpp"
#include "headwise/core/check.hpp"
#include "headwise/core/shape.hpp"
#include "headwise/heads/bounded_json.hpp"

namespace needle_lm {

struct ModelConfig {
  int vocab_size = 0;
  int hidden_size = 0;
  int num_layers = 0;
  int num_qo_heads = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  int intermediate_size = 0;
  int max_context = 0;  ///< longest trained context, in tokens
  double rope_theta = 0.0;
  float norm_epsilon = 0.0F;

  int q_size() const { return num_qo_heads * head_dim; }
  int kv_size() const { return num_kv_heads * head_dim; }

  /// The one description of the model that Headwise needs.
  headwise::ModelShape shape() const {
    return headwise::ModelShape::uniform(num_layers, num_qo_heads, num_kv_heads, head_dim);
  }
};

namespace detail {

/// Fields of a JSON object, each with its limits.
struct ConfigFields {
  const std::string& path;
  const nlohmann::json& json;

  int integer(const char* key, int highest) const {
    const auto found = json.find(key);
    if (found == json.end()) headwise::fail<headwise::FormatError>(path, ": no \"", key, "\"");
    if (!found->is_number_unsigned() || found->get<std::uint64_t>() < 1 ||
        found->get<std::uint64_t>() > static_cast<std::uint64_t>(highest)) {
      headwise::fail<headwise::FormatError>(path, ": \"", key, "\" is ", brief(*found),
                                            ", expected an integer in 1..", highest);
    }
    return found->get<int>();
  }

  double positive(const char* key, double highest) const {
    const auto found = json.find(key);
    if (found == json.end()) headwise::fail<headwise::FormatError>(path, ": no \"", key, "\"");
    const double value = found->is_number() ? found->get<double>() : 0.0;
    if (!(value > 0.0 && value <= highest)) {
      headwise::fail<headwise::FormatError>(path, ": \"", key, "\" is ", brief(*found),
                                            ", expected a number in (0, ", highest, "]");
    }
    return value;
  }

  /// What this decoder does not do must not be asked for.
  void require(const char* key, const nlohmann::json& only) const {
    const auto found = json.find(key);
    if (found != json.end() && *found != only) {
      headwise::fail<headwise::FormatError>(path, ": \"", key, "\" is ", brief(*found),
                                            ", this decoder knows only ", brief(only));
    }
  }
};

}  // namespace detail

/// @throws FormatError for a missing field, one out of range, or a model of another kind.
inline ModelConfig load_config(const std::string& path) {
  const std::vector<char> text = read_file(path, headwise::kMaxJsonBytes);
  const auto json = headwise::parse_bounded_json({text.data(), text.size()}, path);
  if (!json.is_object()) headwise::fail<headwise::FormatError>(path, ": no JSON object");
  const detail::ConfigFields fields{path, json};
  fields.require("model_type", "llama");
  fields.require("hidden_act", "silu");
  fields.require("tie_word_embeddings", true);
  fields.require("attention_bias", false);
  fields.require("mlp_bias", false);
  fields.require("rope_scaling", nullptr);

  // Limits far above any model, far below an overflow of the products formed from them.
  ModelConfig config;
  config.vocab_size = fields.integer("vocab_size", 1 << 20);
  config.hidden_size = fields.integer("hidden_size", 1 << 16);
  config.num_layers = fields.integer("num_hidden_layers", 1 << 10);
  config.num_qo_heads = fields.integer("num_attention_heads", 1 << 10);
  config.num_kv_heads = fields.integer("num_key_value_heads", config.num_qo_heads);
  config.head_dim = json.contains("head_dim") ? fields.integer("head_dim", 1 << 10)
                                              : config.hidden_size / config.num_qo_heads;
  config.intermediate_size = fields.integer("intermediate_size", 1 << 18);
  config.max_context = fields.integer("max_position_embeddings", 1 << 20);
  config.rope_theta = fields.positive("rope_theta", 1e12);
  config.norm_epsilon = static_cast<float>(fields.positive("rms_norm_eps", 1.0));
  return config;
}

}  // namespace needle_lm
