// SPDX-License-Identifier: MIT
#include "headwise/heads/bounded_json.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "headwise/heads/splitmix64.hpp"
#include "support/errors.hpp"

namespace headwise {
namespace {

using testing::message_of;
using ::testing::StartsWith;

std::string refusal(const std::string& text) {
  return message_of<FormatError>([&] { (void)parse_bounded_json(text, "f.json"); });
}

TEST(BoundedJson, IsTheTreeOfTheText) {
  const auto tree = parse_bounded_json(R"({"a": [1, -2.5, null, true], "b": {"a": "text"}})", "f");
  EXPECT_EQ(tree["a"].size(), 4U);
  EXPECT_EQ(tree["b"]["a"], "text");  // the same key in another object is another key
  EXPECT_EQ(parse_bounded_json(R"([{"a": 1}, {"a": 2}])", "f").size(), 2U);
  EXPECT_EQ(parse_bounded_json(std::string(32, '[') + std::string(32, ']'), "f").size(), 1U);
}

TEST(BoundedJson, RefusesWithFilePlaceAndKey) {
  EXPECT_THAT(refusal(""), StartsWith("f.json: not JSON at byte 1"));
  EXPECT_THAT(refusal("{\"a\": 1"), StartsWith("f.json: key 'a': not JSON at byte 8"));
  EXPECT_THAT(refusal("{\"a\": 1} x"), StartsWith("f.json: key 'a': not JSON at byte 10"));
  EXPECT_THAT(refusal("{\"a\": NaN}"), StartsWith("f.json: key 'a': not JSON at byte 7"));
  EXPECT_THAT(refusal("{\"a\": \"\xff\"}"), StartsWith("f.json: key 'a': not JSON at byte 8"));
  EXPECT_EQ(refusal(R"({"a": 1, "b": {"c": 1, "c": 2}})"),
            "f.json: key 'c': the key is there twice");
  EXPECT_EQ(refusal(R"({"a": 1, "\u0061": 2})"), "f.json: key 'a': the key is there twice");
  EXPECT_EQ(refusal(std::string(33, '[')), "f.json: nested deeper than 32");
  std::string objects;
  for (int i = 0; i < 100000; ++i) objects += "{\"k\":";
  EXPECT_EQ(refusal(objects), "f.json: key 'k': nested deeper than 32");
  EXPECT_EQ(refusal(std::string("{}\0", 3)), "f.json: not JSON: a NUL at byte 3");
  EXPECT_EQ(refusal(std::string(kMaxJsonBytes + 1, ' ')),
            "f.json: larger than the limit of 4194304 bytes");
}

TEST(BoundedJson, SurvivesEveryTruncationAndDamage) {
  const std::string whole = R"({"a": [1, -2.5e3, null, true], "b": {"c": "t\u0041\n"}, "d": []})";
  SplitMix64 random(5);
  const auto answers = [](const std::string& text) {
    try {
      (void)parse_bounded_json(text, "f.json");
    } catch (const FormatError&) {
    }
  };
  for (std::size_t i = 0; i < whole.size(); ++i) answers(whole.substr(0, i));
  for (int round = 0; round < 20000; ++round) {
    std::string damaged = whole;
    for (int i = 0; i <= round % 3; ++i) {
      damaged[random.next() % damaged.size()] = static_cast<char>(random.next());
    }
    answers(damaged);
  }
}

}  // namespace
}  // namespace headwise
