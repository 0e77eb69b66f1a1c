// SPDX-License-Identifier: MIT
/// @file reference.hpp
/// The oracle: attention in double precision and plain loops. Slow, allocates, and easy to believe.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <vector>

#include "headwise/attention/problem.hpp"
#include "headwise/cache/rows/format.hpp"
#include "headwise/core/bits.hpp"

namespace headwise::inline v0 {

/// Attention of one query row over rows that are added one by one.
class ReferenceRow {
 public:
  /// @param q  [k_dim], borrowed.
  /// @param soft_cap  of scores; 0: none
  ReferenceRow(const float* q, double scale, double soft_cap = 0.0)
      : q_(q), scale_(scale), soft_cap_(soft_cap) {}

  /// A learned logit without a value.
  void add_sink(double logit) { sinks_.push_back(logit); }

  /// One visible row, [k_dim] and [v_dim]; `bias` is added to its capped score: ln(n) for a row
  /// that stands for n, ALiBi's slope times the tokens from query to key.
  template <class T>
  void add(std::span<const T> k, std::span<const T> v, double bias = 0.0) {
    double score = 0.0;
    for (std::size_t d = 0; d < k.size(); ++d) {
      score += static_cast<double>(q_[d]) * static_cast<double>(k[d]);
    }
    score = as_f32_range(score * scale_);
    if (soft_cap_ > 0.0) score = soft_cap_ * std::tanh(score / soft_cap_);
    scores_.push_back(as_f32_range(score + bias));
    for (const T x : v) values_.push_back(static_cast<double>(x));
  }

  /// softmax(scores) * values; zeros where no row was added or all logits are -inf, NaN where one
  /// is +inf or NaN. Costs O(rows x v_dim).
  std::vector<double> output(int v_dim) const {
    std::vector<double> out(static_cast<std::size_t>(v_dim), 0.0);
    const double max = largest();
    if (is_minus_infinity(max)) return out;
    double sum = sum_of(sinks_, max);
    for (std::size_t i = 0; i < scores_.size(); ++i) {
      const double weight = std::exp(scores_[i] - max);
      sum += weight;
      for (std::size_t d = 0; d < out.size(); ++d) out[d] += weight * values_[i * out.size() + d];
    }
    for (double& x : out) x /= sum;
    return out;
  }

  /// Logarithm of the sum of exp(score); -inf where output() is zeros for want of rows.
  double lse() const {
    const double max = largest();
    if (is_minus_infinity(max)) return max;
    return max + std::log(sum_of(sinks_, max) + sum_of(scores_, max));
  }

 private:
  static constexpr double kInfinity = std::bit_cast<double>(kInfinityBits<double>);

  /// Kernels have scores in f32: one beyond its range is infinite.
  static double as_f32_range(double score) {
    if (std::fabs(score) <= static_cast<double>(std::numeric_limits<float>::max())) return score;
    return score * kInfinity;  // NaN stays
  }
  static double sum_of(const std::vector<double>& logits, double max) {
    double sum = 0.0;
    for (const double logit : logits) sum += std::exp(logit - max);
    return sum;
  }
  double largest() const {
    double max = -kInfinity;
    for (const double sink : sinks_) max = std::max(max, sink);
    for (const double score : scores_) {
      if (is_nan(score)) return score;
      max = std::max(max, score);
    }
    return max;
  }

