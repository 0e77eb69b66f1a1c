// SPDX-License-Identifier: MIT
// Writes needle_lm's trained model as llama2.c's fp32 file, and one of its documents as a prompt
// and the right answer to it.
//
//     export_model NEEDLE_LM_FOLDER OUT_FOLDER
//
// Two conventions differ. Llama in HuggingFace's files rotates dimensions i and i + head_dim / 2 of
// a head together, llama2.c 2i and 2i + 1: the rows of wq and wk are put in that order, which
// changes no product of a query and a key. And the base of the rotary angles has no place in the
// file: llama2.c takes 10000 for granted, this model needs 500000 (rope_theta in its config.json).
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <fstream>
#include <string>
#include <vector>

#include "../needle_lm/config.hpp"
#include "../needle_lm/safetensors.hpp"

namespace {

using Floats = std::vector<float>;

/// [rows, columns], every head's rows i and i + head_dim / 2 brought together.
Floats interleaved(const Floats& weight, std::size_t columns, std::size_t head_dim) {
  Floats out(weight.size());
  for (std::size_t row = 0; row < weight.size() / columns; ++row) {
    const std::size_t d = row % head_dim;
    const std::size_t from = row - d + d / 2 + (d % 2) * (head_dim / 2);
    for (std::size_t i = 0; i < columns; ++i) {
      out[row * columns + i] = weight[from * columns + i];
    }
  }
  return out;
}

void write_model(const std::string& folder, const std::string& path) {
  const needle_lm::ModelConfig config = needle_lm::load_config(folder + "/model/config.json");
  const needle_lm::SafeTensors tensors(folder + "/model/model.safetensors");
  std::ofstream out(path, std::ios::binary);
  out.exceptions(std::ios::failbit | std::ios::badbit);
  const auto write = [&](const auto& values) {
    out.write(reinterpret_cast<const char*>(values.data()),
              static_cast<std::streamsize>(values.size() * sizeof values[0]));
  };
  const std::int64_t dim = config.hidden_size;
  const auto columns = static_cast<std::size_t>(dim);
  const auto head_dim = static_cast<std::size_t>(config.head_dim);
  if (config.head_dim * config.num_qo_heads != config.hidden_size) {
    headwise::fail<headwise::FormatError>("llama2.c's heads have dim / n_heads features");
  }

  write(std::vector<std::int32_t>{config.hidden_size, config.intermediate_size, config.num_layers,
                                  config.num_qo_heads, config.num_kv_heads, config.vocab_size,
                                  config.max_context});
  write(tensors.floats("model.embed_tokens.weight", {config.vocab_size, dim}));
  // One kind of weight after the other, each for all layers.
  const auto write_layers = [&](const std::string& name, const std::vector<std::int64_t>& shape,
                                bool rotated = false) {
    for (int layer = 0; layer < config.num_layers; ++layer) {
      const auto full = "model.layers." + std::to_string(layer) + "." + name + ".weight";
      const Floats weight = tensors.floats(full, shape);
      write(rotated ? interleaved(weight, columns, head_dim) : weight);
    }
  };
  write_layers("input_layernorm", {dim});
  write_layers("self_attn.q_proj", {config.q_size(), dim}, true);
  write_layers("self_attn.k_proj", {config.kv_size(), dim}, true);
  write_layers("self_attn.v_proj", {config.kv_size(), dim});
  write_layers("self_attn.o_proj", {dim, config.q_size()});
  write_layers("post_attention_layernorm", {dim});
  write_layers("mlp.gate_proj", {config.intermediate_size, dim});
  write_layers("mlp.down_proj", {dim, config.intermediate_size});
  write_layers("mlp.up_proj", {config.intermediate_size, dim});
  write(tensors.floats("model.norm.weight", {dim}));
  write(Floats(static_cast<std::size_t>(config.max_context) * head_dim));  // cos, sin: never read
}

void write_tokens(const std::string& path, const std::int32_t* first, const std::int32_t* last) {
  std::ofstream out(path);
  out.exceptions(std::ios::failbit | std::ios::badbit);
  for (; first != last; ++first) out << *first << (first + 1 == last ? '\n' : ' ');
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc != 3) return std::fprintf(stderr, "export_model NEEDLE_LM_FOLDER OUT_FOLDER\n"), 1;
  const std::string folder = argv[1];
  const std::string out = argv[2];
  write_model(folder, out + "/model.bin");

  // 8 passkeys in filler, and a question for one of them.
  const needle_lm::SafeTensors golden(folder + "/data/golden.safetensors");
  const auto tokens = golden.integers("passkey.tokens", golden.shape("passkey.tokens"));
  const std::int32_t prompt = golden.integers("passkey.prompt_length", {1})[0];
  const std::int32_t answer = golden.integers("passkey.answer_length", {1})[0];
  write_tokens(out + "/prompt.txt", tokens.data(), tokens.data() + prompt);
  write_tokens(out + "/answer.txt", tokens.data() + prompt, tokens.data() + prompt + answer);
  return 0;
} catch (const std::exception& error) {
  return std::fprintf(stderr, "%s\n", error.what()), 1;
}
