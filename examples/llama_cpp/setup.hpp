// SPDX-License-Identifier: MIT
/// @file setup.hpp
/// What all commands start from: the model, a plan for it, text and threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <span>
#include <string>
#include <vector>

#include "headwise/core/check.hpp"
#include "headwise/heads/plan.hpp"
#include "headwise/heads/scores.hpp"
#include "headwise/heads/select.hpp"
#include "headwise/heads/tsv.hpp"
#include "headwise/policies/random_heads.hpp"
#include "headwise/policies/uniform_budget.hpp"
#include "model.hpp"
#include "takeover.hpp"
#include "text.hpp"

namespace in_llama {

struct Setup {
  const Model& model;
  std::string text;   ///< path
  std::string heads;  ///< score file; empty: random heads stream
  double sparsity = 0.5;
  headwise::Window window{.sink = 64, .recent = 256};
  int num_threads = 2;
  std::int64_t num_tokens = 0;  ///< 0: the command's own

  std::int64_t tokens_or(std::int64_t own) const { return num_tokens > 0 ? num_tokens : own; }
  std::vector<llama_token> read(std::int64_t count) const {
    return text_tokens(model, text, static_cast<std::size_t>(count));
  }
  headwise::HeadPlan full() const { return headwise::uniform_budget::Policy{}.plan(model.shape()); }
  /// @throws ConfigError or FormatError for scores that are not this model's.
  headwise::HeadPlan plan() const {
    if (heads.empty()) {
      return headwise::random_heads::Policy{.sparsity = sparsity, .window = window}.plan(
          model.shape());
    }
    const headwise::HeadScores scores = headwise::load_tsv(heads);
    headwise::check_shape(scores, model.shape(), heads);
    return headwise::select(scores, {.sparsity = sparsity, .window = window});
  }
};

/// Most tokens of a step, and so the cells of the stock cache.
inline constexpr std::int64_t kChunk = 256;

inline headwise::CacheOptions options_for(std::int64_t max_context, int max_sequences = 1) {
  return {.max_sequences = max_sequences,
          .max_context = max_context,
          .max_chunk = kChunk,
          .max_rollback = 32};
}

inline void require(headwise::StepStatus status) {
  if (status != headwise::StepStatus::kOk) {
    headwise::fail<std::runtime_error>("a step was refused: ", headwise::to_string(status));
  }
}

/// fn(first, tokens) for every chunk.
template <class Fn>
void for_each_chunk(std::span<const llama_token> tokens, Fn fn) {
  for (std::size_t first = 0; first < tokens.size(); first += kChunk) {
    fn(first, tokens.subspan(first, std::min<std::size_t>(kChunk, tokens.size() - first)));
  }
}

}  // namespace in_llama