  const float* q_;
  double scale_;
  double soft_cap_;
  std::vector<double> sinks_;
  std::vector<double> scores_;
  std::vector<double> values_;  // [rows, v_dim]
};

namespace detail {

/// A row that queries may see, as the row format holds it.
struct ReferenceKey {
  std::vector<double> k;  ///< [k_dim]
  std::vector<double> v;  ///< [v_dim]
  std::int64_t stands_for = 1;
  std::optional<Pos> pos;  ///< a compensation row has none: every query sees it
};

/// A row of q, k or v as floats.
inline std::vector<float> float_row(const InputView& view, std::int64_t token, std::int64_t head,
                                    int dim) {
  std::vector<float> row;
  view.visit([&](auto tensor) {
    for (int d = 0; d < dim; ++d) row.push_back(to_float(tensor.row(token, head)[d]));
  });
  return row;
}

/// Every row of the problem, each read once.
template <RowFormat Format>
std::vector<ReferenceKey> reference_keys(const HeadProblem<Format>& problem) {
  const KvView<Format>& past = problem.past;
  const PageShape& shape = past.shape;
  const auto doubles = [](const std::vector<float>& x) {
    return std::vector<double>(x.begin(), x.end());
  };
  std::vector<ReferenceKey> keys;
  std::vector<float> k(static_cast<std::size_t>(shape.k_dim));
  std::vector<float> v(static_cast<std::size_t>(shape.v_dim));
  for (const KvRun& run : past.runs()) {
    for (std::int64_t r = 0; r < run.count; ++r) {
      const Slot slot = run.first_slot + r;
      Format::read_row(past.page_of(slot), shape,
                       static_cast<std::size_t>(slot.value % shape.page_tokens), k.data(),
                       v.data());
      keys.push_back({doubles(k), doubles(v), 1, run.first_pos + r});
    }
  }
  if (const CompensationRow& row = past.compensation; row.count > 0) {
    k.assign(row.k_mean, row.k_mean + shape.k_dim);
    v.assign(row.v_mean, row.v_mean + shape.v_dim);
    keys.push_back({doubles(k), doubles(v), row.count, {}});
  }
  for (std::int64_t j = 0; j < problem.num_queries; ++j) {
    const std::vector<float> own_k = float_row(problem.own_k, j, 0, shape.k_dim);
    const std::vector<float> own_v = float_row(problem.own_v, j, 0, shape.v_dim);
    Format::round_row(shape, own_k.data(), own_v.data(), k.data(), v.data());
    keys.push_back({doubles(k), doubles(v), 1, problem.first_query + j});
  }
  return keys;
}

}  // namespace detail

/// What HeadProblem's docstring says, to the letter.
/// @return [num_queries, group_size, v_dim]
template <RowFormat Format>
std::vector<double> reference_attention(const HeadProblem<Format>& problem) {
  const std::vector<detail::ReferenceKey> keys = detail::reference_keys(problem);
  std::vector<double> out;
  for (std::int64_t i = 0; i < problem.num_queries; ++i) {
    for (int g = 0; g < problem.group_size; ++g) {
      const std::vector<float> q = detail::float_row(problem.q, i, g, problem.past.shape.k_dim);
      const Pos at = problem.first_query + i;
      const HeadSoftmax& softmax = problem.softmax;
      ReferenceRow query(q.data(), static_cast<double>(problem.scale),
                         static_cast<double>(softmax.soft_cap));
      if (softmax.sinks != nullptr) query.add_sink(static_cast<double>(softmax.sinks[g]));
      for (const auto& [k, v, stands_for, pos] : keys) {
        if (pos && !problem.window.sees(at, *pos)) continue;
        double bias = std::log(static_cast<double>(stands_for));
        if (pos && softmax.alibi_slopes != nullptr) {
          bias += static_cast<double>(softmax.alibi_slopes[g]) * static_cast<double>(*pos - at);
        }
        query.add(std::span(k), std::span(v), bias);
      }
      const std::vector<double> row = query.output(problem.past.shape.v_dim);
      out.insert(out.end(), row.begin(), row.end());
    }
  }
  return out;
}

/// Attention of one query row over a dense history: no pages, no slots, no windows, only a
/// predicate. What a whole cache is tested against.
/// @param q  [k_dim]
/// @param k  [n, k_dim] as stored, that is, already rounded to the row format
/// @param v  [n, v_dim] likewise
/// @param sees  sees(j): is row j visible to this query?
/// @return [v_dim]
template <class Sees>
std::vector<double> reference_attention(const float* q, const float* k, const float* v,
                                        std::int64_t n, int k_dim, int v_dim, float scale,
                                        Sees sees) {
  ReferenceRow query(q, static_cast<double>(scale));
  for (std::int64_t j = 0; j < n; ++j) {
    if (!sees(j)) continue;
    query.add(std::span(k + j * k_dim, static_cast<std::size_t>(k_dim)),
              std::span(v + j * v_dim, static_cast<std::size_t>(v_dim)));
  }
  return query.output(v_dim);
}

}  // namespace headwise::inline v0
