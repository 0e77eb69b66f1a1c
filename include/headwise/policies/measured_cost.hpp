// SPDX-License-Identifier: MIT
/// @file measured_cost.hpp
/// Measured cost: what a model's next-token distributions lose when a KV head streams.
#pragma once

#include <algorithm>
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
#include "headwise/heads/budget.hpp"
#include "headwise/heads/plan.hpp"
#include "headwise/heads/scores.hpp"
#include "headwise/heads/select.hpp"

/// No paper's: the question that the others' evidence stands for, asked directly. Calibration texts
/// run once with the full cache and once for every KV head that streams; a head costs
///
///     mean over tokens of KL(full || with the head streaming),  in nats a token.
///
/// Forwards only, and exact for one head at a time. Heads stand in for each other, so that two that
/// are cheap alone may be dear together: greedy() streams them one after the other and measures
/// each next one beside those before it.
///
///     const auto run = [&](const HeadPlan& plan, std::int64_t text, measured_cost::Pass& pass) {
///       // a cache with this plan; the text's tokens; for each token that counts:
///       pass.token(logits);                    // [vocabulary], of the token after it
///     };
///     measured_cost::Options options{.streaming = KeepWindow{{4, 60}}, .num_texts = 16};
///     HeadScores costs = measured_cost::measure(shape, options, run);
///     HeadPlan plan = select(costs, {.sparsity = 0.5, .window = {4, 60}});
///
/// Tokens that count are the engine's choice: answers, whose distributions need what is far away.
/// Distributions are kept of one text at a time, of its full pass: its tokens x vocabulary floats.
/// (To run the full cache beside every other would keep none, and take twice as long.)
namespace headwise::inline v0::measured_cost {

/// The distributions of two passes over a text, compared token by token.
class Pass {
 public:
  /// Takes the distribution of one next token. All passes over a text have the same tokens.
  /// @param logits  [vocabulary], or log-probabilities: they are normalised here. -infinity is a
  ///   probability of 0.
  /// @throws ConfigError for NaN or infinity, no token with a probability, more tokens or another
  ///   vocabulary than in the full pass, or a probability of 0 where the full pass has more.
  void token(std::span<const float> logits) {
    const double log_sum = log_sum_exp(logits);
    if (recording_) {
      if (num_tokens_ == 0) vocabulary_ = logits.size();
      check_vocabulary(logits);
      full_.insert(full_.end(), logits.begin(), logits.end());
      log_sums_.push_back(log_sum);
    } else {
      check_vocabulary(logits);
      if (num_tokens_ == log_sums_.size()) {
        fail<ConfigError>("a pass of more than the full pass's ", num_tokens_, " tokens");
      }
      nats_ += divergence(logits, log_sum);
    }
    ++num_tokens_;
  }

  /// What follows is a text's full pass; what was kept of another text is dropped.
  void begin_full() {
    full_.clear();
    log_sums_.clear();
    begin(true);
  }
  /// What follows is compared with it.
  void begin_other() { begin(false); }
  /// Ends a pass.
  /// @return the sum over its tokens of KL(full || this pass), in nats; 0 for the full pass.
  /// @throws ConfigError for fewer tokens than in the full pass, or none.
  double end() const {
    if (num_tokens_ == 0) fail<ConfigError>("a pass without tokens");
    if (num_tokens_ < log_sums_.size()) {
      fail<ConfigError>("a pass of ", num_tokens_, " tokens, the full pass had ", log_sums_.size());
    }
    return nats_;
  }
  /// Tokens of this pass so far.
  std::size_t num_tokens() const { return num_tokens_; }

 private:
  void begin(bool recording) {
    recording_ = recording;
    num_tokens_ = 0;
    nats_ = 0.0;
  }
  void check_vocabulary(std::span<const float> logits) const {
    if (logits.size() != vocabulary_) {
      fail<ConfigError>("token ", num_tokens_, ": a distribution over ", logits.size(),
                        " tokens, the first one was over ", vocabulary_);
    }
  }
  static bool has_probability(float logit) { return is_finite(logit); }

