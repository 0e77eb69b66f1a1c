// SPDX-License-Identifier: MIT
/// @file razor_probe.hpp
/// RazorAttention's probe: induction and echo scores of any model, from one repeated random prompt.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <span>
#include <utility>
#include <vector>

#include "headwise/attention/logit_blocks.hpp"
#include "headwise/core/check.hpp"
#include "headwise/core/checked.hpp"
#include "headwise/core/row_view.hpp"
#include "headwise/core/shape.hpp"
#include "headwise/core/tensor_view.hpp"
#include "headwise/core/window.hpp"
#include "headwise/heads/scores.hpp"
#include "headwise/heads/splitmix64.hpp"
#include "headwise/policies/razor_attention.hpp"
#include "headwise/simd/simd.hpp"

namespace headwise::inline v0::razor_attention {

/// The probe's prompt: a token to begin with, then `period` random ones, `repeats` times. Defaults:
/// the released code's (Huawei msModelSlim, RARopeCompressor).
struct ProbePrompt {
  std::int64_t period = 2500;    ///< K random tokens, at least 2
  std::int64_t repeats = 4;      ///< T times in all, at least 2
  std::int32_t lowest = 10000;   ///< token ids are drawn from [lowest, highest], with replacement
  std::int32_t highest = 12500;  ///< as `lowest`

  /// Tokens of the prompt, the first one included.
  constexpr std::int64_t length() const { return 1 + period * repeats; }

  /// The prompt: the same for a seed on every platform.
  /// @param bos  what the model's texts begin with
  /// @throws ConfigError for fewer than 2 repeats or a period below 2, more than kMaxTokens tokens,
  ///   or no ids to draw from.
  std::vector<std::int32_t> tokens(std::int32_t bos, std::uint64_t seed) const {
    check();
    if (lowest < 0 || highest < lowest) {
      fail<ConfigError>("token ids are drawn from a range, got ", lowest, " to ", highest);
    }
    SplitMix64 random(seed);
    const double ids = static_cast<double>(highest) - static_cast<double>(lowest) + 1.0;
    std::vector<std::int32_t> tokens{bos};
    tokens.reserve(static_cast<std::size_t>(length()));
    for (std::int64_t i = 0; i < period; ++i) {
      tokens.push_back(lowest + static_cast<std::int32_t>(random.next_unit() * ids));
    }
    for (std::int64_t i = period; i < period * repeats; ++i) {
      tokens.push_back(tokens[static_cast<std::size_t>(1 + i - period)]);
    }
    return tokens;
  }

  /// @throws ConfigError as tokens(), the ids aside.
  void check() const {
    detail::checked_range(period, 2, kMaxTokens, "period of a probe's prompt");
    detail::checked_range(repeats, 2, (kMaxTokens - 1) / period, "repeats of a probe's prompt");
  }
};

/// The probe itself, as the released code counts. With A a query head's softmax weights without
/// the first token's row and column (not renormalised), and for each i in [K, T K) the earlier
/// copies J(i) = {j < i : j = i mod K} of its token,
///
///     echo = mean over i of sum over J of A[i][j]     induction = the same of A[i][j + 1]
///
///     razor_attention::ProbePrompt prompt;
///     razor_attention::Probe probe(shape, prompt);
///     // run the model on prompt.tokens(bos, seed); in each layer, after RoPE,
///     probe.add(layer, q, k, first_position, num_tokens);
///     HeadPlan plan = razor_attention::Policy{}.plan(probe.scores());
///
/// Only the T - 1 diagonals and each row's sum are kept, so that no n x n weights are ever there;
/// the released code has them. Numbers are the same bits however the prompt is cut, and several
/// prompts may be added: means are over all queries. Softmax is plain: a layer with a soft-cap,
/// sinks, ALiBi slopes or a window of its own is refused; one that is not added scores 0.
class Probe {
 public:
  /// @throws ConfigError for a prompt out of range (ProbePrompt::check).
  explicit Probe(const ModelShape& shape, const ProbePrompt& prompt = {})
      : prompt_(prompt), shape_(shape) {
    prompt.check();
    for (const LayerShape& layer : shape_.layers()) {
      sums_.emplace_back(static_cast<std::size_t>(layer.num_qo_heads()));
    }
    num_queries_.assign(sums_.size(), 0);
  }

