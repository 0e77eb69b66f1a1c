// SPDX-License-Identifier: MIT
/// @file logits.hpp
/// Logits of given tokens, position by position: what golden files are compared with.
#pragma once

#include <charconv>
#include <cstddef>
#include <cstdint>
#include <ostream>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "decoder.hpp"
#include "evaluate.hpp"
#include "files.hpp"
#include "headwise/core/check.hpp"

namespace needle_lm {

/// Token ids from a text file, between spaces or line ends.
/// @throws FormatError for no ids, a word that is none, or one beyond the vocabulary.
inline std::vector<Token> read_tokens(const std::string& path, int vocab_size) {
  constexpr std::uintmax_t kMaxBytes = std::uintmax_t{64} << 20;
  const std::vector<char> text = read_file(path, kMaxBytes);
  const auto is_space = [](char c) { return c == ' ' || c == '\n' || c == '\t' || c == '\r'; };
  std::vector<Token> tokens;
  for (std::size_t i = 0; i < text.size();) {
    if (is_space(text[i])) {
      ++i;
      continue;
    }
    const std::size_t first = i;
    while (i < text.size() && !is_space(text[i])) ++i;
    Token token = 0;
    const auto [end, error] = std::from_chars(text.data() + first, text.data() + i, token);
    if (error != std::errc{} || end != text.data() + i || token < 0 || token >= vocab_size) {
      constexpr std::size_t kShown = 32;
      const std::string_view word(text.data() + first, std::min(i - first, kShown));
      headwise::fail<headwise::FormatError>(path, ": token ", tokens.size() + 1, " is ", word,
                                            ", expected an id in 0..", vocab_size - 1);
    }
    tokens.push_back(token);
  }
  if (tokens.empty()) headwise::fail<headwise::FormatError>(path, ": no token ids");
  return tokens;
}

/// Runs the first `prompt_length` tokens as a prompt, the rest as decode steps of one token.
/// @param on_logits  called with logits [vocab, n] of the next n positions.
template <class Row, class Cache = headwise::KvCache<Row>, headwise::Executor E, class OnLogits>
void for_each_logits(const Model& model, const headwise::HeadPlan& plan, const RunOptions& run,
                     std::span<const Token> tokens, std::size_t prompt_length, E& executor,
                     OnLogits on_logits) {
  const auto num_tokens = static_cast<std::int64_t>(tokens.size());
  Cache cache(model.config.shape(), plan, {.max_context = num_tokens, .prefill = run.prefill});
  Decoder<Cache, E> decoder(model, num_tokens, executor);
  const headwise::SequenceId sequence = cache.add_sequence().value();
  Batch batch;
  for (std::size_t pos = 0; pos < tokens.size();) {
    const bool in_prompt = pos < prompt_length;
    const std::size_t count = in_prompt ? std::min(run.chunk, prompt_length - pos) : 1;
    batch.clear();
    batch.add(sequence, tokens.subspan(pos, count));
    decoder.forward(cache, batch);
    on_logits(decoder.logits(0, static_cast<Eigen::Index>(count)));
    pos += count;
  }
}

/// One line a position, one tab-separated column a token of the vocabulary; every digit of a float.
inline void write_logits(std::ostream& out, const Matrix& logits) {
  for (Eigen::Index position = 0; position < logits.cols(); ++position) {
    for (Eigen::Index token = 0; token < logits.rows(); ++token) {
      char digits[32];
      const auto end = std::to_chars(digits, digits + sizeof digits, logits(token, position)).ptr;
      if (token > 0) out << '\t';
      out.write(digits, end - digits);
    }
    out << '\n';
  }
}

}  // namespace needle_lm
