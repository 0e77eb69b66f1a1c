// SPDX-License-Identifier: MIT
#include "headwise/policies/multi_passkey.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "support/errors.hpp"

namespace headwise {
namespace {

using duo_attention::MultiPasskey;
using duo_attention::PasskeyOptions;

/// A token is a byte; hay is beyond bytes.
std::vector<std::int32_t> bytes_of(std::string_view text) { return {text.begin(), text.end()}; }
constexpr std::int32_t kHay = 1000;

std::vector<std::int32_t> numbered_hay(std::int64_t length) {
  std::vector<std::int32_t> hay(static_cast<std::size_t>(length));
  std::iota(hay.begin(), hay.end(), kHay);
  return hay;
}

PasskeyOptions short_texts() {
  PasskeyOptions options;
  options.num_passkeys = 3;
  options.passkey_words = 2;
  options.min_length = 1000;
  options.max_length = 3000;
  options.num_lengths = 5;
  return options;
}

/// Bytes as they are, each stretch of hay as one "#".
std::string readable(const std::vector<std::int32_t>& tokens) {
  std::string text;
  for (const std::int32_t token : tokens) {
    if (token < kHay) text += static_cast<char>(token);
    if (token >= kHay && (text.empty() || text.back() != '#')) text += '#';
  }
  return text;
}

TEST(MultiPasskey, AsksForEachNeedleInTheOrderOfTheText) {
  MultiPasskey texts(short_texts(), numbered_hay(3000), bytes_of);
  const duo_attention::LabelledText text = texts.next();
  const std::string read = readable(text.tokens);
  const auto passkey = [&](const std::string& before) {
    const std::size_t at = read.find(before);
    EXPECT_NE(at, std::string::npos) << before;
    const std::size_t begin = at + before.size();
    return read.substr(begin, read.find('\n', begin) - begin);
  };
  std::string expected = duo_attention::PasskeyPhrases{}.intro;
  std::string tail = duo_attention::PasskeyPhrases{}.outro;
  std::set<std::string> passkeys;
  for (const std::string ordinal : {"first", "second", "third"}) {
    const std::string words = passkey("The " + ordinal + " passkey is: ");
    EXPECT_EQ(std::ranges::count(words, ' '), 1) << words;
    passkeys.insert(words);
    expected += "#\n\nThe " + ordinal + " passkey is: " + words + "\n\n";
    tail += "What is the " + ordinal + " passkey? It is: " + words + "\n\n";
  }
  EXPECT_EQ(read, expected + "#" + tail);
  EXPECT_EQ(passkeys.size(), 3U);
}

/// Hay goes on where it was interrupted, and is as long as the rest leaves room for.
TEST(MultiPasskey, HasTheLengthsOfTheOptionsAndAllOfTheHay) {
  MultiPasskey texts(short_texts(), numbered_hay(3000), bytes_of);
  std::set<std::size_t> lengths;
  for (int i = 0; i < 60; ++i) {
    const auto tokens = texts.next().tokens;
    lengths.insert(tokens.size());
    std::int32_t next = kHay;
    for (const std::int32_t token : tokens) {
      if (token < kHay) continue;
      ASSERT_EQ(token, next);
      ++next;
    }
  }
  EXPECT_EQ(lengths, (std::set<std::size_t>{1000, 1500, 2000, 2500, 3000}));
}

TEST(MultiPasskey, HidesNeedlesBetweenTheDepths) {
  PasskeyOptions options = short_texts();
  options.min_depth = 0.25;
  options.max_depth = 0.75;
  options.num_depths = 3;  // all three are drawn: 0.25, 0.5, 0.75
  MultiPasskey texts(options, numbered_hay(3000), bytes_of);
  const auto tokens = texts.next().tokens;
  const auto hay = std::ranges::count_if(tokens, [](std::int32_t t) { return t >= kHay; });
  std::vector<std::int32_t> before;  // hay before each needle
  for (std::size_t i = 1; i < tokens.size(); ++i) {
    if (tokens[i - 1] >= kHay && tokens[i] < kHay) before.push_back(tokens[i - 1] - kHay + 1);
  }
  ASSERT_EQ(before.size(), 4U);  // three needles and the outro
  for (std::size_t i = 0; i < 3; ++i) {
    EXPECT_EQ(before[i], static_cast<std::int32_t>((0.25 + 0.25 * static_cast<double>(i)) *
                                                   static_cast<double>(hay)));
  }
}

TEST(MultiPasskey, LabelsTheTailAsTheCodeOrThePasskeysAsThePaper) {
  for (const bool label_questions : {true, false}) {
    PasskeyOptions options = short_texts();
    options.label_questions = label_questions;
    MultiPasskey texts(options, numbered_hay(3000), bytes_of);
    const duo_attention::LabelledText text = texts.next();
    std::vector<std::int32_t> labelled;
    for (const std::int64_t i : text.labelled) {
      labelled.push_back(text.tokens[static_cast<std::size_t>(i)]);
    }
    const std::string read = readable(text.tokens);
    std::string tail = read.substr(read.find("What is the first"));
    if (!label_questions) {
      std::string passkeys;
      for (std::size_t at = tail.find("is: "); at != std::string::npos; at = tail.find("is: ")) {
        tail = tail.substr(at + 4);
        passkeys += tail.substr(0, tail.find('\n'));
      }
      tail = passkeys;
    }
    EXPECT_EQ(readable(labelled), tail);
    EXPECT_TRUE(std::ranges::is_sorted(text.labelled));
  }
}

TEST(MultiPasskey, DrawsAnewEachTimeAndTheSameForASeed) {
  MultiPasskey texts(short_texts(), numbered_hay(3000), bytes_of);
  MultiPasskey same(short_texts(), numbered_hay(3000), bytes_of);
  PasskeyOptions options = short_texts();
  options.seed = 43;
  MultiPasskey other(options, numbered_hay(3000), bytes_of);
  const auto first = texts.next().tokens;
  EXPECT_EQ(first, same.next().tokens);
  EXPECT_NE(first, texts.next().tokens);
  EXPECT_NE(first, other.next().tokens);
}

TEST(MultiPasskey, RefusesWhatDoesNotFit) {
  const auto message = [](const PasskeyOptions& options, std::int64_t hay) {
    return testing::message_of<ConfigError>([&] {
      MultiPasskey texts(options, numbered_hay(hay), bytes_of);
      for (int i = 0; i < 50; ++i) (void)texts.next();
    });
  };
  PasskeyOptions options = short_texts();
  EXPECT_EQ(message(options, 2999), "a haystack of 2999 tokens for texts of up to 3000");
  options.min_length = 100;
  EXPECT_NE(message(options, 3000).find("tokens in a text of 100"), std::string::npos);
  options.num_passkeys = 11;
  EXPECT_NE(message(options, 3000).find("num_passkeys must be in [1, 10]"), std::string::npos);
  options = short_texts();
  options.num_depths = 2;
  EXPECT_NE(message(options, 3000).find("num_depths"), std::string::npos);
  options = short_texts();
  options.min_depth = 0.96;
  EXPECT_EQ(message(options, 3000), "depths must ascend in [0, 1], got 0.96 and 0.95");
}

}  // namespace
}  // namespace headwise