  /// Adds a step's queries of one layer; different layers may be added on different threads.
  /// @param q  [num_tokens, num_qo_heads, k_dim] the step's, after RoPE
  /// @param k  [first_position + num_tokens, num_kv_heads, k_dim] of *all* tokens so far, after
  ///   RoPE: where the prompt is one step, the step's own
  /// @param first_position  of the step's first token in the prompt
  /// @throws ConfigError for a layer whose softmax is not plain, or tokens beyond the prompt.
  /// Cost: 2 k_dim flop and an exponential a query, query head and key; floats of a few numbers a
  ///   query.
  template <class Isa = simd::BestIsa>
  void add(int layer, TensorView<const float> q, TensorView<const float> k,
           std::int64_t first_position, std::int64_t num_tokens) {
    const auto l = static_cast<std::size_t>(layer);
    const LayerShape& shape = shape_.layer(layer);
    if (shape.softmax != SoftmaxOptions{} || shape.sliding_window != 0) {
      fail<ConfigError>("layer ", layer, ": the probe knows plain softmax only, no soft-cap, ",
                        "sinks, slopes or windows of a layer's own");
    }
    if (first_position < 0 || num_tokens < 0 || first_position > prompt_.length() - num_tokens) {
      fail<ConfigError>("tokens ", first_position, " to ", first_position + num_tokens,
                        " of a prompt of ", prompt_.length());
    }
    // The first block has no earlier copy.
    const std::int64_t first = std::max(first_position, prompt_.period + 1);
    const std::int64_t last = first_position + num_tokens;
    if (first >= last) return;
    std::vector<std::int64_t> visible(static_cast<std::size_t>(last - first));
    std::iota(visible.begin(), visible.end(), first + 1);
    for (int h = 0; h < shape.num_qo_heads(); ++h) {
      const RowView queries{q.row(first - first_position, h), q.stride_n, last - first,
                            shape.k_dim};
      const RowView keys{k.row(0, h / shape.group_size), k.stride_n, last, shape.k_dim};
      add_head<Isa>(queries, visible, keys, shape.scale(), sums_[l][static_cast<std::size_t>(h)]);
    }
    num_queries_[l] += last - first;
  }

  /// Induction scores of the query heads, each in [0, 1].
  QueryHeadScores induction() const { return means(&Sums::induction); }
  /// Echo scores, as induction().
  QueryHeadScores echo() const { return means(&Sums::echo); }
  /// Evidence for Policy: a KV head has its best query head's scores.
  Scores scores() const { return {reduce_max(induction(), shape_), reduce_max(echo(), shape_)}; }

 private:
  struct Sums {
    double induction = 0.0;
    double echo = 0.0;
  };
  /// A row of the softmax so far, relative to its largest logit.
  struct Row {
    float max = -3.0e38F;  // below every finite logit; no infinity for -ffast-math
    double total = 0.0;
    Sums seen = {};
  };

  /// @param visible  a query's position + 1
  template <class Isa>
  void add_head(const RowView& queries, std::span<const std::int64_t> visible, const RowView& keys,
                float scale, Sums& sums) const {
    using Block = headwise::detail::KeyBlock<Isa>;
    const std::int64_t period = prompt_.period;
    std::vector<Row> rows(visible.size());
    alignas(64) float weights[std::size_t{Block::kKeys}];
    for_each_logits<Isa>(
        queries, visible, keys, scale,
        [&](std::int64_t i, std::int64_t first, const float* logits, int count) {
          Row& row = rows[static_cast<std::size_t>(i)];
          const float max = *std::max_element(logits, logits + count);
          if (max > row.max) {
            const double shrink = std::exp(static_cast<double>(row.max - max));
            row.total *= shrink;
            row.seen.induction *= shrink;
            row.seen.echo *= shrink;
            row.max = max;
          }
          Block::weights(logits, row.max, weights);
          for (int t = 0; t < count; ++t) row.total += static_cast<double>(weights[t]);
          // Copies of the query's token, and the tokens after them, of this block. The first token
          // of the prompt is no copy, and the one after it follows none.
          const std::int64_t position = visible[static_cast<std::size_t>(i)] - 1;
          for (std::int64_t at = (position - first) % period; at < count; at += period) {
            if (first + at > 0 && first + at < position) {
              row.seen.echo += static_cast<double>(weights[at]);
            }
          }
          for (std::int64_t at = (position + 1 - first) % period; at < count; at += period) {
            if (first + at > 1) row.seen.induction += static_cast<double>(weights[at]);
          }
        });
    for (const Row& row : rows) {
      sums.induction += row.seen.induction / row.total;
      sums.echo += row.seen.echo / row.total;
    }
  }

  QueryHeadScores means(double Sums::*which) const {
    std::vector<int> heads;
    std::vector<double> values;
    for (std::size_t l = 0; l < sums_.size(); ++l) {
      heads.push_back(static_cast<int>(sums_[l].size()));
      const auto queries = static_cast<double>(std::max<std::int64_t>(1, num_queries_[l]));
      for (const Sums& sums : sums_[l]) values.push_back(sums.*which / queries);
    }
    return QueryHeadScores(heads, std::move(values));
  }

  ProbePrompt prompt_;
  ModelShape shape_;
  std::vector<std::vector<Sums>> sums_;    // [layer][query head]
  std::vector<std::int64_t> num_queries_;  // [layer], of each of its heads
};

}  // namespace headwise::inline v0::razor_attention
