// SPDX-License-Identifier: MIT
/// @file retrieval_probe.hpp
/// Retrieval Head's probe: copy scores of all query heads while a model answers from a needle.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <numeric>
#include <span>
#include <utility>
#include <vector>

#include "headwise/attention/logit_blocks.hpp"
#include "headwise/core/bits.hpp"
#include "headwise/core/check.hpp"
#include "headwise/core/checked.hpp"
#include "headwise/core/position.hpp"
#include "headwise/core/row_view.hpp"
#include "headwise/core/shape.hpp"
#include "headwise/core/tensor_view.hpp"
#include "headwise/heads/scores.hpp"
#include "headwise/policies/retrieval_head.hpp"
#include "headwise/simd/simd.hpp"

namespace headwise::inline v0::retrieval_head {

/// A run counts when its output has more than this share of the needle's tokens (released code).
inline constexpr double kLeastRecall = 0.5;

/// ROUGE-1 recall of tokens: the share of the reference's that the output has, each as often as it
/// is there. (The released code takes words.)
/// @throws ConfigError for an empty reference.
inline double unigram_recall(std::span<const std::int32_t> reference,
                             std::span<const std::int32_t> output) {
  if (reference.empty()) fail<ConfigError>("a reference needs at least 1 token, got 0");
  std::map<std::int32_t, std::int64_t> left;
  for (const std::int32_t token : output) ++left[token];
  std::int64_t found = 0;
  for (const std::int32_t token : reference) {
    if (left[token]-- > 0) ++found;
  }
  return static_cast<double>(found) / static_cast<double>(reference.size());
}

/// CopyScore of every query head, and its mean over the runs that were answered. The paper's are
/// about 600: 3 needles, 20 lengths, 10 depths, greedy, at most 50 tokens each.
///
///     retrieval_head::Probe probe(shape);
///     probe.begin(needle_position, needle_tokens);           // each run
///     // each step that generates a token, the first one with the prompt's last query:
///     probe.add(layer, q, k, position, 1);                   // in each layer, after RoPE
///     probe.step({&generated, 1});                           // once the token is known
///     probe.end();
///     HeadPlan plan = retrieval_head::Policy{.group_size = g, .window = w}.plan(probe.mean());
///
/// Several tokens may be one step, as where a text is known and the model only reads it. A layer
/// with ALiBi slopes or a window of its own is refused; a soft-cap changes no order. A layer that
/// is not added scores 0.
class Probe {
 public:
  /// @param least_recall  a run counts above it; below 0: every run does.
  explicit Probe(const ModelShape& shape, double least_recall = kLeastRecall)
      : shape_(shape), least_recall_(least_recall) {
    if (!is_finite(least_recall)) fail<ConfigError>("least recall must be finite");
    for (const LayerShape& layer : shape.layers()) {
      first_head_.push_back(num_heads_);
      num_heads_ += static_cast<std::size_t>(layer.num_qo_heads());
    }
    sums_.resize(num_heads_);
    attended_.resize(first_head_.size());
  }

  /// Starts a run; what an unfinished one had is dropped.
  /// @param first  position of the needle's first token.
  /// @param needle  its token ids, at least one.
  /// @throws ConfigError as CopyScore.
  void begin(Pos first, std::span<const std::int32_t> needle) {
    scores_.assign(num_heads_, CopyScore(first, needle));
    needle_.assign(needle.begin(), needle.end());
    output_.clear();
    for (auto& of_layer : attended_) of_layer.clear();
  }

