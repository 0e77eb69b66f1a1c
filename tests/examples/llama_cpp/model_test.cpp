// SPDX-License-Identifier: MIT
#include "model.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <string>

#include "support/errors.hpp"
#include "tiny_gguf.hpp"

namespace in_llama::test {
namespace {

using ::testing::EndsWith;
using ::testing::HasSubstr;

std::string refusal(const std::string& path) {
  return headwise::testing::message_of<headwise::ConfigError>([&] { Model model(path); });
}

TEST(InLlamaModel, SaysWhatTheEngineAsksOfEveryLayer) {
  const Model model(tiny_llama());
  headwise::LayerShape layer{2, 2, 32, 32};
  layer.sm_scale = layer.scale();
  EXPECT_EQ(model.shape(), headwise::ModelShape(std::vector(3, layer)));
}

TEST(InLlamaModel, RefusesWhatIsNoModel) {
  EXPECT_EQ(refusal("/no/such.gguf"), "/no/such.gguf: no such file, expected a GGUF model");
  const std::string text = ::testing::TempDir() + "headwise_text.gguf";
  std::ofstream(text) << "not a model, whatever its name says\n";
  EXPECT_THAT(refusal(text), HasSubstr("llama.cpp cannot load it: "));
  EXPECT_THAT(refusal(TinyGguf("no_such_architecture").write("unknown")),
              HasSubstr("llama.cpp cannot load it: "));
  EXPECT_THAT(refusal(TinyGguf("llama").write("without_weights")),
              HasSubstr("llama.cpp cannot load it: "));
}

TEST(InLlamaModel, RefusesRecurrentLayers) {
  TinyGguf gguf("mamba");
  gguf.set("ssm.conv_kernel", 4);
  gguf.set("ssm.inner_size", 256);
  gguf.set("ssm.state_size", 16);
  gguf.set("ssm.time_step_rank", 8);
  EXPECT_THAT(refusal(gguf.write("mamba")),
              EndsWith("layers with a recurrent state, expected K and V in every layer"));
}

TEST(InLlamaModel, RefusesAnEncoder) {
  TinyGguf gguf("t5");
  gguf.set("attention.relative_buckets_count", 32);
  EXPECT_THAT(refusal(gguf.write("t5")),
              EndsWith("a model with an encoder, expected a decoder alone"));
}

TEST(InLlamaModel, RefusesLatentAttention) {
  TinyGguf gguf("minicpm3");
  gguf.set("attention.q_lora_rank", 32);
  gguf.set("attention.kv_lora_rank", 32);
  EXPECT_THAT(refusal(gguf.write("minicpm3")),
              EndsWith("latent attention (MLA), which has no KV heads to plan for"));
}

}  // namespace
}  // namespace in_llama::test
