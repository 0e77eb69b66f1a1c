// SPDX-License-Identifier: MIT
/// @file rlkv.hpp
/// RLKV: gates trained by reinforcement learning say which heads a chain of thought needs.
#pragma once

#include <cstdint>
#include <string>

#include "headwise/core/window.hpp"
#include "headwise/heads/scores.hpp"
#include "headwise/heads/select.hpp"
#include "headwise/heads/text_file.hpp"
#include "headwise/heads/tsv.hpp"
#include "headwise/policies/policy.hpp"

/// RLKV, arXiv:2510.08525. The gates are DuoAttention's (one for every KV head, full against local
/// attention), the signal is not: GRPO on the model's own verified answers, minus an L1 term that
/// acts only while the reward is high. High gates mark "reasoning heads"; here they are retrieval
/// heads like any other, and the rest streams.
///
///     HeadPlan plan = rlkv::Policy{.sparsity = 0.4}.plan(rlkv::load("rlkv/Llama-3.1-8B-R1"));
namespace headwise::inline v0::rlkv {

/// Sink and recent of the paper's results. The released SGLang decode counts the current token, as
/// we do; the HuggingFace cache does not: Window::from_exclusive(16, 64). A larger window buys
/// about one more step of sparsity (the paper's window ablation: 32/128, 64/256).
inline constexpr Window kDeployWindow{.sink = 16, .recent = 64};

/// What the released SGLang server's prompt chunks after the first see of the tokens before the
/// chunk: 64 past ones, one more than its decode, whose 64 are 63 and the current one. No single
/// Window says both. With this one for the prompt and kDeployWindow for decode, in `kChunkCausal`
/// mode, a query sees what the server means it to see. (As released, a chunk is written to the ring
/// before its prefix is read, so that up to 64 of these rows are the chunk's own; that is not
/// imitated.)
inline constexpr Window kPromptWindow = Window::from_exclusive(16, 64);

/// The published gates, [num_layers, num_kv_heads]; they may lie a little outside [0, 1].
/// @param path  a TSV, or the directory of an adapter_weights.tsv; where that is missing, of a
///   full_attention_heads.tsv, as the released loader has it.
/// @throws ConfigError when there is no such file, FormatError when it is damaged (parse_tsv()).
inline HeadScores load(const std::string& path) {
  for (const char* file : {"/adapter_weights.tsv", "/full_attention_heads.tsv"}) {
    if (detail::can_open(path + file)) return load_tsv(path + file);
  }
  return load_tsv(path);
}

/// The published selection with its parameters.
struct Policy {
  /// Share of KV heads that stream; near lossless up to 0.4, in the paper's tables.
  double sparsity = 0.4;
  Window window = kDeployWindow;  ///< what a streaming head keeps
  /// Of prompt chunks where it differs; kPromptWindow.recent: as the released server counts.
  std::int64_t prompt_recent = 0;

  /// The lowest gates stream; see select().
  /// @throws ConfigError for a sparsity outside [0, 1].
  HeadPlan plan(const HeadScores& gates) const {
    return select(gates, {.sparsity = sparsity, .window = window, .prompt_recent = prompt_recent});
  }
};
static_assert(HeadPolicy<Policy, HeadScores>);

}  // namespace headwise::inline v0::rlkv