  /// Notes where a step's queries of one layer look; different layers may be added on different
  /// threads.
  /// @param q  [num_tokens, num_qo_heads, k_dim] the step's, after RoPE
  /// @param k  [first_position + num_tokens, num_kv_heads, k_dim] of *all* tokens so far, after
  ///   RoPE
  /// @param first_position  of the step's first query
  /// @param num_tokens  queries, each of which generates a token
  /// @throws ConfigError for a layer with slopes or a window, or positions out of range.
  /// Cost: 2 k_dim flop a query, query head and key.
  template <class Isa = simd::BestIsa>
  void add(int layer, TensorView<const float> q, TensorView<const float> k,
           std::int64_t first_position, std::int64_t num_tokens) {
    const LayerShape& shape = shape_.layer(layer);
    if (!shape.softmax.alibi_slopes.empty() || shape.sliding_window != 0) {
      fail<ConfigError>("layer ", layer, ": the probe knows no slopes or windows of a layer's own");
    }
    headwise::detail::checked_range(first_position, 0, kMaxTokens, "first position");
    headwise::detail::checked_range(num_tokens, 0, kMaxTokens, "tokens of a step");
    const auto heads = static_cast<std::size_t>(shape.num_qo_heads());
    std::vector<std::int64_t>& attended = attended_[static_cast<std::size_t>(layer)];
    attended.assign(static_cast<std::size_t>(num_tokens) * heads, -1);
    std::vector<std::int64_t> visible(static_cast<std::size_t>(num_tokens));
    std::iota(visible.begin(), visible.end(), first_position + 1);
    for (std::size_t h = 0; h < heads; ++h) {
      const int head = static_cast<int>(h);
      std::vector<float> most(visible.size(), -3.0e38F);  // no infinity for -ffast-math
      for_each_logits<Isa>(
          {q.row(0, head), q.stride_n, num_tokens, shape.k_dim}, visible,
          {k.row(0, head / shape.group_size), k.stride_n, first_position + num_tokens, shape.k_dim},
          shape.scale(), [&](std::int64_t i, std::int64_t first, const float* logits, int count) {
            const auto row = static_cast<std::size_t>(i);
            const float* best = std::max_element(logits, logits + count);
            if (*best > most[row]) {  // of equal ones the first
              most[row] = *best;
              attended[row * heads + h] = first + (best - logits);
            }
          });
    }
  }

  /// Ends a step.
  /// @param generated  the token that each query generated, as many as were added
  /// @throws ConfigError for another number of them than of queries in a layer, or outside a run;
  ///   the step then is not counted.
  void step(std::span<const std::int32_t> generated) {
    if (scores_.empty()) fail<ConfigError>("a step outside a run: begin() comes first");
    for (std::size_t l = 0; l < attended_.size(); ++l) {
      const std::size_t heads = heads_of(l);
      if (!attended_[l].empty() && attended_[l].size() != generated.size() * heads) {
        fail<ConfigError>("layer ", l, ": ", attended_[l].size() / heads, " queries, ",
                          generated.size(), " tokens generated");
      }
    }
    for (std::size_t l = 0; l < attended_.size(); ++l) {
      for (std::size_t at = 0; at < attended_[l].size(); ++at) {
        scores_[first_head_[l] + at % heads_of(l)].step(Pos{attended_[l][at]},
                                                        generated[at / heads_of(l)]);
      }
      attended_[l].clear();
    }
    output_.insert(output_.end(), generated.begin(), generated.end());
  }

  /// Ends the run.
  /// @return whether it counts: whether the output has enough of the needle (unigram_recall()).
  /// @throws ConfigError outside a run.
  bool end() {
    if (scores_.empty()) fail<ConfigError>("the end of no run: begin() comes first");
    const bool counts = unigram_recall(needle_, output_) > least_recall_;
    if (counts) {
      for (std::size_t h = 0; h < num_heads_; ++h) {
        sums_[h].released += scores_[h].score();
        sums_[h].paper += scores_[h].paper_score();
      }
      ++num_runs_;
    }
    scores_.clear();
    return counts;
  }

  /// Runs that counted.
  std::int64_t num_runs() const { return num_runs_; }
  /// Mean of CopyScore::score(), what published files have; zeros without a run that counted.
  QueryHeadScores mean() const { return means(&Sums::released); }
  /// Mean of CopyScore::paper_score().
  QueryHeadScores paper_mean() const { return means(&Sums::paper); }

 private:
  struct Sums {
    double released = 0.0;
    double paper = 0.0;
  };

  std::size_t heads_of(std::size_t layer) const {
    return static_cast<std::size_t>(shape_.layer(static_cast<int>(layer)).num_qo_heads());
  }
  QueryHeadScores means(double Sums::*which) const {
    std::vector<int> heads;
    for (const LayerShape& layer : shape_.layers()) heads.push_back(layer.num_qo_heads());
    std::vector<double> values;
    const auto runs = static_cast<double>(std::max<std::int64_t>(1, num_runs_));
    for (const Sums& sums : sums_) values.push_back(sums.*which / runs);
    return QueryHeadScores(heads, std::move(values));
  }

  ModelShape shape_;
  double least_recall_;
  std::vector<std::size_t> first_head_;  // [layer]
  std::size_t num_heads_ = 0;
  std::vector<Sums> sums_;  // [query head of all layers]
  std::int64_t num_runs_ = 0;

  std::vector<CopyScore> scores_;  // as sums_, of the run; empty outside one
  std::vector<std::int32_t> needle_;
  std::vector<std::int32_t> output_;
  std::vector<std::vector<std::int64_t>> attended_;  // [layer][token, query head] of the step
};

}  // namespace headwise::inline v0::retrieval_head
