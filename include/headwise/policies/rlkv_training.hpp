// SPDX-License-Identifier: MIT
/// @file rlkv_training.hpp
/// RLKV's training: gates that keep a model's own verified chains of thought, by reinforcement.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "headwise/core/bits.hpp"
#include "headwise/core/check.hpp"
#include "headwise/core/checked.hpp"
#include "headwise/core/shape.hpp"
#include "headwise/core/window.hpp"
#include "headwise/heads/scores.hpp"
#include "headwise/heads/splitmix64.hpp"
#include "headwise/policies/gate_optimizer.hpp"

/// RLKV, arXiv:2510.08525, section 3, and its released trainer where that differs. The model's
/// weights are frozen; it answers prompts with mixed attention (attention/mixed_attention.hpp),
/// both halves over the same q, k and v, and a verifier says which answers are right:
///
///     loss = - mean over tokens of min(r A, clip(r, 1 - eps, 1 + eps) A) + weight x mean |gate|
///     weight = 1[mean reward > tau] x beta x (exp(mean reward) - 1)
///
/// so that heads are given up only while the answers stay right. There is no KL term.
///
///     rlkv::Training training{.num_steps = 100};
///     HeadScores gates = rlkv::train(shape, training, engine, next_prompt, reward);
namespace headwise::inline v0::rlkv {

/// By what the rewards of a group's answers are divided.
enum class Spread : std::uint8_t {
  kPopulation,  ///< the root of the mean of squares
  kSample,      ///< of the sum of squares over one less than the answers
};

/// How far each answer's reward lies from the mean of its group, in standard deviations (GRPO; the
/// paper's eq. 3).
/// @param rewards  group after group, `group_size` answers to one prompt each
/// @param epsilon  added to the deviation: a group of equal rewards gets zeros
/// @throws ConfigError for a group below 2, or one that does not divide the rewards.
inline std::vector<double> group_advantages(std::span<const double> rewards, int group_size,
                                            Spread spread = Spread::kPopulation,
                                            double epsilon = 1e-6) {
  if (group_size < 2 || rewards.size() % static_cast<std::size_t>(group_size) != 0) {
    fail<ConfigError>(rewards.size(), " rewards of groups of ", group_size,
                      "; a group has at least 2 answers");
  }
  const auto size = static_cast<std::size_t>(group_size);
  std::vector<double> advantages;
  for (std::size_t first = 0; first < rewards.size(); first += size) {
    const std::span<const double> group = rewards.subspan(first, size);
    double mean = 0.0;
    for (const double reward : group) mean += reward / static_cast<double>(size);
    double squares = 0.0;
    for (const double reward : group) squares += (reward - mean) * (reward - mean);
    const auto counted = static_cast<double>(spread == Spread::kSample ? size - 1 : size);
    const double deviation = std::sqrt(squares / counted) + epsilon;
    for (const double reward : group) advantages.push_back((reward - mean) / deviation);
  }
  return advantages;
}

/// The released trainer's: mean and deviation are those of all tokens of the batch, each of which
/// has its answer's reward, so that long answers count for more.
/// @param num_tokens  of each answer
/// @throws ConfigError for sizes that differ or a negative number of tokens.
inline std::vector<double> batch_advantages(std::span<const double> rewards,
                                            std::span<const std::int64_t> num_tokens,
                                            double epsilon = 1e-6) {
  if (rewards.size() != num_tokens.size()) {
    fail<ConfigError>(rewards.size(), " rewards and ", num_tokens.size(), " lengths");
  }
  double tokens = 0.0;
  double sum = 0.0;
  for (std::size_t i = 0; i < rewards.size(); ++i) {
    headwise::detail::checked_range(num_tokens[i], 0, kMaxTokens, "tokens of an answer");
    tokens += static_cast<double>(num_tokens[i]);
    sum += static_cast<double>(num_tokens[i]) * rewards[i];
  }
  std::vector<double> advantages(rewards.size(), 0.0);
  if (is_zero(tokens)) return advantages;
  const double mean = sum / tokens;
  double squares = 0.0;
  for (std::size_t i = 0; i < rewards.size(); ++i) {
    squares += static_cast<double>(num_tokens[i]) * (rewards[i] - mean) * (rewards[i] - mean);
  }
  const double deviation = std::sqrt(squares / tokens) + epsilon;
  for (std::size_t i = 0; i < rewards.size(); ++i) advantages[i] = (rewards[i] - mean) / deviation;
  return advantages;
}

/// Weight of the L1 term: 0 up to the threshold, then beta (exp(mean reward) - 1), which is beta
/// near 0.7.
inline double l1_weight(double mean_reward, double threshold, double beta) {
  return mean_reward > threshold ? beta * (std::exp(mean_reward) - 1.0) : 0.0;
}

/// Log-probabilities of an answer's tokens, each under three policies.
struct LogProbs {
  std::span<const float> current;    ///< by the gates that are trained
  std::span<const float> proximal;   ///< the ratio's other side: the gates before this update
  std::span<const float> behaviour;  ///< as they were drawn; empty: as proximal
};

/// The clipped objective and its gradient. With r = exp(current - proximal), each token's loss is
/// - min(r A, clip(r, 1 - eps, 1 + eps) A) exp(proximal - behaviour) (decoupled PPO, as released:
/// the last factor corrects for answers that older gates have drawn).
struct ClippedObjective {
  double clip = 0.4;  ///< eps, at least 0
  /// Tokens whose factor exp(proximal - behaviour) is above count 0; 0: none is.
  double behaviour_cap = 5.0;