  double log_sum_exp(std::span<const float> logits) const {
    float max = -3.0e38F;  // no infinity for -ffast-math
    bool any = false;
    for (const float x : logits) {
      if (!has_probability(x) && !(x < 0.0F)) {
        fail<ConfigError>("token ", num_tokens_, ": a logit must be finite or -infinity, got ", x);
      }
      if (!has_probability(x)) continue;
      any = true;
      max = std::max(max, x);
    }
    if (!any) fail<ConfigError>("token ", num_tokens_, ": no next token has a probability");
    double sum = 0.0;
    for (const float x : logits) {
      if (has_probability(x)) sum += std::exp(static_cast<double>(x) - static_cast<double>(max));
    }
    return static_cast<double>(max) + std::log(sum);
  }

  double divergence(std::span<const float> logits, double log_sum) const {
    const float* full = full_.data() + num_tokens_ * vocabulary_;
    double nats = 0.0;
    for (std::size_t i = 0; i < logits.size(); ++i) {
      if (!has_probability(full[i])) continue;
      if (!has_probability(logits[i])) {
        fail<ConfigError>("token ", num_tokens_, ": next token ", i,
                          " has a probability in the full pass and none here");
      }
      const double log_p = static_cast<double>(full[i]) - log_sums_[num_tokens_];
      nats += std::exp(log_p) * (log_p - (static_cast<double>(logits[i]) - log_sum));
    }
    return std::max(0.0, nats);  // rounding
  }

