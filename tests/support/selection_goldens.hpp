// SPDX-License-Identifier: MIT
/// @file selection_goldens.hpp
/// Inputs for scorers from a formula, and what the published codes made of them.
#pragma once

#include <gtest/gtest.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <numeric>
#include <span>
#include <string>
#include <vector>

#include "headwise/attention/observed_queries.hpp"
#include "headwise/core/row_view.hpp"
#include "headwise/heads/kept_positions.hpp"
#include "headwise/heads/token_scores.hpp"
#include "nlohmann/json.hpp"

namespace headwise::test {

/// A value of the inputs: a multiple of 1/64 in [-2, 2), exact in f16.
constexpr float golden_value(std::uint32_t salt, std::uint32_t a, std::uint32_t t,
                             std::uint32_t j) {
  std::uint32_t x = (a * 73856093U) ^ (t * 19349663U) ^ (j * 83492791U) ^ (salt * 2654435761U);
  x ^= x >> 16;
  x *= 0x45D9F3BU;
  x ^= x >> 16;
  x *= 0x45D9F3BU;
  x ^= x >> 16;
  return static_cast<float>(static_cast<int>(x & 255U) - 128) / 64.0F;
}

/// Q, K and V of one layer: 4 query heads, 2 KV heads, width 8.
struct GoldenLayer {
  static constexpr int kQueryHeads = 4;
  static constexpr int kHeads = 2;
  static constexpr int kGroup = 2;
  static constexpr int kDim = 8;

  explicit GoldenLayer(std::int64_t tokens = 32, std::uint32_t layer = 0) : n(tokens) {
    for (const auto& [to, salt, heads] : {std::tuple{&q, 1U, kQueryHeads},
                                          std::tuple{&k, 2U, kHeads}, std::tuple{&v, 3U, kHeads}}) {
      for (int h = 0; h < heads; ++h) {
        for (std::int64_t t = 0; t < n; ++t) {
          for (int j = 0; j < kDim; ++j) {
            to->push_back(golden_value(salt + 100 * layer, static_cast<std::uint32_t>(h),
                                       static_cast<std::uint32_t>(t),
                                       static_cast<std::uint32_t>(j)));
          }
        }
      }
    }
    positions.resize(static_cast<std::size_t>(n));
    std::iota(positions.begin(), positions.end(), 0);
  }

  RowView keys(int head) const { return rows_of(k, head); }
  RowView values(int head) const { return rows_of(v, head); }
  RowView query_rows(int query_head) const { return rows_of(q, query_head); }
  /// Queries [first, last) of one KV head's group.
  ObservedQueries queries(int head, std::int64_t first, std::int64_t last) const {
    const float* data =
        q.data() + static_cast<std::size_t>(head * kGroup) * head_floats() + first * kDim;
    return {{data, kDim, static_cast<std::int64_t>(head_floats())},
            std::span(positions).subspan(static_cast<std::size_t>(first),
                                         static_cast<std::size_t>(last - first)),
            kGroup,
            kDim,
            0.35355339F};
  }
  /// Positions [0, count).
  std::span<const std::int32_t> first(std::int64_t count) const {
    return std::span(positions).first(static_cast<std::size_t>(count));
  }

  std::int64_t n;
  std::vector<float> q, k, v;  ///< [heads][n][kDim]
  std::vector<std::int32_t> positions;

 private:
  std::size_t head_floats() const { return static_cast<std::size_t>(n) * kDim; }
  RowView rows_of(const std::vector<float>& rows, int head) const {
    return RowView::dense(rows.data() + static_cast<std::size_t>(head) * head_floats(), n, kDim);
  }
};

using KeptLists = std::vector<std::vector<std::int32_t>>;

inline KeptLists lists_of(const KeptPositions& kept) {
  KeptLists lists;
  for (std::int64_t h = 0; h < kept.num_heads(); ++h) {
    lists.emplace_back(kept.of_head(h).begin(), kept.of_head(h).end());
  }
  return lists;
}

/// All scores of the published codes, where the file lies; an empty object elsewhere.
inline nlohmann::json golden(const std::string& key) {
  const std::string path = HEADWISE_SHARED_DIR "/specs/goldens/selection.json";
  if (!std::filesystem::exists(path)) return nlohmann::json::object();
  std::ifstream file(path);
  return nlohmann::json::parse(file).at(key);
}

/// Compares scores with golden ones to their 6 digits, those of protected tokens left out: there
/// the codes put sentinels.
inline void expect_scores(const std::string& key, const TokenScores& scores,
                          const Protection& protection = {}, double bound = 2e-6) {
  const nlohmann::json expected = golden(key);
  if (expected.empty()) return;
  for (std::int64_t h = 0; h < scores.num_heads(); ++h) {
    const auto& row = expected.at("scores").at(static_cast<std::size_t>(h));
    for (std::size_t j = 0; j < row.size(); ++j) {
      if (protection.covers(scores.positions(h)[j], scores.length())) continue;
      EXPECT_NEAR(scores.scores(h)[j], row[j].get<double>(), bound)
          << key << ", head " << h << ", token " << j;
    }
  }
}

}  // namespace headwise::test
