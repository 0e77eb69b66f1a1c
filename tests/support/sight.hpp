// SPDX-License-Identifier: MIT
/// @file sight.hpp
/// The published rules, one key at a time: which query sees which key of which head, by brute
/// force.
#pragma once

#include <algorithm>
#include <cstdint>
#include <variant>

#include "headwise/core/phase.hpp"
#include "headwise/core/shape.hpp"
#include "headwise/core/window.hpp"
#include "headwise/heads/budget.hpp"

namespace headwise::test {

/// How a query sees a key.
enum class Sight { kNot, kAsRow, kFolded };

/// Whether the query of a step sees the key, and how.
/// @param start  length of the sequence when the step began
inline Sight sight(const HeadBudget& budget, PrefillMode prefill, std::int64_t page_tokens,
                   Phase phase, std::int64_t start, std::int64_t query, std::int64_t key) {
  if (key > query) return Sight::kNot;
  if (const auto* late = std::get_if<KeepWindowFrom>(&budget)) {
    const bool of_chunk = phase == Phase::kPrompt && prefill == PrefillMode::kChunkCausal;
    if ((of_chunk ? start : query) < late->from) return Sight::kAsRow;
    return sight(HeadBudget{late->keep}, prefill, page_tokens, phase, start, query, key);
  }
  if (const auto* keep = std::get_if<KeepWindow>(&budget)) {
    std::int64_t recent = keep->window.recent;
    if (phase == Phase::kPrompt && keep->prompt_recent != 0) recent = keep->prompt_recent;
    if (key < keep->window.sink) return Sight::kAsRow;
    if (phase == Phase::kPrompt && prefill == PrefillMode::kChunkCausal) {
      // DuoAttention: what the chunk's first query sees, and the chunk itself.
      return key >= start || start - key + 1 <= recent ? Sight::kAsRow : Sight::kNot;
    }
    const std::int64_t newest_first = query - key + 1;  // 1: the current token
    return newest_first <= recent ? Sight::kAsRow : Sight::kNot;
  }
  if (const auto* growing = std::get_if<KeepGrowingWindow>(&budget)) {
    // RazorAttention: L = max(S0, N / C) newest stay; whole pages of the others are folded.
    const std::int64_t kept = std::max(growing->min_recent, start / growing->divisor);
    const std::int64_t end_of_page = (key / page_tokens + 1) * page_tokens;
    return key >= growing->sink && end_of_page <= start - kept ? Sight::kFolded : Sight::kAsRow;
  }
  return Sight::kAsRow;
}

/// The same in a layer that may have a window of its own, in which a budget's sinks are not kept.
inline Sight sight(const LayerShape& layer, const HeadBudget& budget, PrefillMode prefill,
                   std::int64_t page_tokens, Phase phase, std::int64_t start, std::int64_t query,
                   std::int64_t key) {
  if (layer.sliding_window == 0) {
    return sight(budget, prefill, page_tokens, phase, start, query, key);
  }
  std::int64_t recent = layer.sliding_window;
  const auto* late = std::get_if<KeepWindowFrom>(&budget);
  if (const auto* keep = late != nullptr ? &late->keep : std::get_if<KeepWindow>(&budget)) {
    const bool of_prompt = phase == Phase::kPrompt && keep->prompt_recent != 0;
    recent = std::min(recent, of_prompt ? keep->prompt_recent : keep->window.recent);
  }
  return key <= query && query - key < recent ? Sight::kAsRow : Sight::kNot;
}

}  // namespace headwise::test
