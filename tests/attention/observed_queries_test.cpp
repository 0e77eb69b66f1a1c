// SPDX-License-Identifier: MIT
#include "headwise/attention/observed_queries.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "support/errors.hpp"
#include "support/selection_goldens.hpp"

namespace headwise {
namespace {

TEST(ObservedQueries, SeeStoredKeysUpToTheirPosition) {
  const test::GoldenLayer layer;
  // Keys 0, 5, 9, 20 are stored; the queries are those of tokens 9 and 4, in this order.
  const std::vector<std::int32_t> stored{0, 5, 9, 20};
  std::vector<float> rows;
  for (const std::int32_t pos : stored) {
    rows.insert(rows.end(), layer.keys(0).row(pos), layer.keys(0).row(pos) + 8);
  }
  const std::vector<std::int32_t> positions{9, 4};
  std::vector<float> q;
  for (const std::int32_t pos : positions) {
    q.insert(q.end(), layer.query_rows(0).row(pos), layer.query_rows(0).row(pos) + 8);
  }
  const ObservedQueries queries{{q.data(), 8, 16}, positions, 1, 8, 0.35355339F};
  std::vector<float> received(4, 0.0F);
  received_attention(queries, 0, RowView::dense(rows.data(), 4, 8), stored, Received::kSum,
                     received);
  EXPECT_NEAR(received[0] + received[1] + received[2], 2.0F, 1e-6);
  EXPECT_EQ(received[3], 0.0F);
  EXPECT_GT(received[0], 1.0F);  // all that token 4 sees
  EXPECT_THROW(received_attention(queries, 0, RowView::dense(rows.data(), 3, 8), stored,
                                  Received::kSum, received),
               ConfigError);
}

}  // namespace
}  // namespace headwise
