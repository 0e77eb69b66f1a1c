// SPDX-License-Identifier: MIT
/// @file distance.hpp
/// How far two engines' logits are apart.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>

namespace in_llama {

/// Sums over rows of logits [vocabulary].
class Distance {
 public:
  /// @param p  the reference's logits
  void add(std::span<const float> p, std::span<const float> q) {
    const double log_p = log_sum(p);
    const double log_q = log_sum(q);
    for (std::size_t i = 0; i < p.size(); ++i) {
      const auto a = static_cast<double>(p[i]);
      const auto b = static_cast<double>(q[i]);
      difference_ += (a - b) * (a - b);
      norm_ += a * a;
      kl_ += std::exp(a - log_p) * ((a - log_p) - (b - log_q));
    }
    num_alike_ +=
        std::ranges::max_element(p) - p.begin() == std::ranges::max_element(q) - q.begin();
    ++num_rows_;
  }

  /// Squared difference over the reference's squares.
  double nmse() const { return difference_ / norm_; }
  /// KL(p || q), nats a row.
  double mean_kl() const { return kl_ / static_cast<double>(num_rows_); }
  /// Share of rows whose likeliest token is the same.
  double alike() const { return static_cast<double>(num_alike_) / static_cast<double>(num_rows_); }

 private:
  static double log_sum(std::span<const float> logits) {
    const auto max = static_cast<double>(*std::ranges::max_element(logits));
    double sum = 0.0;
    for (const float x : logits) sum += std::exp(static_cast<double>(x) - max);
    return max + std::log(sum);
  }

  double difference_ = 0.0;
  double norm_ = 0.0;
  double kl_ = 0.0;
  std::int64_t num_alike_ = 0;
  std::int64_t num_rows_ = 0;
};

}  // namespace in_llama
