// SPDX-License-Identifier: MIT
/// @file query_moments.hpp
/// QueryMoments: mean and covariance of one query head's queries, summed as they pass.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "headwise/core/check.hpp"
#include "headwise/core/row_view.hpp"

namespace headwise::inline v0 {

/// Sums, in double, over the queries of one query head before RoPE: of them, and of their products.
/// The same however a prompt is cut. Copy it where a sequence forks; what was added stays added.
class QueryMoments {
 public:
  /// @throws ConfigError for a width below 1.
  explicit QueryMoments(int dim) : dim_(dim) {
    if (dim < 1) fail<ConfigError>("queries have a width of at least 1, got ", dim);
    sums_.resize(width());
    products_.resize(width() * width());
  }
  /// From calibration: what a file says of a model's queries.
  /// @param mean  [dim]
  /// @param covariance  [dim, dim]
  /// @throws ConfigError for sizes that do not go together.
  QueryMoments(std::span<const double> mean, std::span<const double> covariance)
      : QueryMoments(static_cast<int>(mean.size())) {
    if (covariance.size() != mean.size() * mean.size()) {
      fail<ConfigError>("a covariance of ", covariance.size(), " numbers beside a mean of ",
                        mean.size());
    }
    count_ = 1;
    sums_.assign(mean.begin(), mean.end());
    for (std::size_t i = 0; i < width(); ++i) {
      for (std::size_t j = 0; j < width(); ++j) {
        products_[i * width() + j] = covariance[i * width() + j] + mean[i] * mean[j];
      }
    }
  }

  /// Adds queries.
  /// @throws ConfigError for another width.
  /// Cost: dim^2 multiply-adds a query.
  void add(const RowView& queries) {
    if (queries.dim != dim_) {
      fail<ConfigError>("moments of width ", dim_, ", queries of width ", queries.dim);
    }
    for (std::int64_t i = 0; i < queries.count; ++i) {
      const float* q = queries.row(i);
      for (std::size_t a = 0; a < width(); ++a) {
        const auto x = static_cast<double>(q[a]);
        sums_[a] += x;
        double* row = products_.data() + a * width();
        for (std::size_t b = 0; b < width(); ++b) row[b] += x * static_cast<double>(q[b]);
      }
    }
    count_ += queries.count;
  }

  /// Queries added.
  std::int64_t count() const { return count_; }
  /// Of a query.
  int dim() const { return dim_; }
  /// [dim]; zeros where nothing was added.
  std::vector<double> mean() const {
    std::vector<double> mean = sums_;
    for (double& x : mean) x /= divisor();
    return mean;
  }
  /// [dim, dim], divided by the count.
  std::vector<double> covariance() const {
    const std::vector<double> m = mean();
    std::vector<double> covariance = products_;
    for (std::size_t i = 0; i < width(); ++i) {
      for (std::size_t j = 0; j < width(); ++j) {
        double& x = covariance[i * width() + j];
        x = x / divisor() - m[i] * m[j];
      }
    }
    return covariance;
  }
  /// Of one query head: for an estimate.
  static constexpr std::size_t bytes(int dim) {
    const auto d = static_cast<std::size_t>(dim);
    return (d + d * d) * sizeof(double);
  }

 private:
  std::size_t width() const { return static_cast<std::size_t>(dim_); }
  double divisor() const { return count_ > 0 ? static_cast<double>(count_) : 1.0; }

  int dim_;
  std::int64_t count_ = 0;
  std::vector<double> sums_;      // [dim]
  std::vector<double> products_;  // [dim, dim]
};

}  // namespace headwise::inline v0
