// SPDX-License-Identifier: MIT
/// @file tri_attention.hpp
/// TriAttention: queries before RoPE lie around a centre, and so look at certain distances.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "headwise/attention/rope.hpp"
#include "headwise/core/bits.hpp"
#include "headwise/core/check.hpp"
#include "headwise/core/checked.hpp"
#include "headwise/core/row_view.hpp"
#include "headwise/heads/decode_target.hpp"
#include "headwise/heads/token_scores.hpp"

/// Mao et al., TriAttention: Efficient Long Reasoning with Trigonometric KV Compression,
/// arXiv:2604.04921; the rule is that of the released code (WeianMao/triattention,
/// triattention/methods, 1129a5f and 092e4dc). No queries and no attention at run time: calibration
/// leaves a query head's mean query m and, of each pair of elements that RoPE turns, the mean
/// length a. With a pair as a complex number, a key k of position p, before RoPE, is worth at a
/// later one
///
///     sum over pairs of  |m| |k| cos(frequency (later - p) + arg m - arg k)  +  (a - |m|) |k|
///
/// averaged over later = length + 1, 2, 4, 8 .. `longest`. The first term is the dot product of the
/// stored key, after RoPE, with m turned to `later`: keys are not turned back here, and the average
/// is taken of m once. A factor that RoPE has (YaRN) scales all scores alike and is left out.
///
///     tri_attention::Policy policy{.prompt = n};
///     tri_attention::add_head(policy, centres, keys, positions, scores);    // each KV head
///     select_tokens(scores, policy.protection(), uniform_counts(scores, policy.budget), kept);
///
/// Scores are not comparable between heads. The paper's runs give all layers' same KV head one set
/// of tokens: add_layer_means(). Not here: one set for all heads, by their union.
namespace headwise::inline v0::tri_attention {

/// Where a query head's queries lie before RoPE: for each pair of elements the mean and the mean
/// length. Found once for a model, from text or a file; sequences share it, so that neither a fork
/// nor a rollback touches it.
class QueryCentre {
 public:
  /// Of nothing yet.
  /// @throws ConfigError for a width that is odd or below 2.
  explicit QueryCentre(int dim) : pairs_(static_cast<std::size_t>(std::max(0, dim)) / 2) {
    if (dim < 2 || dim % 2 != 0) {
      fail<ConfigError>("a centre is of an even width of at least 2, got ", dim);
    }
  }
  /// From calibration (`q_mean_real`, `q_mean_imag`, `q_abs_mean` of the released files).
  /// @param real,imaginary  [dim / 2] the mean; the first and second element of each pair
  /// @param lengths  [dim / 2] the mean length
  /// @throws ConfigError for sizes that differ, none, or a number that is not finite or a length
  ///   below 0.
  QueryCentre(std::span<const double> real, std::span<const double> imaginary,
              std::span<const double> lengths)
      : QueryCentre(2 * static_cast<int>(real.size())) {
    if (imaginary.size() != real.size() || lengths.size() != real.size()) {
      fail<ConfigError>("a mean of ", real.size(), " and ", imaginary.size(), " numbers beside ",
                        lengths.size(), " lengths");
    }
    count_ = 1;
    for (std::size_t i = 0; i < pairs_.size(); ++i) {
      if (!is_finite(real[i]) || !is_finite(imaginary[i]) || !is_finite(lengths[i]) ||
          lengths[i] < 0.0) {
        fail<ConfigError>("pair ", i, ": a mean of (", real[i], ", ", imaginary[i],
                          ") and a length of ", lengths[i]);
      }
      pairs_[i] = {real[i], imaginary[i], lengths[i]};
    }
  }

  /// Adds queries of this head before RoPE (Rope::turn_back). All weigh alike; the released
  /// calibration takes the mean of each text, then of the texts.
  /// @throws ConfigError for another width.
  void add(const Rope& rope, const RowView& queries) {
    if (queries.dim != dim()) {
      fail<ConfigError>("a centre of width ", dim(), ", queries of width ", queries.dim);
    }
    for (std::int64_t i = 0; i < queries.count; ++i) {
      const float* q = queries.row(i);
      for (std::size_t p = 0; p < pairs_.size(); ++p) {
        const auto [a, b] = rope.pair(static_cast<int>(p), dim());
        const auto x = static_cast<double>(q[a]);
        const auto y = static_cast<double>(q[b]);
        pairs_[p].real += x;
        pairs_[p].imaginary += y;
        pairs_[p].length += std::sqrt(x * x + y * y);
      }
    }
    count_ += queries.count;
  }

