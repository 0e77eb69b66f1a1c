// SPDX-License-Identifier: MIT
/// @file generate.hpp
/// Greedy generation for many requests at once: prompts one by one, decode steps all together.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "decoder.hpp"

namespace needle_lm {

struct Request {
  std::span<const Token> prompt;
  Token stop{};                  ///< ends the output, and belongs to it
  std::size_t max_new_tokens{};  ///< ends it otherwise
};

/// What decode steps (prompts not counted) have taken so far.
struct DecodeTime {
  double seconds = 0.0;
  std::int64_t tokens = 0;
};

/// Appends `tokens` to a sequence in chunks of at most `chunk`; the last chunk's hidden states
/// remain in the decoder.
/// @return tokens in the last chunk.
template <class Cache, headwise::Executor E>
std::size_t prefill(Decoder<Cache, E>& decoder, Cache& cache, headwise::SequenceId sequence,
                    std::span<const Token> tokens, std::size_t chunk) {
  Batch batch;
  std::size_t count = 0;
  while (!tokens.empty()) {
    count = std::min(chunk, tokens.size());
    batch.clear();
    batch.add(sequence, tokens.first(count));
    decoder.forward(cache, batch);
    tokens = tokens.subspan(count);
  }
  return count;
}

/// The likeliest next token after token `column` of the decoder's last forward.
inline Token likeliest(const Matrix& logits, Eigen::Index column) {
  Eigen::Index best = 0;
  logits.col(column).maxCoeff(&best);
  return static_cast<Token>(best);
}

/// Appends a prompt as prefill() does.
/// @return the likeliest token after it.
template <class Cache, headwise::Executor E>
Token read_prompt(Decoder<Cache, E>& decoder, Cache& cache, headwise::SequenceId sequence,
                  std::span<const Token> prompt, std::size_t chunk) {
  const std::size_t count = prefill(decoder, cache, sequence, prompt, chunk);
  return likeliest(decoder.logits(static_cast<Eigen::Index>(count) - 1, 1), 0);
}

/// A sequence that has read a request's prompt, and the likeliest token after it.
struct Started {
  headwise::SequenceId sequence;
  Token first{};
};

/// Answers all requests, as many at a time as `start` has room for: a request that has finished
/// makes room for the next one, and its pages serve the others at once.
/// @param start  start(i): request i's prompt, read; nothing where there is no room now.
/// @param on_finished  called after each request, whose sequence is released.
/// @return one output a request, in their order.
template <class Cache, headwise::Executor E, class Start, class OnFinished>
std::vector<std::vector<Token>> generate_from(Decoder<Cache, E>& decoder, Cache& cache,
                                              std::span<const Request> requests, DecodeTime& time,
                                              Start start, OnFinished on_finished) {
  struct Running {
    headwise::SequenceId sequence;
    std::size_t request;
  };
  std::vector<std::vector<Token>> outputs(requests.size());
  std::vector<Running> running;
  std::size_t num_started = 0;

  const auto release_if_finished = [&](const Running& run) {
    const Request& request = requests[run.request];
    const std::vector<Token>& output = outputs[run.request];
    if (output.back() != request.stop && output.size() < request.max_new_tokens) return false;
    cache.release(run.sequence);
    on_finished();
    return true;
  };
  const auto decode_one_token_each = [&] {
    Batch batch;
    for (const Running& run : running) batch.add(run.sequence, {&outputs[run.request].back(), 1});
    decoder.forward(cache, batch);
    const auto count = static_cast<Eigen::Index>(running.size());
    const Matrix logits = decoder.logits(0, count);
    for (Eigen::Index i = 0; i < count; ++i) {
      outputs[running[static_cast<std::size_t>(i)].request].push_back(likeliest(logits, i));
    }
  };

  while (num_started < requests.size() || !running.empty()) {
    while (num_started < requests.size()) {
      const std::optional<Started> next = start(num_started);
      if (!next) break;
      outputs[num_started].push_back(next->first);
      running.push_back({next->sequence, num_started++});
    }
    std::erase_if(running, release_if_finished);
    if (running.empty()) continue;
    const auto begin = std::chrono::steady_clock::now();
    decode_one_token_each();
    time.seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    time.tokens += static_cast<std::int64_t>(running.size());
  }
  return outputs;
}

/// The same, each prompt read by a sequence of its own.
template <class Cache, headwise::Executor E, class OnFinished>
std::vector<std::vector<Token>> generate(Decoder<Cache, E>& decoder, Cache& cache,
                                         std::span<const Request> requests, std::size_t chunk,
                                         DecodeTime& time, OnFinished on_finished) {
  const auto start = [&](std::size_t i) -> std::optional<Started> {
    const auto sequence = cache.add_sequence();
    if (!sequence) return std::nullopt;
    return Started{*sequence, read_prompt(decoder, cache, *sequence, requests[i].prompt, chunk)};
  };
  return generate_from(decoder, cache, requests, time, start, on_finished);
}

}  // namespace needle_lm
