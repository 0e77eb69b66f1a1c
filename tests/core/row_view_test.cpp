// SPDX-License-Identifier: MIT
#include "headwise/core/row_view.hpp"

#include <gtest/gtest.h>

#include <numeric>
#include <vector>

namespace headwise {
namespace {

TEST(RowView, NamesRowsAtAnyStride) {
  std::vector<float> data(20);
  std::iota(data.begin(), data.end(), 0.0F);
  const RowView rows{data.data() + 1, 5, 3, 2};
  EXPECT_EQ(rows.row(0)[0], 1.0F);
  EXPECT_EQ(rows.row(2)[1], 12.0F);
  const RowView last = rows.rows(1, 3);
  EXPECT_EQ(last.count, 2);
  EXPECT_EQ(last.row(0), rows.row(1));
  EXPECT_EQ(RowView::dense(data.data(), 5, 4).row(3)[1], 13.0F);
}

}  // namespace
}  // namespace headwise