  /// Of a query.
  int dim() const { return 2 * static_cast<int>(pairs_.size()); }
  /// Queries added; 1 for one of a file.
  std::int64_t count() const { return count_; }
  /// First elements' mean, of pair `i`.
  double real(std::size_t i) const { return pairs_[i].real / divisor(); }
  /// Second elements' mean.
  double imaginary(std::size_t i) const { return pairs_[i].imaginary / divisor(); }
  /// Mean length.
  double length(std::size_t i) const { return pairs_[i].length / divisor(); }
  /// Of one query head: for an estimate.
  static constexpr std::size_t bytes(int dim) {
    return static_cast<std::size_t>(dim) / 2 * sizeof(Pair);
  }

 private:
  struct Pair {  // sums
    double real = 0.0;
    double imaginary = 0.0;
    double length = 0.0;
  };
  double divisor() const { return count_ > 0 ? static_cast<double>(count_) : 1.0; }

  std::int64_t count_ = 0;
  std::vector<Pair> pairs_;
};

/// What becomes of a number of scores.
enum class Combine : std::uint8_t {
  kMean,  ///< their mean
  kMax,   ///< the largest
};

/// The published knobs, as the paper's runs set them.
struct Policy {
  std::int64_t budget = 2048;          ///< tokens that a cut leaves, protected ones included
  std::int64_t interval = 128;         ///< tokens beyond the budget at which a cut is due; >= 1
  std::int64_t prompt = 0;             ///< first tokens, which stay: the prompt's
  std::int64_t recent = 0;             ///< newest tokens, which stay; 128 in the vLLM plugin
  std::int64_t longest = 65536;        ///< the farthest distance beyond the length; >= 1
  Combine distances = Combine::kMean;  ///< over the later positions
  Combine group = Combine::kMax;       ///< over the query heads of a KV head
  bool normalize = true;               ///< a query head's scores: mean 0, deviation 1 over the
                                       ///< tokens that may go
  Rope rope = {};                      ///< the model's

