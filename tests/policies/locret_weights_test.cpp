// SPDX-License-Identifier: MIT
#include "headwise/policies/locret_weights.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <string>
#include <vector>

#include "support/errors.hpp"

namespace headwise {
namespace {

using ::testing::HasSubstr;

std::string safetensors(const std::string& header, const std::string& data) {
  std::string bytes;
  for (unsigned i = 0; i < 8; ++i) bytes += static_cast<char>(header.size() >> (8 * i) & 255U);
  return bytes + header + data;
}
std::string tensor(const std::string& name, const std::string& dtype, const std::string& shape,
                   const std::string& offsets) {
  return "\"model." + name + ".weight\":{\"dtype\":\"" + dtype + "\",\"shape\":" + shape +
         ",\"data_offsets\":" + offsets + "}";
}
const std::string kW1 = "layers.0.self_attn.retaining_head_w1";
const std::string kW2 = "layers.0.self_attn.retaining_head_w2";
// w1: bf16 (1, 2), (-1, 0.5); w2: f16 (1, 0), (0, -2), (0.5, 0).
const std::string kData(
    "\x80\x3F\x00\x40\x80\xBF\x00\x3F\x00\x3C\x00\x00\x00\x00\x00\xC0\x00\x38\0\0", 20);

TEST(LocretWeights, ReadsHalvesAndPassesOverOtherTensors) {
  const std::string header = "{\"__metadata__\":{\"format\":\"pt\"}," +
                             tensor("layers.0.mlp.up_proj", "I8", "[1]", "[0,1]") + "," +
                             tensor(kW2, "F16", "[3,2]", "[8,20]") + "," +
                             tensor(kW1, "BF16", "[2,2]", "[0,8]") + "}  ";
  const auto heads = locret::parse_weights(safetensors(header, kData), "w");
  ASSERT_EQ(heads.size(), 1U);
  EXPECT_EQ(heads[0].features(), 2);
  ASSERT_EQ(heads[0].num_kv_heads(), 3);
  const std::vector<float> x{1, 1};
  std::vector<float> out(3);
  heads[0].score(RowView::dense(x.data(), 1, 2), out);
  EXPECT_NEAR(out[0], 2.8577224, 1e-5);   // silu(3)
  EXPECT_NEAR(out[1], 0.37754067, 1e-5);  // -2 silu(-0.5)
  EXPECT_NEAR(out[2], 1.4288612, 1e-5);
}

TEST(LocretWeights, ReadsLayersByNumber) {
  const std::string one(4, '\0');
  std::string header = "{";
  for (int layer = 10; layer >= 0; --layer) {
    const std::string of = "layers." + std::to_string(layer) + ".self_attn.retaining_head_w";
    const auto range = [](int at) {
      return "[" + std::to_string(at) + "," + std::to_string(at + 4) + "]";
    };
    header += tensor(of + "1", "F32", "[1,1]", range(4 * layer)) + ",";
    header += tensor(of + "2", "F32", "[1,1]", range(44 + 4 * layer)) + (layer > 0 ? "," : "}");
  }
  std::string data;
  for (int layer = 0; layer <= 10; ++layer) {  // 1, 2, .. as f32
    const auto bits = std::bit_cast<std::uint32_t>(static_cast<float>(layer + 1));
    for (unsigned i = 0; i < 4; ++i) data += static_cast<char>(bits >> (8 * i) & 255U);
  }
  const auto heads = locret::parse_weights(safetensors(header, data + data), "w");
  ASSERT_EQ(heads.size(), 11U);
  const std::vector<float> x{10.0F};
  std::vector<float> out(1);
  for (std::size_t l = 0; l < heads.size(); ++l) {
    heads[l].score(RowView::dense(x.data(), 1, 1), out);
    const auto n = static_cast<float>(l + 1);
    EXPECT_NEAR(out[0], n * n * 10.0F, 1e-2F);  // silu of much is itself
  }
}

TEST(LocretWeights, ReadsNoMoreNumbersThanTheFileHolds) {
  // A header of many layers, all of the same bytes, would fill the memory from a small file.
  const auto header = [](const std::string& of_w2) {
    return "{" + tensor(kW1, "BF16", "[2,2]", "[0,8]") + "," + tensor(kW2, "F16", "[3,2]", of_w2) +
           "}";
  };
  EXPECT_EQ(testing::message_of<FormatError>([&] {
              (void)locret::parse_weights(safetensors(header("[0,12]"), kData.substr(0, 19)), "w");
            }),
            "w: layer 0 w2: bytes [0, 12) of 19, of which other tensors leave 11");
  EXPECT_EQ(locret::parse_weights(safetensors(header("[8,20]"), kData), "w").size(), 1U);
}

TEST(LocretWeights, RefusesWhatIsNoSuchFile) {
  const auto refused = [](const std::string& bytes) {
    return testing::message_of<FormatError>([&] { (void)locret::parse_weights(bytes, "w"); });
  };
  const auto of = [&](const std::string& w1, const std::string& w2) {
    return refused(safetensors("{" + w1 + "," + w2 + "}", kData));
  };
  const std::string w1 = tensor(kW1, "BF16", "[2,2]", "[0,8]");
  const std::string w2 = tensor(kW2, "F16", "[3,2]", "[8,20]");
  EXPECT_EQ(refused("abc"), "w: 3 bytes");
  EXPECT_THAT(refused(std::string(8, '\xFF')), HasSubstr("in a file of 8"));
  EXPECT_THAT(refused(safetensors("[]", "")), HasSubstr("not a JSON object"));
  EXPECT_THAT(refused(safetensors("{}", "")), HasSubstr("0 retaining_head_w1"));
  EXPECT_THAT(refused(safetensors("{" + w1 + "}", kData)), HasSubstr("0 retaining_head_w2"));
  EXPECT_THAT(of(w1, tensor("layers.1.a.retaining_head_w2", "F16", "[3,2]", "[8,20]")),
              HasSubstr("layer 0 lacks"));
  EXPECT_THAT(of(w1, tensor(kW2, "F16", "[3,2]", "[8,22]")), HasSubstr("[8, 22) of 20"));
  EXPECT_THAT(of(w1, tensor(kW2, "F16", "[3,2]", "[20,8]")), HasSubstr("[20, 8)"));
  EXPECT_THAT(of(w1, tensor(kW2, "F16", "[3,2]", "[8,18]")), HasSubstr("10 bytes of 3 x 2"));
  EXPECT_THAT(of(w1, tensor(kW2, "F16", "[2,3]", "[8,20]")), HasSubstr("w2 of 2 x 3"));
  EXPECT_THAT(of(w1, tensor(kW2, "F16", "[6]", "[8,20]")), HasSubstr("'shape'"));
  EXPECT_THAT(of(w1, tensor(kW2, "F16", "[3,-2]", "[8,20]")), HasSubstr("'shape'"));
  EXPECT_THAT(of(w1, tensor(kW2, "F16", "[18446744073709551615,2]", "[8,20]")), HasSubstr("bytes"));
  EXPECT_THAT(of(w1, tensor(kW2, "I16", "[3,2]", "[8,20]")), HasSubstr("'I16' is not F32"));
  EXPECT_THAT(refused(safetensors("{" + w1 + "," + w2 + "}", "\xFF\x7F" + kData.substr(2))),
              HasSubstr("w1: a number is not finite"));
  EXPECT_THAT(of(w1, tensor("x." + kW1, "BF16", "[2,2]", "[0,8]")), HasSubstr("twice"));
  EXPECT_THROW((void)locret::load_weights("/nowhere/weights"), ConfigError);
}

}  // namespace
}  // namespace headwise
