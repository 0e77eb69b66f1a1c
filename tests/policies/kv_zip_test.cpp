// SPDX-License-Identifier: MIT
#include "headwise/policies/kv_zip.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "headwise/heads/select_tokens.hpp"
#include "support/errors.hpp"
#include "support/selection_goldens.hpp"

namespace headwise {
namespace {

using test::GoldenLayer;
using test::KeptLists;

/// A context of 24 tokens, 2 of them prefix, repeated by the 26 tokens behind it; two layers.
TokenScores scores_of(std::int64_t chunk) {
  TokenScores scores(24);
  for (const std::uint32_t l : {0U, 1U}) {
    const GoldenLayer layer(50, l);
    for (int h = 0; h < 2; ++h) {
      kv_zip::Maxima maxima(24);
      for (std::int64_t first = 2; first < 24; first += chunk) {
        const std::int64_t count = std::min(chunk, 24 - first);
        std::vector<float> rows(layer.keys(h).row(0), layer.keys(h).row(2));
        rows.insert(rows.end(), layer.keys(h).row(first), layer.keys(h).row(first + count));
        rows.insert(rows.end(), layer.keys(h).row(24), layer.keys(h).row(24) + 26 * 8);
        maxima.add_chunk(layer.queries(h, 24, 50), RowView::dense(rows.data(), 2 + count + 26, 8),
                         2, first, count);
      }
      maxima.add_head(layer.first(24), scores);
    }
  }
  return scores;
}

TEST(KvZip, ScoresAndCutsAllLayersAtOnceAsKvpress) {
  const TokenScores scores = scores_of(24);
  EXPECT_NEAR(scores.scores(0)[2], 0.138991, 1e-6);
  const auto golden = test::golden("kvzip_two_layers");
  if (!golden.empty()) {
    for (std::size_t head = 0; head < 4; ++head) {
      for (std::size_t j = 2; j < 24; ++j) {
        EXPECT_NEAR(scores.scores(static_cast<std::int64_t>(head))[j],
                    golden.at("scores").at(head / 2).at(head % 2).at(j).get<double>(), 2e-6);
      }
    }
  }
  const Protection prefix{2, 0};
  const KeepCounts counts = shared_counts(scores, prefix, 48);
  EXPECT_EQ(test::lists_of(select_tokens(scores, prefix, counts)),
            (KeptLists{{0, 1, 3, 6, 7, 10, 13, 14, 16, 17, 18, 19, 21},
                       {0, 1, 6, 8, 9, 10, 11, 12, 14, 15, 19, 22},
                       {0, 1, 4, 7, 8, 9, 12, 13, 16, 17, 21},
                       {0, 1, 3, 8, 11, 12, 15, 17, 18, 21, 22, 23}}));
}

TEST(KvZip, ChunksHaveMaximaOfTheirOwn) {
  const TokenScores whole = scores_of(24);
  const TokenScores cut = scores_of(9);
  for (std::size_t j = 2; j < 24; ++j) {
    EXPECT_GT(cut.scores(0)[j], whole.scores(0)[j]);  // fewer keys share the same weight
  }
}

TEST(KvZip, RefusesCountsThatDoNotAddUp) {
  const GoldenLayer layer(50);
  kv_zip::Maxima maxima(24);
  const auto add = [&](std::int64_t sinks, std::int64_t first, std::int64_t chunk) {
    maxima.add_chunk(layer.queries(0, 24, 50), layer.keys(0), sinks, first, chunk);
  };
  EXPECT_EQ(testing::message_of<ConfigError>([&] { add(2, 2, 21); }),
            "2 sinks, a chunk of 21 and 26 tokens of the pass, but 50 keys");
  EXPECT_EQ(testing::message_of<ConfigError>([&] { add(0, 2, 24); }),
            "chunk [2, 26) of a context of 24");
  TokenScores scores(25);
  EXPECT_EQ(testing::message_of<ConfigError>([&] { maxima.add_head(layer.first(24), scores); }),
            "scores of a sequence of 25 tokens, a context of 24");
}

}  // namespace
}  // namespace headwise
