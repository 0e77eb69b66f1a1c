// SPDX-License-Identifier: MIT
/// @file multi_passkey.hpp
/// DuoAttention's training texts: passkeys hidden in a long text, asked for at its end.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "headwise/core/check.hpp"
#include "headwise/core/checked.hpp"
#include "headwise/heads/splitmix64.hpp"
#include "headwise/policies/duo_attention_training.hpp"

/// DuoAttention, arXiv:2410.10819, section 3.2: who is to recall random words from anywhere in a
/// long text needs the heads that look back. Each text is
///
///     intro, the haystack with its needles, outro, and for each needle: question, passkey,
///     separator
///
/// where a needle says "the n-th passkey is <words>" and lies at a random depth; the first needle
/// in the text is the first that is asked for. The tokenizer is the engine's, and so is the
/// haystack (published: BookSum). Words, not their tokens, are drawn: texts are the same for every
/// tokenizer.
///
///     MultiPasskey texts(options, haystack_tokens, tokenize);
///     duo_attention::train(shape, training, engine, [&](std::int64_t) { return texts.next(); });
namespace headwise::inline v0::duo_attention {

/// Turns words into tokens, without those that begin or end a text.
template <class T>
concept Tokenizer = requires(T& tokenize, std::string_view text) {
  { tokenize(text) } -> std::convertible_to<std::vector<std::int32_t>>;
};

/// The sentences around passkeys; "%" stands for an ordinal. Ours: any will do.
struct PasskeyPhrases {
  std::string intro = "This is a long text with passkeys in it. Remember them.\n\n";
  std::string needle = "\n\nThe % passkey is: ";
  std::string needle_end = "\n\n";
  std::string outro = "\n\nNow say the passkeys.\n\n";
  std::string question = "What is the % passkey? It is: ";
  std::string separator = "\n\n";
};

/// The published sizes.
struct PasskeyOptions {
  int num_passkeys = 10;            ///< of a text, in [1, 10]
  int passkey_words = 32;           ///< of the 26 of the NATO alphabet, with replacement
  std::int64_t min_length = 1000;   ///< tokens of the shortest text
  std::int64_t max_length = 32000;  ///< of the longest (Llama-3.1: 128000)
  int num_lengths = 50;             ///< linearly spaced between both; one is drawn for each text
  double min_depth = 0.05;          ///< share of the haystack before the first needle, at least
  double max_depth = 0.95;          ///< and before the last, at most
  int num_depths = 1000;            ///< linearly spaced between both; drawn without replacement
  /// Whether the whole tail of questions, passkeys and separators is labelled, as the released code
  /// has it; else the passkeys in it alone, as the paper.
  bool label_questions = true;
  PasskeyPhrases phrases = {};
  std::uint64_t seed = 42;

  /// @throws ConfigError for a number out of its range.
  void check() const {
    using headwise::detail::checked_range;
    checked_range(num_passkeys, 1, 10, "num_passkeys");
    checked_range(passkey_words, 1, 1 << 20, "passkey_words");
    checked_range(min_length, 1, kMaxTokens, "min_length");
    checked_range(max_length, min_length, kMaxTokens, "max_length");
    checked_range(num_lengths, 1, 1 << 20, "num_lengths");
    checked_range(num_depths, num_passkeys, 1 << 20, "num_depths");
    if (!(0.0 <= min_depth && min_depth <= max_depth && max_depth <= 1.0)) {
      fail<ConfigError>("depths must ascend in [0, 1], got ", min_depth, " and ", max_depth);
    }
  }
};

/// The words of passkeys.
inline constexpr std::array<std::string_view, 26> kPasskeyWords{
    "alpha",   "bravo", "charlie", "delta",  "echo",     "foxtrot", "golf",   "hotel",  "india",
    "juliett", "kilo",  "lima",    "mike",   "november", "oscar",   "papa",   "quebec", "romeo",
    "sierra",  "tango", "uniform", "victor", "whiskey",  "xray",    "yankee", "zulu"};
/// What needles and questions are told apart by.
inline constexpr std::array<std::string_view, 10> kOrdinals{
    "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"};

/// Texts without end, another one each time.
template <Tokenizer T>
class MultiPasskey {
 public:
  /// @param haystack  tokens of a long text, at least as many as the longest text
  /// @param tokenize  the engine's; copied
  /// @throws ConfigError for options out of range, or a haystack that is too short.
  MultiPasskey(PasskeyOptions options, std::vector<std::int32_t> haystack, T tokenize)
      : options_(std::move(options)),
        haystack_(std::move(haystack)),
        tokenize_(std::move(tokenize)),
        random_(options_.seed) {
    options_.check();
    if (std::ssize(haystack_) < options_.max_length) {
      fail<ConfigError>("a haystack of ", haystack_.size(), " tokens for texts of up to ",
                        options_.max_length);
    }
  }

