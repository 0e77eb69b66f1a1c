// SPDX-License-Identifier: MIT
/// @file tasks.hpp
/// The two tasks, their held-out documents, and how an answer is judged.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <iterator>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "decoder.hpp"
#include "headwise/core/check.hpp"
#include "safetensors.hpp"

namespace needle_lm {

// The words of the model's vocabulary that judging needs; training/data.py has them all.
inline constexpr Token kBeginOfSequence = 1;
inline constexpr Token kEndOfSequence = 2;
inline constexpr Token kNeedle = 4;        ///< `#`, before a key and its values
inline constexpr Token kQuestion = 5;      ///< `?`, before what is asked for
inline constexpr Token kEndOfNeedle = 6;   ///< `;`
inline constexpr Token kFirstRandom = 16;  ///< random tokens of echo documents begin here
inline constexpr Token kAnswer = 14;       ///< `ANS`, before a variable and its value

/// A token as people read it: `#`, `?`, `;`, digits, variables a to z, and of the symbols, which
/// keys and passkeys are made of, two hexadecimal digits.
inline std::string word(Token token) {
  constexpr const char* kSigns[] = {"<pad>", "<s>", "</s>", "<3>", "#", "?",     ";",  "=",
                                    "+",     "-",   "*",    "[",   "]", "THINK", "ANS"};
  constexpr Token kFirstDigit = 16;
  constexpr Token kFirstVariable = 32;
  constexpr Token kFirstWord = 64;
  constexpr Token kFirstSymbol = 96;
  char text[16];
  if (token >= 0 && token < static_cast<Token>(std::size(kSigns))) return kSigns[token];
  if (token >= kFirstDigit && token < kFirstDigit + 10) {
    return {static_cast<char>('0' + (token - kFirstDigit))};
  }
  if (token >= kFirstVariable && token < kFirstVariable + 26) {
    return {static_cast<char>('a' + (token - kFirstVariable))};
  }
  if (token >= kFirstWord && token < kFirstSymbol) {
    std::snprintf(text, sizeof text, "w%d", static_cast<int>(token - kFirstWord));
  } else if (token >= kFirstSymbol && token < kFirstSymbol + 128) {
    std::snprintf(text, sizeof text, "%02x", static_cast<unsigned>(token - kFirstSymbol));
  } else {
    std::snprintf(text, sizeof text, "<%d>", static_cast<int>(token));
  }
  return text;
}

/// Words with blanks between them.
inline std::string words(std::span<const Token> tokens) {
  std::string text;
  for (const Token token : tokens) text += (text.empty() ? "" : " ") + word(token);
  return text;
}

struct Document {
  std::vector<Token> tokens;  ///< the prompt, the right answer, perhaps more
  std::size_t prompt_length = 0;
  std::size_t answer_length = 0;

  std::span<const Token> prompt() const { return std::span(tokens).first(prompt_length); }
  std::span<const Token> answer() const {
    return std::span(tokens).subspan(prompt_length, answer_length);
  }
};

/// Passkey: a needle's 12 values and `;`. Chain of thought: a program's evaluation line by line,
/// then `ANS variable value EOS`.
struct Task {
  std::string name;
  Token stop{};  ///< last token of every right answer
  std::vector<Document> documents;
};

/// Tokens of the question that ends a prompt: `? key`, or `? variable THINK`; 0 where there is
/// none.
inline std::size_t question_length(std::span<const Token> prompt) {
  constexpr std::size_t kLongest = 3;
  const auto tail = prompt.last(std::min(kLongest, prompt.size()));
  const auto mark = std::find(tail.begin(), tail.end(), kQuestion);
  return static_cast<std::size_t>(tail.end() - mark);
}

/// Documents that a file has of a task.
inline std::size_t num_documents(const SafeTensors& file, const std::string& name) {
  const SafeTensors::Shape shape = file.shape(name + ".tokens");
  return shape.empty() ? 0 : static_cast<std::size_t>(std::max<std::int64_t>(0, shape[0]));
}

/// The first `count` documents of a task.
/// @throws ConfigError when there are fewer, FormatError for tokens or lengths out of range.
inline Task load_task(const SafeTensors& file, const std::string& name, Token stop,
                      std::size_t count, const ModelConfig& config) {
  const std::string tokens_name = name + ".tokens";
  const SafeTensors::Shape shape = file.shape(tokens_name);
  const std::int64_t available = shape.empty() ? 0 : shape[0];
  if (count < 1 || count > static_cast<std::size_t>(available)) {
    headwise::fail<headwise::ConfigError>("--documents ", count, ": there are ", available,
                                          " of task ", name);
  }
  const std::int64_t width = shape.size() == 2 ? shape[1] : 0;
  const auto tokens = file.integers(tokens_name, {available, width});
  const auto prompts = file.integers(name + ".prompt_length", {available});
  const auto answers = file.integers(name + ".answer_length", {available});

  Task task{name, stop, {}};
  for (std::size_t i = 0; i < count; ++i) {
    if (prompts[i] < 1 || answers[i] < 1 || prompts[i] > width - answers[i]) {
      headwise::fail<headwise::FormatError>(name, " document ", i, ": prompt of ", prompts[i],
                                            " and answer of ", answers[i], " in ", width,
                                            " tokens");
    }
    const auto row = std::span(tokens).subspan(i * static_cast<std::size_t>(width),
                                               static_cast<std::size_t>(width));
    const auto wrong = std::find_if(row.begin(), row.end(), [&](Token token) {
      return token < 0 || token >= config.vocab_size;
    });
    if (wrong != row.end()) {
      headwise::fail<headwise::FormatError>(name, " document ", i, ": token ", *wrong,
                                            ", the vocabulary has ", config.vocab_size);
    }
    task.documents.push_back({{row.begin(), row.end()},
                              static_cast<std::size_t>(prompts[i]),
                              static_cast<std::size_t>(answers[i])});
  }
  return task;
}

/// Whether the output is the right answer, token by token, and ends where it ends.
inline bool is_exact(std::span<const Token> output, const Document& document) {
  return std::ranges::equal(output, document.answer());
}

/// The value after the first `ANS variable`; nothing where the output has none.
inline std::optional<Token> final_value(std::span<const Token> output) {
  const auto answer = std::find(output.begin(), output.end(), kAnswer);
  if (output.end() - answer < 3) return std::nullopt;
  return answer[2];
}

/// Whether the chain of thought, right or wrong, ends in the right value.
inline bool has_right_value(std::span<const Token> output, const Document& document) {
  const auto value = final_value(output);
  return value && value == final_value(document.answer());
}

}  // namespace needle_lm
