// SPDX-License-Identifier: MIT
/// @file duo_attention_training.hpp
/// DuoAttention's training: gates that keep the hidden states of long-range recall, and as few
/// heads as that takes.
#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "headwise/core/bits.hpp"
#include "headwise/core/check.hpp"
#include "headwise/core/checked.hpp"
#include "headwise/core/row_view.hpp"
#include "headwise/core/shape.hpp"
#include "headwise/core/window.hpp"
#include "headwise/heads/scores.hpp"
#include "headwise/policies/gate_optimizer.hpp"

/// DuoAttention, arXiv:2410.10819, section 3.2, and its released code where that differs. The
/// model's weights are frozen; each step runs it twice over a text, unchanged and with mixed
/// attention (attention/mixed_attention.hpp), and compares the last hidden states at the text's
/// labelled tokens:
///
///     loss = mean over labelled tokens and dimensions of (full - mixed)^2 + weight x mean |gate|
///
/// The paper's eq. 1 and 2 are sums; means are what made the published gates. What is labelled:
/// the passkeys (paper), or the questions and separators around them, too (code).
///
///     duo_attention::Training training{.num_steps = 500};
///     HeadScores gates = duo_attention::train(shape, training, engine, next_text);
///     save_tsv(...);  HeadPlan plan = duo_attention::Policy{}.plan(gates);
namespace headwise::inline v0::duo_attention {

/// The published figures, for models of 7 and 8 B parameters.
struct Training {
  std::int64_t num_steps = 2000;  ///< of one text each, at least 1
  double learning_rate = 0.02;    ///< at the schedule's top
  double l1_weight = 0.05;        ///< of mean |gate|
  AdamW adamw = {};               ///< without weight decay

  /// Of the step `step`, from 0: up over the first fifth of the steps, down over the last, never
  /// below a tenth of the top.
  double learning_rate_at(std::int64_t step) const {
    const double ramp = static_cast<double>(num_steps) / 5.0;
    const double up = std::max(static_cast<double>(step + 1) / ramp, 0.1);
    const double down = std::max(static_cast<double>(num_steps - step) / ramp, 0.1);
    return learning_rate * std::min({1.0, up, down});
  }
  /// @throws ConfigError for a number out of its range.
  void check() const {
    headwise::detail::checked_range(num_steps, 1, std::int64_t{1} << 40, "num_steps");
    if (!is_finite(l1_weight) || l1_weight < 0.0) {
      fail<ConfigError>("l1_weight must be at least 0, got ", l1_weight);
    }
    adamw.check();
  }
};

/// What a streaming half sees in training. The released kernel rounds it to blocks of 128: a query
/// sees between 129 and 256 recent tokens. Here it is what it says.
inline constexpr Window kTrainingWindow{.sink = 128, .recent = 256};

/// The distillation loss, and its gradient by the mixed states.
/// @param full,mixed  [labelled tokens, hidden], the same rows of both passes
/// @param d_mixed  [labelled tokens x hidden], written
/// @return mean over tokens of the mean over dimensions of (full - mixed)^2; 0 without tokens
/// @throws ConfigError for sizes that differ.
inline double distillation_loss(const RowView& full, const RowView& mixed,
                                std::span<float> d_mixed) {
  if (full.count != mixed.count || full.dim != mixed.dim ||
      std::ssize(d_mixed) != mixed.count * mixed.dim) {
    fail<ConfigError>("states of ", full.count, " x ", full.dim, " beside ", mixed.count, " x ",
                      mixed.dim, " and ", d_mixed.size(), " gradients");
  }
  const double share = d_mixed.empty() ? 0.0 : 1.0 / static_cast<double>(d_mixed.size());
  double sum = 0.0;
  float* to = d_mixed.data();
  for (std::int64_t i = 0; i < mixed.count; ++i) {
    for (int d = 0; d < mixed.dim; ++d, ++to) {
      const double away =
          static_cast<double>(mixed.row(i)[d]) - static_cast<double>(full.row(i)[d]);
      sum += away * away;
      *to = static_cast<float>(2.0 * share * away);
    }
  }
  return share * sum;
}

/// A text and the tokens whose hidden states count. No shift by one: the state *at* a labelled
/// token is compared.
struct LabelledText {
  std::vector<std::int32_t> tokens;
  std::vector<std::int64_t> labelled;  ///< positions, ascending
};

/// What an engine does for the training: two forward passes, and the backward pass of the mixed
/// one through its own layers. Rows are borrowed: those of full_states() must outlast the
/// mixed_states() that follows.
///  - full_states(text): last hidden states, after the final norm, at the labelled tokens
///  [labelled,
///    hidden], of the unchanged model;
///  - mixed_states(text, gates): the same with mixed attention, gates as GateOptimizer::gates();
///  - backward(d_states, d_gates): d_states [labelled x hidden] of the last mixed_states(), adds to
///    d_gates.
/// Whether the full half of mixed attention is the mixed pass's own (the paper) or the unchanged
/// pass's, a constant (the released code: MixedAttention::constant_full), is the engine's choice.
template <class E>
concept Engine = requires(E& engine, const LabelledText& text, std::span<const double> gates,
                          std::span<const float> d_states, std::span<double> d_gates) {
  { engine.full_states(text) } -> std::convertible_to<RowView>;
  { engine.mixed_states(text, gates) } -> std::convertible_to<RowView>;
  engine.backward(d_states, d_gates);
};

/// How a step went, before its update.
struct Progress {
  std::int64_t step = 0;   ///< from 0
  double distance = 0.0;   ///< distillation_loss
  double mean_gate = 0.0;  ///< mean |gate|
  double learning_rate = 0.0;
};

/// Trains the gates of a model.
/// @param next_text  `(step)` -> LabelledText, with at least one labelled token
/// @param on_progress  `(Progress)`, after each step
/// @return one value for each KV head, as the published files have them: a few may lie a little
///   below 0 or above 1
/// @throws ConfigError for a training out of range, a text without a labelled token, or states that
///   do not go together.
template <Engine E, std::invocable<std::int64_t> NextText, class OnProgress>
HeadScores train(const ModelShape& shape, const Training& training, E& engine, NextText&& next_text,
                 OnProgress&& on_progress) {
  training.check();
  GateOptimizer optimizer(shape, training.adamw);
  std::vector<float> d_states;
  std::vector<double> d_gates(optimizer.gates().size());
  for (std::int64_t step = 0; step < training.num_steps; ++step) {
    optimizer.clamp();
    const LabelledText text = next_text(step);
    if (text.labelled.empty()) fail<ConfigError>("step ", step, ": a text without labelled tokens");
    const RowView full = engine.full_states(text);
    const RowView mixed = engine.mixed_states(text, optimizer.gates());
    d_states.resize(static_cast<std::size_t>(mixed.count) * static_cast<std::size_t>(mixed.dim));
    Progress progress{.step = step, .learning_rate = training.learning_rate_at(step)};
    progress.distance = distillation_loss(full, mixed, d_states);
    std::ranges::fill(d_gates, 0.0);
    engine.backward(d_states, d_gates);
    progress.mean_gate = add_l1(optimizer.gates(), training.l1_weight, d_gates);
    optimizer.step(d_gates, progress.learning_rate);
    on_progress(progress);
  }
  return optimizer.scores();
}

/// The same, in silence.
template <Engine E, std::invocable<std::int64_t> NextText>
HeadScores train(const ModelShape& shape, const Training& training, E& engine,
                 NextText&& next_text) {
  return train(shape, training, engine, next_text, [](const Progress&) {});
}

}  // namespace headwise::inline v0::duo_attention
