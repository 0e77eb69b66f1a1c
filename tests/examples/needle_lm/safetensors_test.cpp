// SPDX-License-Identifier: MIT
// Files that are what they say, and files that are not.
#include "safetensors.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>
#include <string>
#include <vector>

#include "config.hpp"
#include "random_model.hpp"
#include "weights.hpp"

namespace needle_lm::testing {
namespace {

using ::testing::HasSubstr;

class SafeTensorsTest : public ::testing::Test {
 protected:
  SafeTensors read(const std::string& bytes) {
    write_text(folder_.file("t.safetensors"), bytes);
    return SafeTensors(folder_.file("t.safetensors"));
  }

  /// What the reader says to a file with this header and 8 bytes of data.
  std::string refusal(const std::string& header) {
    return refusal_of(safetensors_bytes(header, std::string(8, 'x')));
  }
  std::string refusal_of(const std::string& bytes) {
    try {
      const SafeTensors file = read(bytes);
      file.floats("t", {2});
    } catch (const headwise::FormatError& error) {
      return error.what();
    }
    return "accepted";
  }

  TemporaryFolder folder_;
};

TEST_F(SafeTensorsTest, ReadsAllFloatTypesAndIntegers) {
  const NamedTensors tensors{{"a", {{2, 3}, {1.0F, -0.5F, 0.0F, 3.25F, 96.0F, -0.0625F}}},
                             {"b", {{1}, {7.0F}}},
                             {"empty", {{0, 4}, {}}}};
  const auto check = [&] {
    const SafeTensors file(folder_.file("t"));
    EXPECT_EQ(file.floats("a", {2, 3}), tensors.at("a").values);
    EXPECT_EQ(file.floats("b", {1}), tensors.at("b").values);
    EXPECT_TRUE(file.floats("empty", {0, 4}).empty());
  };
  write_safetensors<headwise::f16>(folder_.file("t"), tensors, "F16");
  check();
  write_safetensors<headwise::bf16>(folder_.file("t"), tensors, "BF16");
  check();
  write_safetensors<float>(folder_.file("t"), tensors, "F32");
  check();

  const SafeTensors file = read(safetensors_bytes(
      R"({"__metadata__": {"a": "b"},
          "u": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
          "i": {"dtype": "I32", "shape": [1], "data_offsets": [3, 7]}})",
      std::string("\x01\xff\x07\xfe\xff\xff\xff", 7)));
  EXPECT_EQ(file.integers("u", {3}), (std::vector<std::int32_t>{1, 255, 7}));
  EXPECT_EQ(file.integers("i", {1}), (std::vector<std::int32_t>{-2}));  // at an odd address
}

TEST_F(SafeTensorsTest, RefusesLengthsBeyondTheFile) {
  EXPECT_THAT(refusal_of(""), HasSubstr("at least 8 bytes, this one 0"));
  EXPECT_THAT(refusal_of("1234567"), HasSubstr("this one 7"));
  EXPECT_THAT(refusal_of(safetensors_bytes("{}", "", 3)), HasSubstr("header of 3 bytes"));
  EXPECT_THAT(refusal_of(safetensors_bytes("{}", "", ~std::uint64_t{0})),
              HasSubstr("header of 18446744073709551615 bytes in a file of 10"));
  EXPECT_THAT(refusal_of(safetensors_bytes("{}", "", ~std::uint64_t{7})), HasSubstr("in a file"));
}

TEST_F(SafeTensorsTest, RefusesHeadersThatAreNoJsonObject) {
  EXPECT_THAT(refusal(""), HasSubstr("t.safetensors: header: not JSON at byte 1"));
  EXPECT_THAT(refusal("[]"), HasSubstr("no JSON object"));
  EXPECT_THAT(refusal("{\"t\": "), HasSubstr("header: key 't': not JSON"));
  EXPECT_THAT(refusal(std::string(1 << 20, '[')), HasSubstr("header: nested deeper than 32"));
  EXPECT_THAT(refusal("{\"\xff\": 1}"), HasSubstr("header: not JSON"));
  EXPECT_THAT(refusal("{}"), HasSubstr("no tensor named t"));
  const std::string deep = std::string(1 << 20, '[') + std::string(1 << 20, ']');
  EXPECT_THAT(refusal("{\"t\": " + deep + "}"), HasSubstr("key 't': nested deeper than 32"));
  EXPECT_THAT(refusal(std::string((4 << 20) + 1, ' ')), HasSubstr("larger than the limit of"));
  const std::string t = R"("t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]})";
  EXPECT_EQ(refusal("{" + t + "}"), "accepted");
  EXPECT_THAT(refusal("{" + t + ", " + t + "}"), HasSubstr("key 't': the key is there twice"));
  EXPECT_THAT(refusal("{" + t + "}" + std::string(1, '\0') + "x"), HasSubstr("a NUL at byte"));
}

