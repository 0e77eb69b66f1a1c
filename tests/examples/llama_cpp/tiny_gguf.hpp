// SPDX-License-Identifier: MIT
/// @file tiny_gguf.hpp
/// Writes models of a few kilobytes with random weights, of any kind that llama.cpp knows.
#pragma once

#include <ggml.h>
#include <gguf.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace in_llama::test {

/// Keys of a GGUF file; those of the architecture without its name in front.
class TinyGguf {
 public:
  explicit TinyGguf(std::string architecture) : architecture_(std::move(architecture)) {
    gguf_set_val_str(file(), "general.architecture", architecture_.c_str());
    gguf_set_val_str(file(), "tokenizer.ggml.model", "no_vocab");
    set("vocab_size", kVocab);
    set("context_length", 512);
    set("embedding_length", kHidden);
    set("block_count", kLayers);
    set("feed_forward_length", kMlp);
    set("attention.head_count", kHeads);
    set("attention.head_count_kv", kKvHeads);
    set_float("attention.layer_norm_rms_epsilon", 1e-5F);
  }
  void set(const std::string& key, std::uint32_t value) {
    gguf_set_val_u32(file(), (architecture_ + "." + key).c_str(), value);
  }
  void set_float(const std::string& key, float value) {
    gguf_set_val_f32(file(), (architecture_ + "." + key).c_str(), value);
  }

  /// The weights of a llama.
  void add_llama() {
    add("token_embd", kHidden, kVocab);
    add("output_norm", kHidden);
    for (std::uint32_t l = 0; l < kLayers; ++l) {
      const std::string layer = "blk." + std::to_string(l) + ".";
      add(layer + "attn_norm", kHidden);
      add(layer + "attn_q", kHidden, kHeads * kDim);
      add(layer + "attn_k", kHidden, kKvHeads * kDim);
      add(layer + "attn_v", kHidden, kKvHeads * kDim);
      add(layer + "attn_output", kHeads * kDim, kHidden);
      add(layer + "ffn_norm", kHidden);
      add(layer + "ffn_gate", kHidden, kMlp);
      add(layer + "ffn_up", kHidden, kMlp);
      add(layer + "ffn_down", kMlp, kHidden);
    }
  }

  /// The weights of a bloom, whose attention is ALiBi; as many KV heads as query heads.
  void add_bloom() {
    set("attention.head_count_kv", kHeads);
    set_float("attention.layer_norm_epsilon", 1e-5F);
    const auto add_with_bias = [this](const std::string& name, std::uint32_t in,
                                      std::uint32_t out = 1) {
      add(name, in, out);
      add(name, out == 1 ? in : out, 1, ".bias");
    };
    add("token_embd", kHidden, kVocab);
    add_with_bias("token_embd_norm", kHidden);
    add_with_bias("output_norm", kHidden);
    for (std::uint32_t l = 0; l < kLayers; ++l) {
      const std::string layer = "blk." + std::to_string(l) + ".";
      add_with_bias(layer + "attn_norm", kHidden);
      add_with_bias(layer + "attn_qkv", kHidden, 3 * kHeads * kDim);
      add_with_bias(layer + "attn_output", kHeads * kDim, kHidden);
      add_with_bias(layer + "ffn_norm", kHidden);
      add_with_bias(layer + "ffn_up", kHidden, kMlp);
      add_with_bias(layer + "ffn_down", kMlp, kHidden);
    }
  }

  /// The weights of a gemma2, of whose layers every second one has a window of `window` tokens.
  void add_gemma2(std::uint32_t window) {
    set("attention.sliding_window", window);
    set_float("attn_logit_softcapping", 5.0F);
    set_float("final_logit_softcapping", 30.0F);
    add_llama();
    for (std::uint32_t l = 0; l < kLayers; ++l) {
      const std::string layer = "blk." + std::to_string(l) + ".";
      add(layer + "post_attention_norm", kHidden);
      add(layer + "post_ffw_norm", kHidden);
    }
  }

  /// @return where it was written
  std::string write(const std::string& name) const {
    // Of this process alone, and gone with it: tests run beside each other, and models are mapped.
    static const struct Files {
      std::string prefix = ::testing::TempDir() + "headwise_" + std::to_string(::getpid()) + "_";
      mutable std::set<std::string> paths{};
      ~Files() {
        for (const std::string& path : paths) std::remove(path.c_str());
      }
    } files;
    const std::string path = files.prefix + name + ".gguf";
    files.paths.insert(path);
    EXPECT_TRUE(gguf_write_to_file(file_.get(), path.c_str(), false));
    return path;
  }

  static constexpr std::uint32_t kVocab = 96, kHidden = 128, kLayers = 3, kMlp = 192;
  static constexpr std::uint32_t kHeads = 4, kKvHeads = 2, kDim = 32;

 private:
  gguf_context* file() { return file_.get(); }

  /// A matrix, or with one column a norm's gain or a bias.
  void add(const std::string& name, std::uint32_t in, std::uint32_t out = 1,
           const char* what = ".weight") {
    ggml_tensor* tensor = out == 1 ? ggml_new_tensor_1d(context_.get(), GGML_TYPE_F32, in)
                                   : ggml_new_tensor_2d(context_.get(), GGML_TYPE_F32, in, out);
    ggml_set_name(tensor, (name + what).c_str());
    auto* data = static_cast<float*>(tensor->data);
    // Peaked enough that what a head sees matters.
    std::normal_distribution<float> normal(0.0F, 2.5F / std::sqrt(static_cast<float>(in)));
    for (std::int64_t i = 0; i < ggml_nelements(tensor); ++i) {
      data[i] = out == 1 ? 1.0F : normal(random_);
    }
    gguf_add_tensor(file(), tensor);
  }

  std::string architecture_;
  std::mt19937 random_{7};
  std::unique_ptr<gguf_context, decltype(&gguf_free)> file_{gguf_init_empty(), &gguf_free};
  std::unique_ptr<ggml_context, decltype(&ggml_free)> context_{
      ggml_init({std::size_t{16} << 20, nullptr, false}), &ggml_free};
};

inline std::string tiny_llama() {
  TinyGguf gguf("llama");
  gguf.add_llama();
  return gguf.write("llama");
}

}  // namespace in_llama::test