  /// @param share  of a token in the mean: 1 / tokens of the batch (those that count 0 included)
  /// @param d_current  one a token, written
  /// @return the sum of the tokens' losses times share
  /// @throws ConfigError for sizes that differ.
  double operator()(const LogProbs& of, double advantage, double share,
                    std::span<float> d_current) const {
    const std::size_t tokens = of.current.size();
    if (of.proximal.size() != tokens || d_current.size() != tokens ||
        (!of.behaviour.empty() && of.behaviour.size() != tokens)) {
      fail<ConfigError>("log-probabilities of ", tokens, ", ", of.proximal.size(), " and ",
                        of.behaviour.size(), " tokens, and ", d_current.size(), " gradients");
    }
    double sum = 0.0;
    for (std::size_t i = 0; i < tokens; ++i) {
      d_current[i] = 0.0F;
      const auto proximal = static_cast<double>(of.proximal[i]);
      double factor = 1.0;
      if (!of.behaviour.empty()) {
        factor = std::exp(proximal - static_cast<double>(of.behaviour[i]));
        if (behaviour_cap > 0.0 && factor > behaviour_cap) continue;
      }
      const double ratio = std::exp(static_cast<double>(of.current[i]) - proximal);
      const double free = ratio * advantage;
      const double clipped = std::clamp(ratio, 1.0 - clip, 1.0 + clip) * advantage;
      sum -= factor * std::min(free, clipped) * share;
      if (free <= clipped) d_current[i] = static_cast<float>(-factor * free * share);
    }
    return sum;
  }
};

/// A problem that the unchanged model has tried once, greedily.
struct Attempt {
  std::int64_t num_tokens = 0;  ///< of its answer
  bool solved = false;
};
/// How many problems are drawn whose answers have fewer than `below` tokens, and no fewer than the
/// bin before.
struct LengthBin {
  std::int64_t below = 0;
  std::size_t count = 0;
};
/// Of about 40'000 problems; lengths stand for difficulty. ("2k" is read as 2000.)
inline constexpr std::array<LengthBin, 4> kPublishedBins{
    {{2000, 600}, {4000, 600}, {6000, 1000}, {8000, 800}}};

/// Self-distillation sampling: of the problems that the model solves by itself, as many at random
/// as each bin of lengths wants, or all where it has fewer.
/// @return indices of attempts, bin after bin; nothing twice
/// @throws ConfigError for bins that do not ascend.
inline std::vector<std::size_t> draw_solved(std::span<const Attempt> attempts,
                                            std::span<const LengthBin> bins, std::uint64_t seed) {
  SplitMix64 random(seed);
  std::vector<std::size_t> drawn;
  std::int64_t from = 0;
  for (const LengthBin& bin : bins) {
    if (bin.below <= from) {
      fail<ConfigError>("bins of lengths must ascend, got ", bin.below, " after ", from);
    }
    std::vector<std::size_t> candidates;
    for (std::size_t i = 0; i < attempts.size(); ++i) {
      const Attempt& attempt = attempts[i];
      if (attempt.solved && attempt.num_tokens >= from && attempt.num_tokens < bin.below) {
        candidates.push_back(i);
      }
    }
    const std::size_t count = std::min(bin.count, candidates.size());
    for (std::size_t i = 0; i < count; ++i) {
      const auto left = static_cast<double>(candidates.size() - i);
      std::swap(candidates[i], candidates[i + static_cast<std::size_t>(random.next_unit() * left)]);
      drawn.push_back(candidates[i]);
    }
    from = bin.below;
  }
  return drawn;
}

/// Whose mean and deviation an answer's reward is measured by.
enum class Advantages : std::uint8_t {
  kGroup,  ///< those of its prompt's answers: the paper, group_advantages()
  kBatch,  ///< those of all tokens of the step: the released trainer, batch_advantages()
};

/// The published figures. beta is 2.5e-3 for Qwen3-4B-Thinking; 5e-3 gives up too many heads, 2e-4
/// too few. tau is 0.55 for DeepSeek-R1-Distill-Qwen-7B.
struct Training {
  std::int64_t num_steps = 185;
  int prompts_per_step = 32;
  int group_size = 4;             ///< answers to each prompt, at least 2
  double learning_rate = 0.01;    ///< constant
  double beta = 1e-3;             ///< of l1_weight()
  double reward_threshold = 0.5;  ///< tau
  ClippedObjective objective = {};
  Advantages advantages = Advantages::kGroup;
  AdamW adamw = {.weight_decay = 0.017, .max_norm = 1.0};

