// SPDX-License-Identifier: MIT
/// @file duo_attention.hpp
/// DuoAttention: gates trained by distillation say which heads keep everything; the rest stream.
#pragma once

#include <string>

#include "headwise/core/window.hpp"
#include "headwise/heads/scores.hpp"
#include "headwise/heads/select.hpp"
#include "headwise/heads/text_file.hpp"
#include "headwise/heads/tsv.hpp"
#include "headwise/policies/policy.hpp"

/// Xiao et al., DuoAttention, arXiv:2410.10819. One gate in [0, 1] for every KV head mixes full and
/// streaming attention. Training keeps the hidden states of long-range recall (eq. 1) while an L1
/// term pulls all gates down (eq. 2). Heads whose gate stays high are retrieval heads; deployed,
/// the lowest gates stream (eq. 4). Keys are stored after RoPE at absolute positions.
///
///     HeadScores gates = duo_attention::load("full_attention_heads.tsv");
///     HeadPlan plan = duo_attention::Policy{.sparsity = 0.5}.plan(gates);
namespace headwise::inline v0::duo_attention {

/// Sink and recent of the paper's long-context results (NIAH, LongBench); 32/128 served MMLU, 16/64
/// MBPP and MT-Bench. The released cache does not count the current token, so that it sees one
/// recent token more: Window::from_exclusive(64, 256) is that to the token. The sizes in
/// config.json (load_window_config() in heads/json.hpp) are those of the training: 128/256.
inline constexpr Window kDeployWindow{.sink = 64, .recent = 256};

/// The published gates, [num_layers, num_kv_heads].
/// @param path  full_attention_heads.tsv, or the directory it lies in.
/// @throws ConfigError when there is no such file, FormatError when it is damaged (parse_tsv()).
inline HeadScores load(const std::string& path) {
  const std::string inside = path + "/full_attention_heads.tsv";
  return load_tsv(detail::can_open(inside) ? inside : path);
}

/// The published selection with its parameters.
struct Policy {
  /// Share of KV heads that stream. The paper keeps 50 % of the heads of GQA models, 25 % of MHA.
  double sparsity = 0.5;
  Window window = kDeployWindow;  ///< what a streaming head keeps

  /// The lowest gates stream; see select().
  /// @throws ConfigError for a sparsity outside [0, 1].
  HeadPlan plan(const HeadScores& gates) const {
    return select(gates, {.sparsity = sparsity, .window = window});
  }
};
static_assert(HeadPolicy<Policy, HeadScores>);

}  // namespace headwise::inline v0::duo_attention