  bool recording_ = true;
  std::size_t vocabulary_ = 0;
  std::vector<float> full_;       // [token][vocabulary]
  std::vector<double> log_sums_;  // [token]
  std::size_t num_tokens_ = 0;    // of this pass
  double nats_ = 0.0;             // of this pass
};

/// The engine: runs calibration text `text`, from 0, in a cache with this plan and gives each
/// token's distribution to the pass.
template <class R>
concept Run = std::invocable<R&, const HeadPlan&, std::int64_t, Pass&>;

/// What measure() needs besides a model and an engine.
struct Options {
  HeadBudget streaming = {};   ///< what a head keeps that streams; must be given
  std::int64_t num_texts = 1;  ///< calibration texts
};

/// What `base` costs with each of `heads` streaming as well, alone: mean nats a token.
/// @param base  heads that stream already; layers that share K and V follow their owner's
/// @throws ConfigError for no texts, a streaming budget that keeps everything, or what Pass
/// refuses. Cost: (1 + heads) passes over each text.
template <Run Engine>
std::vector<double> costs(const ModelShape& shape, const HeadPlan& base,
                          std::span<const HeadId> heads, const Options& options, Engine&& run) {
  headwise::detail::checked_range(options.num_texts, 1, kMaxTokens, "calibration texts");
  if (is_retrieval(options.streaming)) {
    fail<ConfigError>("measured_cost needs a budget for streaming heads");
  }
  std::vector<double> nats(heads.size(), 0.0);
  double num_tokens = 0.0;
  Pass pass;
  for (std::int64_t text = 0; text < options.num_texts; ++text) {
    pass.begin_full();
    run(HeadPlan(shape), text, pass);
    static_cast<void>(pass.end());
    num_tokens += static_cast<double>(pass.num_tokens());
    for (std::size_t i = 0; i < heads.size(); ++i) {
      HeadPlan plan = base;
      plan.set(heads[i].layer, heads[i].kv_head, options.streaming);
      pass.begin_other();
      run(share_budgets(std::move(plan), shape), text, pass);
      nats[i] += pass.end();
    }
  }
  for (double& cost : nats) cost /= num_tokens;
  return nats;
}

namespace detail {

/// One value a KV head from those that layers with K and V of their own have.
template <class ValueOf>
HeadScores with_shared(const ModelShape& shape, ValueOf value_of) {
  std::vector<int> heads;
  std::vector<double> values;
  for (int l = 0; l < shape.num_layers(); ++l) {
    const LayerShape& layer = shape.layer(l);
    heads.push_back(layer.num_kv_heads);
    for (int h = 0; h < layer.num_kv_heads; ++h) {
      values.push_back(value_of(HeadId{layer.owns_kv() ? l : layer.kv_layer, h}));
    }
  }
  return HeadScores(heads, std::move(values));
}

}  // namespace detail

/// What each KV head costs that streams alone, in nats a token: higher, keep. A layer that shares K
/// and V has its owner's costs, which are those of both.
/// @throws ConfigError as costs().
/// Cost: as costs(), of all heads.
template <Run Engine>
HeadScores measure(const ModelShape& shape, const Options& options, Engine&& run) {
  std::vector<HeadId> heads;
  for (int l = 0; l < shape.num_layers(); ++l) {
    for (int h = 0; shape.layer(l).owns_kv() && h < shape.layer(l).num_kv_heads; ++h) {
      heads.push_back({l, h});
    }
  }
  const std::vector<double> nats = costs(shape, HeadPlan(shape), heads, options, run);
  return detail::with_shared(shape, [&](HeadId head) {
    return nats[static_cast<std::size_t>(std::ranges::lower_bound(heads, head) - heads.begin())];
  });
}

/// How far greedy() goes, and how wide.
struct GreedyOptions {
  std::size_t num_streaming = 0;  ///< heads that are to stream
  /// Heads that are tried each time: the cheapest alone of those that do not stream; 0: all of
  /// them.
  std::size_t num_tried = 0;
};

/// What greedy() found.
struct Greedy {
  std::vector<HeadId> order;  ///< heads in the order in which they came to stream
  std::vector<double> costs;  ///< nats a token when each had come; need not rise
  /// Ranks in [0, 1), to be selected from: the heads of `order`, then the others by what they cost
  /// alone. Shared layers have their owner's.
  HeadScores scores;
};

/// Lets heads stream one after the other, each time the one that costs least beside those that do
/// already: pairs, and sets, that are cheap together.
/// @param alone  what each costs alone: measure()
/// @throws ConfigError for more heads than have K and V of their own, scores of another model, or
///   as costs().
/// Cost: `num_streaming` times (1 + heads tried) passes over each text.
template <Run Engine>
Greedy greedy(const ModelShape& shape, const HeadScores& alone, const Options& options,
              const GreedyOptions& greedily, Engine&& run) {
  check_shape(alone, shape);
  std::vector<HeadId> left = streaming_order(alone);
  std::erase_if(left, [&](HeadId head) { return !shape.layer(head.layer).owns_kv(); });
  if (greedily.num_streaming > left.size()) {
    fail<ConfigError>("cannot stream ", greedily.num_streaming, " heads of ", left.size());
  }
  std::vector<HeadId> order;
  std::vector<double> nats;
  HeadPlan plan(shape);
  while (order.size() < greedily.num_streaming) {
    const std::size_t tried =
        greedily.num_tried == 0 ? left.size() : std::min(greedily.num_tried, left.size());
    const std::vector<double> each = costs(shape, plan, std::span(left).first(tried), options, run);
    const auto best = std::ranges::min_element(each) - each.begin();  // the cheaper alone of equals
    const HeadId head = left[static_cast<std::size_t>(best)];
    plan.set(head.layer, head.kv_head, options.streaming);
    order.push_back(head);
    nats.push_back(each[static_cast<std::size_t>(best)]);
    left.erase(left.begin() + best);
  }
  std::vector<HeadId> ranked = order;
  ranked.insert(ranked.end(), left.begin(), left.end());
  HeadScores scores = detail::with_shared(shape, [&](HeadId head) {
    const auto rank = std::ranges::find(ranked, head) - ranked.begin();
    return static_cast<double>(rank) / static_cast<double>(ranked.size());
  });
  return {std::move(order), std::move(nats), std::move(scores)};
}

}  // namespace headwise::inline v0::measured_cost