  /// What stays whatever its score.
  constexpr Protection protection() const { return {prompt, recent}; }
  /// Whether a cut is due after a decode step: `budget + interval` rows are stored, or more. (The
  /// released code can also cut where the length is a multiple of the interval.)
  /// @param stored  rows of the head that has most
  constexpr bool is_due(std::int64_t stored) const { return stored >= target().most_rows() + 1; }
  /// The same bounds as a target: most_rows() is for an estimate.
  constexpr DecodeTarget target() const { return {budget, interval}; }
};

/// Appends one KV head to `scores`.
/// @param centres  [group_size] of its query heads
/// @param keys  stored rows, after RoPE
/// @param stored  their positions, ascending
/// @throws ConfigError for sizes that differ, no centre or one of nothing, a rope that is not of
/// the
///   width, or a policy out of range.
/// Cost: dim multiply-adds and dim / 2 roots a key and query head; with Combine::kMax over the
/// distances as many times the former as there are distances (17).
inline void add_head(const Policy& policy, std::span<const QueryCentre> centres,
                     const RowView& keys, std::span<const std::int32_t> stored,
                     TokenScores& scores) {
  detail::checked_range(policy.longest, 1, kMaxTokens, "longest distance");
  detail::checked_range(policy.prompt, 0, kMaxTokens, "prompt");
  detail::checked_range(policy.recent, 0, kMaxTokens, "recent");
  policy.rope.check(keys.dim);
  if (keys.count != std::ssize(stored)) {
    fail<ConfigError>(keys.count, " keys and ", stored.size(), " positions");
  }
  if (centres.empty()) fail<ConfigError>("a KV head without centres of query heads");
  for (const QueryCentre& centre : centres) {
    if (centre.dim() != keys.dim || centre.count() == 0) {
      fail<ConfigError>("a centre of ", centre.count(), " queries of width ", centre.dim(),
                        " over keys of width ", keys.dim);
    }
  }
  const int pairs = keys.dim / 2;
  const auto dim = static_cast<std::size_t>(keys.dim);
  const auto out = scores.add_head(stored);
  const Protection protection = policy.protection();
  std::vector<double> of_head(out.size());
  std::vector<double> combined(out.size(), 0.0);
  std::vector<double> later;   // queries as rows: [distances][dim], or their mean
  std::vector<double> spread;  // a - |m|, of each pair
  for (std::size_t g = 0; g < centres.size(); ++g) {
    later.clear();
    double distances = 0.0;
    for (std::int64_t ahead = 1; ahead <= policy.longest; ahead *= 2) {
      if (later.empty() || policy.distances == Combine::kMax) later.resize(later.size() + dim, 0.0);
      double* row = later.data() + later.size() - dim;
      for (int i = 0; i < pairs; ++i) {
        const auto at = static_cast<std::size_t>(i);
        const double angle =
            policy.rope.frequency(i, keys.dim) * static_cast<double>(scores.length() + ahead);
        const auto [a, b] = policy.rope.pair(i, keys.dim);
        const double x = centres[g].real(at);
        const double y = centres[g].imaginary(at);
        row[a] += x * std::cos(angle) - y * std::sin(angle);
        row[b] += y * std::cos(angle) + x * std::sin(angle);
      }
      distances += 1.0;
    }
    if (policy.distances == Combine::kMean) {
      for (double& x : later) x /= distances;
    }
    spread.clear();
    for (std::size_t i = 0; i < static_cast<std::size_t>(pairs); ++i) {
      const double x = centres[g].real(i);
      const double y = centres[g].imaginary(i);
      spread.push_back(centres[g].length(i) - std::sqrt(x * x + y * y));
    }
    double count = 0.0;
    double sum = 0.0;
    const auto may_go = [&](std::size_t j) {
      return is_finite(of_head[j]) && !protection.covers(stored[j], scores.length());
    };
    for (std::size_t j = 0; j < out.size(); ++j) {
      const float* key = keys.row(static_cast<std::int64_t>(j));
      double norms = 0.0;
      for (int i = 0; i < pairs; ++i) {
        const auto [a, b] = policy.rope.pair(i, keys.dim);
        const auto x = static_cast<double>(key[a]);
        const auto y = static_cast<double>(key[b]);
        norms += spread[static_cast<std::size_t>(i)] * std::sqrt(x * x + y * y);
      }
      double best = 0.0;
      for (std::size_t row = 0; row < later.size(); row += dim) {
        double dot = 0.0;
        for (std::size_t d = 0; d < dim; ++d) dot += later[row + d] * static_cast<double>(key[d]);
        best = row == 0 ? dot : std::max(best, dot);
      }
      of_head[j] = best + norms;
      if (!may_go(j)) continue;
      count += 1.0;
      sum += of_head[j];
    }
    if (policy.normalize && count > 0.0) {
      const double mean = sum / count;
      double squares = 0.0;
      for (std::size_t j = 0; j < out.size(); ++j) {
        if (may_go(j)) squares += (of_head[j] - mean) * (of_head[j] - mean);
      }
      const double deviation = std::max(1e-6, std::sqrt(squares / count));  // the released floor
      for (double& score : of_head) score = (score - mean) / deviation;
    }
    for (std::size_t j = 0; j < out.size(); ++j) {
      if (policy.group == Combine::kMean) {
        combined[j] += of_head[j] / static_cast<double>(centres.size());
      } else if (g == 0 || !is_finite(of_head[j]) ||
                 (is_finite(combined[j]) && of_head[j] > combined[j])) {
        combined[j] = of_head[j];
      }
    }
  }
  for (std::size_t j = 0; j < out.size(); ++j) out[j] = static_cast<float>(combined[j]);
}

/// Appends all heads of `model` to `shared`, each with the mean over the layers of its own KV head:
/// one set of tokens a KV head in all layers, as the paper's runs choose them.
/// @param model  scores of every layer's KV heads, layer by layer
/// @param num_kv_heads  of each layer
/// @throws ConfigError for heads that are not whole layers, or KV heads that have stored other
///   tokens than those of layer 0; nothing is appended.
inline void add_layer_means(const TokenScores& model, std::int64_t num_kv_heads,
                            TokenScores& shared) {
  detail::checked_range(num_kv_heads, 1, kMaxTokens, "KV heads of a layer");
  if (model.num_heads() % num_kv_heads != 0) {
    fail<ConfigError>(model.num_heads(), " KV heads are not layers of ", num_kv_heads);
  }
  if (shared.length() != model.length()) {
    fail<ConfigError>("scores of ", model.length(), " tokens, means of ", shared.length());
  }
  for (std::int64_t h = num_kv_heads; h < model.num_heads(); ++h) {
    if (!std::ranges::equal(model.positions(h), model.positions(h % num_kv_heads))) {
      fail<ConfigError>("KV head ", h % num_kv_heads, " of layer ", h / num_kv_heads,
                        " has stored other tokens than in layer 0");
    }
  }
  const std::int64_t layers = model.num_heads() / num_kv_heads;
  for (std::int64_t h = 0; h < model.num_heads(); ++h) {
    const std::int64_t kv_head = h % num_kv_heads;
    const auto out = shared.add_head(model.positions(h));
    for (std::size_t j = 0; j < out.size(); ++j) {
      double sum = 0.0;
      bool counts = true;
      for (std::int64_t l = 0; l < layers; ++l) {
        const float score = model.scores(l * num_kv_heads + kv_head)[j];
        counts &= is_finite(score);
        sum += static_cast<double>(score);
      }
      out[j] = counts ? static_cast<float>(sum / static_cast<double>(layers))
                      : std::numeric_limits<float>::quiet_NaN();
    }
  }
}

}  // namespace headwise::inline v0::tri_attention