  /// @throws ConfigError for a number out of its range.
  void check() const {
    using headwise::detail::checked_range;
    checked_range(num_steps, 1, std::int64_t{1} << 40, "num_steps");
    checked_range(prompts_per_step, 1, 1 << 20, "prompts_per_step");
    checked_range(group_size, 2, 1 << 20, "group_size");
    const auto require = [](double value, const char* what) {
      if (!is_finite(value) || value < 0.0)
        fail<ConfigError>(what, " must be at least 0, got ", value);
    };
    require(learning_rate, "learning_rate");
    require(beta, "beta");
    require(objective.clip, "clip");
    adamw.check();
  }
};

/// What a streaming half sees in training, rounded to blocks of 128 there; deployed heads have
/// kDeployWindow.
inline constexpr Window kTrainingWindow{.sink = 128, .recent = 256};

/// An answer that the model has drawn.
struct Rollout {
  std::vector<std::int32_t> prompt;
  std::vector<std::int32_t> answer;  ///< up to where the model ended or was ended
  std::vector<float> log_probs;      ///< of the answer's tokens, as they were drawn
};

/// What an engine does for the training. Gates as GateOptimizer::gates().
///  - sample(prompt, gates, count): that many answers, drawn with mixed attention (published: at
///    temperature 1);
///  - log_probs(rollout, gates): of its answer's tokens, with mixed attention; borrowed, good until
///    the next call;
///  - backward(d_log_probs, d_gates): of the last log_probs(); adds to d_gates.
template <class E>
concept Engine = requires(E& engine, const std::vector<std::int32_t>& prompt,
                          const Rollout& rollout, int count, std::span<const double> gates,
                          std::span<const float> d_log_probs, std::span<double> d_gates) {
  { engine.sample(prompt, gates, count) } -> std::same_as<std::vector<Rollout>>;
  { engine.log_probs(rollout, gates) } -> std::convertible_to<std::span<const float>>;
  engine.backward(d_log_probs, d_gates);
};

/// How a step went, before its update.
struct Progress {
  std::int64_t step = 0;     ///< from 0
  double mean_reward = 0.0;  ///< of the step's answers
  double l1_weight = 0.0;
  double mean_gate = 0.0;  ///< mean |gate|
};

/// Trains the gates of a model. Each step draws answers with the gates as they are and makes one
/// update: the ratio is 1, and its clip never acts; what the engine draws otherwise than it
/// computes log-probabilities is corrected by the objective's factor. The mean reward is the step's
/// (the released trainer's is a micro-batch's).
/// @param next_prompt  `()` -> std::vector<std::int32_t>
/// @param reward  `(Rollout)` -> in [0, 1], 1: right
/// @param on_progress  `(Progress)`, after each step
/// @return one value for each KV head; some may lie a little outside of [0, 1]
/// @throws ConfigError for a training out of range, another number of answers or log-probabilities
///   than asked for, or a reward outside [0, 1].
template <Engine E, class NextPrompt, class Reward, class OnProgress>
HeadScores train(const ModelShape& shape, const Training& training, E& engine,
                 NextPrompt&& next_prompt, Reward&& reward, OnProgress&& on_progress) {
  training.check();
  GateOptimizer optimizer(shape, training.adamw);
  std::vector<double> d_gates(optimizer.gates().size());
  for (std::int64_t step = 0; step < training.num_steps; ++step) {
    optimizer.clamp();
    std::vector<Rollout> rollouts;
    std::vector<double> rewards;
    std::vector<std::int64_t> lengths;
    Progress progress{.step = step};
    double tokens = 0.0;
    for (int i = 0; i < training.prompts_per_step; ++i) {
      const std::vector<std::int32_t> prompt = next_prompt();
      std::vector<Rollout> group = engine.sample(prompt, optimizer.gates(), training.group_size);
      if (std::ssize(group) != training.group_size) {
        fail<ConfigError>("the engine drew ", group.size(), " answers, asked for ",
                          training.group_size);
      }
      for (Rollout& rollout : group) {
        const double got = reward(std::as_const(rollout));
        if (!(got >= 0.0 && got <= 1.0)) fail<ConfigError>("a reward must be in [0, 1], got ", got);
        rewards.push_back(got);
        progress.mean_reward += got;
        lengths.push_back(std::ssize(rollout.answer));
        tokens += static_cast<double>(rollout.answer.size());
        rollouts.push_back(std::move(rollout));
      }
    }
    progress.mean_reward /= static_cast<double>(rewards.size());
    const std::vector<double> advantages = training.advantages == Advantages::kGroup
                                               ? group_advantages(rewards, training.group_size)
                                               : batch_advantages(rewards, lengths);
    std::ranges::fill(d_gates, 0.0);
    for (std::size_t i = 0; i < rollouts.size(); ++i) {
      if (is_zero(advantages[i]) || rollouts[i].answer.empty()) continue;
      const std::span<const float> log_probs = engine.log_probs(rollouts[i], optimizer.gates());
      if (log_probs.size() != rollouts[i].answer.size()) {
        fail<ConfigError>("log-probabilities of ", log_probs.size(), " tokens of an answer of ",
                          rollouts[i].answer.size());
      }
      std::vector<float> d_log_probs(log_probs.size());
      training.objective({log_probs, log_probs, rollouts[i].log_probs}, advantages[i], 1.0 / tokens,
                         d_log_probs);
      engine.backward(d_log_probs, d_gates);
    }
    progress.l1_weight = l1_weight(progress.mean_reward, training.reward_threshold, training.beta);
    progress.mean_gate = add_l1(optimizer.gates(), progress.l1_weight, d_gates);
    optimizer.step(d_gates, training.learning_rate);
    on_progress(std::as_const(progress));
  }
  return optimizer.scores();
}

/// The same, in silence.
template <Engine E, class NextPrompt, class Reward>
HeadScores train(const ModelShape& shape, const Training& training, E& engine,
                 NextPrompt&& next_prompt, Reward&& reward) {
  return train(shape, training, engine, next_prompt, reward, [](const Progress&) {});
}

}  // namespace headwise::inline v0::rlkv
