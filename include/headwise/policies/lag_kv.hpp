// SPDX-License-Identifier: MIT
/// @file lag_kv.hpp
/// LagKV: tokens that stand out from those that follow them stay.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <span>
#include <tuple>
#include <vector>

#include "headwise/core/bits.hpp"
#include "headwise/core/check.hpp"
#include "headwise/core/checked.hpp"
#include "headwise/core/row_view.hpp"
#include "headwise/heads/token_scores.hpp"

/// Liang et al., LagKV: Lag-Relative Information of the KV Cache Tells Which Tokens Are Important,
/// arXiv:2504.04704. Keys and values alone. Behind the sinks, rows are cut into partitions of
/// `lag`; each partition but the last is scaled, channel by channel, to the range of the next one,
/// and a token's score is how much its channels then spread. Ranks within a partition are compared,
/// so that each keeps as many: equal ranks go to the newer partition.
namespace headwise::inline v0::lag_kv {

/// The published knobs.
struct Policy {
  std::int64_t sink = 4;   ///< first rows, which stay
  std::int64_t lag = 128;  ///< rows of a partition
  bool cross = false;      ///< compare scores across partitions instead of ranks
};

/// Softmax over a partition of each row's spread, scaled to the range of the next partition. A
/// channel without a range counts as 0 (the published code makes infinities of it).
inline std::vector<double> relative_scores(const RowView& rows, const RowView& next) {
  const auto dim = static_cast<std::size_t>(rows.dim);
  std::vector<double> low(dim), range(dim);
  for (std::size_t d = 0; d < dim; ++d) {
    float min = next.row(0)[d];
    float max = min;
    for (std::int64_t i = 1; i < next.count; ++i) {
      min = std::min(min, next.row(i)[d]);
      max = std::max(max, next.row(i)[d]);
    }
    low[d] = static_cast<double>(min);
    range[d] = static_cast<double>(max) - static_cast<double>(min);
  }
  std::vector<double> scores;
  for (std::int64_t i = 0; i < rows.count; ++i) {
    double sum = 0.0;
    double squares = 0.0;
    for (std::size_t d = 0; d < dim; ++d) {
      const double x = static_cast<double>(rows.row(i)[d]) - low[d];
      const double z = range[d] > 0.0 ? x / range[d] : 0.0;
      sum += z;
      squares += z * z;
    }
    const double n = static_cast<double>(dim);
    const double variance = dim > 1 ? (squares - sum * sum / n) / (n - 1.0) : 0.0;
    scores.push_back(std::sqrt(std::max(0.0, variance)));
  }
  const double largest = *std::max_element(scores.begin(), scores.end());
  double total = 0.0;
  for (double& score : scores) total += score = std::exp(score - largest);
  for (double& score : scores) score /= total;
  return scores;
}

/// Appends one KV head to `scores`. Sinks, the last whole partition and what is behind it score 1;
/// where there are no two partitions, later rows score higher, as in the published code.
/// @param stored  positions of the rows, ascending
/// @throws ConfigError for a lag below 1, a negative sink, or sizes that differ.
inline void add_head(const Policy& policy, const RowView& keys, const RowView& values,
                     std::span<const std::int32_t> stored, TokenScores& scores) {
  detail::checked_range(policy.lag, 1, kMaxTokens, "lag");
  detail::checked_range(policy.sink, 0, kMaxTokens, "sink");
  if (keys.count != values.count || keys.count != std::ssize(stored)) {
    fail<ConfigError>(keys.count, " keys, ", values.count, " values and ", stored.size(),
                      " positions");
  }
  const auto out = scores.add_head(stored);
  std::fill(out.begin(), out.end(), 1.0F);
  const std::int64_t behind = keys.count - policy.sink;
  if (behind < 2 * policy.lag) {
    for (std::int64_t i = std::max<std::int64_t>(0, policy.sink); i < keys.count; ++i) {
      out[static_cast<std::size_t>(i)] =
          static_cast<float>(i - policy.sink) / static_cast<float>(behind);
    }
    return;
  }
  const std::int64_t partitions = behind / policy.lag;
  for (std::int64_t p = 0; p + 1 < partitions; ++p) {
    const std::int64_t first = policy.sink + p * policy.lag;
    const std::int64_t last = first + policy.lag;
    std::vector<double> mean =
        relative_scores(keys.rows(first, last), keys.rows(last, last + policy.lag));
    const std::vector<double> of_values =
        relative_scores(values.rows(first, last), values.rows(last, last + policy.lag));
    for (std::size_t i = 0; i < mean.size(); ++i) mean[i] = 0.5 * (mean[i] + of_values[i]);
    std::vector<std::size_t> order(mean.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    const auto key = [&](std::size_t i) {  // rows of NaN and Inf go first
      return std::tuple(is_finite(mean[i]), is_finite(mean[i]) ? mean[i] : 0.0, i);
    };
    std::sort(order.begin(), order.end(),
              [&](std::size_t a, std::size_t b) { return key(a) < key(b); });
    for (std::size_t rank = 0; rank < order.size(); ++rank) {
      const std::size_t i = order[rank];
      out[static_cast<std::size_t>(first) + i] = static_cast<float>(
          policy.cross ? mean[i] : static_cast<double>(rank) / static_cast<double>(policy.lag));
    }
  }
  std::vector<float> newer(stored.size());
  std::iota(newer.begin(), newer.end(), 0.0F);
  if (!policy.cross) scores.set_tie_scores(newer);
}

}  // namespace headwise::inline v0::lag_kv