TEST_F(SafeTensorsTest, RefusesEntriesOfWrongTypes) {
  for (const char* entry :
       {"1", "null", "{}", R"({"dtype": 1, "shape": [2], "data_offsets": [0, 8]})",
        R"({"dtype": "F32", "shape": 2, "data_offsets": [0, 8]})",
        R"({"dtype": "F32", "shape": [2], "data_offsets": [0]})",
        R"({"dtype": "F32", "shape": [2], "data_offsets": [0, -8]})",
        R"({"dtype": "F32", "shape": [2], "data_offsets": [0, 8.0]})",
        R"({"dtype": "F32", "shape": [2], "data_offsets": [0, 1e30]})"}) {
    EXPECT_THAT(refusal(std::string("{\"t\": ") + entry + "}"), HasSubstr("'t': expected {dtype"))
        << entry;
  }
}

TEST_F(SafeTensorsTest, RefusesOffsetsAndShapesThatDoNotFit) {
  const auto entry = [](const std::string& dtype, const std::string& shape,
                        const std::string& offsets) {
    return R"({"t": {"dtype": ")" + dtype + R"(", "shape": )" + shape + R"(, "data_offsets": )" +
           offsets + "}}";
  };
  EXPECT_EQ(refusal(entry("F32", "[2]", "[0, 8]")), "accepted");
  EXPECT_THAT(refusal(entry("F32", "[2]", "[1, 9]")), HasSubstr("offsets [1, 9) in 8 bytes"));
  EXPECT_THAT(refusal(entry("F32", "[2]", "[8, 0]")), HasSubstr("offsets [8, 0)"));
  EXPECT_THAT(refusal(entry("F32", "[2]", "[18446744073709551608, 18446744073709551615]")),
              HasSubstr("in 8 bytes"));
  EXPECT_THAT(refusal(entry("F32", "[1]", "[0, 8]")), HasSubstr("need 4 bytes, offsets give 8"));
  EXPECT_THAT(refusal(entry("F32", "[4294967296, 4294967298]", "[0, 8]")),
              HasSubstr("dimension 4294967296"));
  EXPECT_THAT(refusal(entry("F32", "[2, 4611686018427387905]", "[0, 8]")), HasSubstr("dimension"));
  EXPECT_THAT(refusal(entry("F32", "[-2]", "[0, 8]")), HasSubstr("-2 is no natural number"));
  EXPECT_THAT(refusal(entry("F32", "[[2]]", "[0, 8]")), HasSubstr("array is no natural number"));
  EXPECT_THAT(refusal(entry("F64", "[1]", "[0, 8]")), HasSubstr("shape [1], expected [2]"));
  EXPECT_THAT(refusal(entry("I32", "[2]", "[0, 8]")), HasSubstr("dtype I32, expected F32"));
  EXPECT_THAT(refusal(entry("F31", "[2]", "[0, 8]")), HasSubstr("unknown dtype 'F31'"));

  // What a file says is shown short and printable.
  const std::string wild = "\\u001b[31m" + std::string(300'000, 'x');
  std::string ones = "[1";
  for (int i = 0; i < 100'000; ++i) ones += ", 1";
  ones += "]";
  for (const std::string& header :
       {"{\"" + wild + "\": 5}", entry(wild, "[1]", "[0, 4]"), entry("F64", ones, "[0, 8]")}) {
    const std::string message = refusal(header);
    EXPECT_LT(message.size(), 400U);
    EXPECT_EQ(message.find('\x1b'), std::string::npos);
  }
}

TEST_F(SafeTensorsTest, HoldsNoMoreNumbersThanTheFile) {
  // Many tensors of the same bytes would fill the memory from a small file.
  EXPECT_THAT(refusal(R"({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
                          "t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}})"),
              HasSubstr("'t': 8 bytes of 8, of which other tensors leave 4"));
}

TEST_F(SafeTensorsTest, SurvivesDamagedFiles) {
  const NamedTensors tensors{{"t", {{2}, {1.0F, 2.0F}}}, {"u", {{4}, {1.0F, 2.0F, 3.0F, 4.0F}}}};
  write_safetensors<float>(folder_.file("t"), tensors, "F32");
  const std::vector<char> whole = read_file(folder_.file("t"), 1 << 20);
  std::mt19937 random(3);
  for (int round = 0; round < 1000; ++round) {
    std::string damaged(whole.begin(), whole.end());
    for (int i = 0; i < 1 + round % 3; ++i)
      damaged[random() % damaged.size()] = static_cast<char>(random());
    if (round % 2 == 0) damaged.resize(random() % damaged.size());
    refusal_of(damaged);  // an answer, whichever; sanitizers watch
  }
}

TEST_F(SafeTensorsTest, NamesFilesThatAreNotThere) {
  EXPECT_THROW(SafeTensors(folder_.file("absent")), headwise::FormatError);
  EXPECT_THROW(SafeTensors(folder_.file("")), headwise::FormatError);  // a folder
}

TEST_F(SafeTensorsTest, RefusesFilesBeyondItsLimit) {
  write_text(folder_.file("big"), std::string(101, 'x'));
  EXPECT_EQ(read_file(folder_.file("big"), 101).size(), 101U);
  try {
    read_file(folder_.file("big"), 100);
    ADD_FAILURE() << "accepted";
  } catch (const headwise::FormatError& error) {
    EXPECT_THAT(error.what(), HasSubstr("big: 101 bytes, more than the limit of 100"));
  }
  std::filesystem::resize_file(folder_.file("big"), SafeTensors::kMaxBytes + 1);  // sparse
  EXPECT_THROW(SafeTensors(folder_.file("big")), headwise::FormatError);
}

TEST_F(SafeTensorsTest, RefusesConfigsThatNestOrRepeat) {
  const auto refusal_of_config = [&](const std::string& text) {
    write_text(folder_.file("config.json"), text);
    try {
      load_config(folder_.file("config.json"));
    } catch (const headwise::FormatError& error) {
      return std::string(error.what());
    }
    return std::string("accepted");
  };
  EXPECT_THAT(refusal_of_config("{\"vocab_size\": " + std::string(200000, '[')),
              HasSubstr("config.json: key 'vocab_size': nested deeper than 32"));
  EXPECT_THAT(refusal_of_config(R"({"vocab_size": 41, "vocab_size": 42})"),
              HasSubstr("key 'vocab_size': the key is there twice"));
  EXPECT_THAT(
      refusal_of_config("{\"model_type\": \"" + std::string(100000, 'x') + "\"}"),
      ::testing::AllOf(HasSubstr("xxx..."), ::testing::Not(HasSubstr(std::string(50, 'x')))));
  EXPECT_THAT(refusal_of_config(std::string(60 << 20, ' ')), HasSubstr("more than the limit"));
  EXPECT_THAT(refusal_of_config("{}x"), HasSubstr("config.json: not JSON at byte 3"));
}

TEST_F(SafeTensorsTest, RefusesModelsThatTheConfigDoesNotDescribe) {
  const nlohmann::json config = small_config();
  const NamedTensors weights = random_weights(config, 1);
  const auto refusal_of_model = [&](const nlohmann::json& said, const NamedTensors& stored) {
    try {
      load_model(write_model(folder_, said, stored));
    } catch (const headwise::FormatError& error) {
      return std::string(error.what());
    }
    return std::string("accepted");
  };
  EXPECT_EQ(refusal_of_model(config, weights), "accepted");

  const auto with = [&](const char* key, const nlohmann::json& value) {
    nlohmann::json changed = config;
    changed[key] = value;
    return refusal_of_model(changed, weights);
  };
  EXPECT_THAT(with("vocab_size", 40),
              HasSubstr("embed_tokens.weight: shape [41, 48], expected [40, 48]"));
  EXPECT_THAT(with("vocab_size", 1 << 20), HasSubstr("expected [1048576, 48]"));
  EXPECT_THAT(with("intermediate_size", 1 << 18), HasSubstr("expected [262144, 48]"));
  EXPECT_THAT(with("num_hidden_layers", 4), HasSubstr("no tensor named model.layers.3"));
  EXPECT_THAT(with("num_hidden_layers", 0),
              HasSubstr("\"num_hidden_layers\" is 0, expected an integer in 1..1024"));
  EXPECT_THAT(with("hidden_size", -1), HasSubstr("\"hidden_size\" is -1"));
  EXPECT_THAT(with("hidden_size", "48"), HasSubstr("\"hidden_size\" is \"48\""));
  EXPECT_THAT(with("num_key_value_heads", 5), HasSubstr("in 1..4"));
  EXPECT_THAT(with("rope_theta", 0), HasSubstr("\"rope_theta\" is 0"));
  EXPECT_THAT(with("rms_norm_eps", nlohmann::json::array()),
              HasSubstr("\"rms_norm_eps\" is array"));
  EXPECT_THAT(with("model_type", "gpt2"), HasSubstr("knows only \"llama\""));
  EXPECT_THAT(with("tie_word_embeddings", false), HasSubstr("knows only true"));
  nlohmann::json short_config = config;
  short_config.erase("head_dim");
  short_config.erase("intermediate_size");
  EXPECT_THAT(refusal_of_model(short_config, weights), HasSubstr("no \"intermediate_size\""));
}

}  // namespace
}  // namespace needle_lm::testing
