// SPDX-License-Identifier: MIT
#include "headwise/attention/query_window.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <random>
#include <vector>

#include "support/errors.hpp"

namespace headwise {
namespace {

const ModelShape& shape() {
  static const ModelShape two({{2, 2, 16, 16}, {1, 3, 32, 16}});
  return two;
}

/// A query's elements say whose they are.
float value(int layer, int head, std::int64_t pos) {
  return static_cast<float>(layer * 100000 + head * 10000 + pos);
}

void note(QueryWindow& window, std::int64_t first, std::int64_t count) {
  for (int l = 0; l < shape().num_layers(); ++l) {
    const LayerShape& layer = shape().layer(l);
    std::vector<float> q;
    for (std::int64_t i = 0; i < count; ++i) {
      for (int h = 0; h < layer.num_qo_heads(); ++h) {
        q.insert(q.end(), static_cast<std::size_t>(layer.k_dim), value(l, h, first + i));
      }
    }
    window.note(l, TensorView<const float>::nhd(q.data(), layer.num_qo_heads(), layer.k_dim), first,
                count);
  }
}

void expect_last(const QueryWindow& window, std::vector<std::int32_t> positions) {
  for (int l = 0; l < shape().num_layers(); ++l) {
    const LayerShape& layer = shape().layer(l);
    for (int h = 0; h < layer.num_kv_heads; ++h) {
      const ObservedQueries queries = window.of_head(l, h);
      std::vector<std::int32_t> sorted(queries.positions.begin(), queries.positions.end());
      std::ranges::sort(sorted);
      ASSERT_EQ(sorted, positions);
      ASSERT_EQ(queries.group_size, layer.group_size);
      ASSERT_EQ(queries.dim, layer.k_dim);
      ASSERT_EQ(queries.scale, layer.scale());
      for (int g = 0; g < layer.group_size; ++g) {
        const RowView rows = queries.of(g);
        for (std::int64_t i = 0; i < rows.count; ++i) {
          const float expected =
              value(l, h * layer.group_size + g, queries.positions[static_cast<std::size_t>(i)]);
          ASSERT_EQ(rows.row(i)[0], expected);
          ASSERT_EQ(rows.row(i)[layer.k_dim - 1], expected);
        }
      }
    }
  }
}

TEST(QueryWindow, HasTheLastQueriesHoweverAPromptIsCut) {
  QueryWindow whole(shape(), 4);
  note(whole, 0, 11);
  expect_last(whole, {7, 8, 9, 10});
  QueryWindow cut(shape(), 4);
  for (const auto& [first, count] : std::map<std::int64_t, std::int64_t>{{0, 1}, {1, 6}, {7, 4}}) {
    note(cut, first, count);
  }
  expect_last(cut, {7, 8, 9, 10});
  note(cut, 11, 1);
  note(cut, 12, 2);
  expect_last(cut, {10, 11, 12, 13});
}

TEST(QueryWindow, IsShorterWhereTheSequenceIs) {
  QueryWindow window(shape(), 4);
  expect_last(window, {});
  note(window, 0, 3);
  expect_last(window, {0, 1, 2});
}

TEST(QueryWindow, ForgetsWhatARollbackTookBack) {
  QueryWindow window(shape(), 4);
  note(window, 0, 9);
  window.forget(7);
  expect_last(window, {5, 6});
  note(window, 7, 1);
  expect_last(window, {5, 6, 7});
  note(window, 8, 3);
  expect_last(window, {7, 8, 9, 10});
  note(window, 11, 1);
  expect_last(window, {8, 9, 10, 11});
  window.forget(0);
  expect_last(window, {});
}

TEST(QueryWindow, SaysItsBytesAndRefusesWindowsOfNothing) {
  // 4 query heads of 16, 3 of 32, and a position in each layer.
  EXPECT_EQ(QueryWindow::bytes(shape(), 32), 32U * (4 * 16 + 3 * 32 + 2) * 4);
  EXPECT_THROW(QueryWindow(shape(), 0), ConfigError);
  EXPECT_THROW((void)QueryWindow::bytes(shape(), 0), ConfigError);
}

}  // namespace
}  // namespace headwise