  /// The next text. It has as many tokens as the length that was drawn says: the haystack is cut to
  /// what needles and questions leave of it. (The released code cuts at the longest length alone,
  /// where it also keeps 300 tokens in reserve, and pads to multiples of 16, which its kernel
  /// wants.)
  /// @throws ConfigError where nothing is left of it.
  LabelledText next() {
    const std::int64_t length = draw_length();
    const auto num = static_cast<std::size_t>(options_.num_passkeys);
    std::vector<std::vector<std::int32_t>> needles, questions, passkeys;
    const std::vector<std::int32_t> intro = tokenize_(options_.phrases.intro);
    const std::vector<std::int32_t> outro = tokenize_(options_.phrases.outro);
    const std::vector<std::int32_t> separator = tokenize_(options_.phrases.separator);
    std::size_t taken = intro.size() + outro.size();
    for (std::size_t i = 0; i < num; ++i) {
      const std::string words = draw_words();
      needles.push_back(tokenize_(with_ordinal(options_.phrases.needle, i) + words +
                                  options_.phrases.needle_end));
      questions.push_back(tokenize_(with_ordinal(options_.phrases.question, i)));
      passkeys.push_back(tokenize_(words));
      taken += needles[i].size() + questions[i].size() + passkeys[i].size() + separator.size();
    }
    if (static_cast<std::int64_t>(taken) >= length) {
      fail<ConfigError>("passkeys and questions of ", taken, " tokens in a text of ", length);
    }
    const std::size_t hay = static_cast<std::size_t>(length) - taken;

    LabelledText text;
    text.tokens.reserve(static_cast<std::size_t>(length));
    const auto append = [&](std::span<const std::int32_t> tokens, bool is_labelled) {
      for (const std::int32_t token : tokens) {
        if (is_labelled) text.labelled.push_back(std::ssize(text.tokens));
        text.tokens.push_back(token);
      }
    };
    append(intro, false);
    std::size_t done = 0;
    const std::vector<double> depths = draw_depths();
    for (std::size_t i = 0; i < num; ++i) {
      const auto at = static_cast<std::size_t>(depths[i] * static_cast<double>(hay));
      append(std::span(haystack_).subspan(done, at - done), false);
      append(needles[i], false);
      done = at;
    }
    append(std::span(haystack_).subspan(done, hay - done), false);
    append(outro, false);
    for (std::size_t i = 0; i < num; ++i) {
      append(questions[i], options_.label_questions);
      append(passkeys[i], true);
      append(separator, options_.label_questions);
    }
    return text;
  }

 private:
  std::size_t draw(std::size_t below) {
    return static_cast<std::size_t>(random_.next_unit() * static_cast<double>(below));
  }
  static double spaced(double from, double to, std::size_t i, int count) {
    return count == 1 ? to : from + (to - from) * static_cast<double>(i) / (count - 1);
  }
  std::int64_t draw_length() {
    const std::size_t i = draw(static_cast<std::size_t>(options_.num_lengths));
    return static_cast<std::int64_t>(
        std::floor(spaced(static_cast<double>(options_.min_length),
                          static_cast<double>(options_.max_length), i, options_.num_lengths)));
  }
  std::string draw_words() {
    std::string words;
    for (int i = 0; i < options_.passkey_words; ++i) {
      if (i > 0) words += ' ';
      words += kPasskeyWords[draw(kPasskeyWords.size())];
    }
    return words;
  }
  /// Ascending, all different.
  std::vector<double> draw_depths() {
    std::vector<std::size_t> drawn;
    while (drawn.size() < static_cast<std::size_t>(options_.num_passkeys)) {
      const std::size_t i = draw(static_cast<std::size_t>(options_.num_depths));
      if (std::ranges::find(drawn, i) == drawn.end()) drawn.push_back(i);
    }
    std::ranges::sort(drawn);
    std::vector<double> depths;
    for (const std::size_t i : drawn) {
      depths.push_back(spaced(options_.min_depth, options_.max_depth, i, options_.num_depths));
    }
    return depths;
  }
  static std::string with_ordinal(const std::string& phrase, std::size_t i) {
    const std::size_t at = phrase.find('%');
    if (at == std::string::npos) return phrase;
    std::string with = phrase;
    return with.replace(at, 1, kOrdinals[i]);
  }

  PasskeyOptions options_;
  std::vector<std::int32_t> haystack_;
  T tokenize_;
  SplitMix64 random_;
};

}  // namespace headwise::inline v0::duo_attention
