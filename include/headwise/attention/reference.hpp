// SPDX-License-Identifier: MIT
/// @file reference.hpp
/// The oracle: attention in double precision and plain loops. Slow, allocates, and easy to believe.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "headwise/attention/problem.hpp"
#include "headwise/cache/page_layout.hpp"
#include "headwise/core/dtype.hpp"

namespace headwise::inline v0 {

/// Attention of one query row over rows that are added one by one.
class ReferenceRow {
 public:
  /// @param q  [k_dim], borrowed.
  ReferenceRow(const float* q, double scale) : q_(q), scale_(scale) {}

  /// One visible row; `log_weight` is ln(n) for a row that stands for n.
  void add(std::vector<double> k, std::vector<double> v, double log_weight = 0.0) {
    double score = 0.0;
    for (std::size_t d = 0; d < k.size(); ++d) score += static_cast<double>(q_[d]) * k[d];
    scores_.push_back(score * scale_ + log_weight);
    values_.push_back(std::move(v));
  }

  /// softmax(scores) * values; zeros where no row was added. Costs O(rows x v_dim).
  std::vector<double> output(int v_dim) const {
    std::vector<double> out(static_cast<std::size_t>(v_dim), 0.0);
    if (scores_.empty()) return out;
    const double max = *std::max_element(scores_.begin(), scores_.end());
    double sum = 0.0;
    for (std::size_t i = 0; i < scores_.size(); ++i) {
      const double weight = std::exp(scores_[i] - max);
      sum += weight;
      for (std::size_t d = 0; d < out.size(); ++d) out[d] += weight * values_[i][d];
    }
    for (double& x : out) x /= sum;
    return out;
  }

 private:
  const float* q_;
  double scale_;
  std::vector<double> scores_;
  std::vector<std::vector<double>> values_;
};

namespace detail {

template <RowElement Row>
std::vector<double> rounded_row(const float* row, int dim) {
  std::vector<double> out;
  for (int d = 0; d < dim; ++d) {
    out.push_back(static_cast<double>(to_float(from_float<Row>(row[d]))));
  }
  return out;
}

inline std::vector<double> mean_row(const float* sum, int dim, std::int64_t count) {
  std::vector<double> out;
  for (int d = 0; d < dim; ++d) {
    out.push_back(static_cast<double>(sum[d]) / static_cast<double>(count));
  }
  return out;
}

template <class Row, class Layout>
void add_stored_row(ReferenceRow& query, const KvView<Row, Layout>& view, Slot slot) {
  const PageShape shape{view.page_tokens, view.k_dim, view.v_dim};
  const Row* page = view.page_of(slot);
  const auto row = static_cast<std::size_t>(slot.value % view.page_tokens);
  std::vector<double> k;
  std::vector<double> v;
  for (std::size_t d = 0; d < static_cast<std::size_t>(view.k_dim); ++d) {
    k.push_back(static_cast<double>(to_float(page[Layout::k_offset(shape, row, d)])));
  }
  for (std::size_t d = 0; d < static_cast<std::size_t>(view.v_dim); ++d) {
    v.push_back(static_cast<double>(to_float(page[Layout::v_offset(shape, row, d)])));
  }
  query.add(std::move(k), std::move(v));
}

}  // namespace detail

/// What HeadProblem's docstring says, to the letter.
/// @return [num_queries, group_size, v_dim]
template <RowElement Row, PageLayout Layout>
std::vector<double> reference_attention(const HeadProblem<Row, Layout>& problem) {
  const auto& past = problem.past;
  std::vector<double> out;
  for (std::int64_t i = 0; i < problem.num_queries; ++i) {
    const Pos pos = problem.first_query + i;
    for (int g = 0; g < problem.group_size; ++g) {
      ReferenceRow query(problem.q.row(i, g), static_cast<double>(problem.scale));
      for (const KvRun& run : past.runs()) {
        for (std::int64_t r = 0; r < run.count; ++r) {
          if (!problem.window.sees(pos, run.first_pos + r)) continue;
          detail::add_stored_row(query, past, run.first_slot + r);
        }
      }
      if (const auto& row = past.compensation; row.count > 0) {
        query.add(detail::mean_row(row.k_sum, past.k_dim, row.count),
                  detail::mean_row(row.v_sum, past.v_dim, row.count),
                  std::log(static_cast<double>(row.count)));
      }
      for (std::int64_t j = 0; j <= i; ++j) {
        if (!problem.window.sees(pos, problem.first_query + j)) continue;
        query.add(detail::rounded_row<Row>(problem.own_k.row(j, 0), past.k_dim),
                  detail::rounded_row<Row>(problem.own_v.row(j, 0), past.v_dim));
      }
      const std::vector<double> row = query.output(past.v_dim);
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
    query.add(detail::rounded_row<f32>(k + j * k_dim, k_dim),
              detail::rounded_row<f32>(v + j * v_dim, v_dim));
  }
  return query.output(v_dim);
}

}  // namespace headwise::inline v0
