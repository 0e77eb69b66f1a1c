// SPDX-License-Identifier: MIT
#include "headwise/attention/stored_rows.hpp"

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "headwise/attention/query_window.hpp"
#include "headwise/heads/select_tokens.hpp"
#include "support/attended_cache.hpp"
#include "support/isa_types.hpp"

namespace headwise {
namespace {

using test::AttendedCache;
using test::Side;

template <class Format>
class StoredRowsOf : public ::testing::Test {};
TYPED_TEST_SUITE(StoredRowsOf, test::AllFormats, test::FormatNames);

TYPED_TEST(StoredRowsOf, AreWhatASelectionLeftAsTheFormatRoundsIt) {
  const ModelShape shape({{2, 1, 32, 48}});
  HeadPlan plan(shape);
  plan.set(0, 1, KeepSelected{});
  AttendedCache<TypeParam> model(shape, plan, {.page_tokens = 16, .max_context = 200});
  const SequenceId id = model.add();
  StoredRows rows;
  rows.read(model.cache.stored(id, 0, 1));
  EXPECT_EQ(rows.keys().count, 0);
  model.add_tokens(id, test::new_tokens(70), Phase::kPrompt);
  ASSERT_EQ(model.compact(id, model.selection(id, [](int, auto pos) { return pos % 7 < 2; })),
            StepStatus::kOk);
  model.add_tokens(id, test::new_tokens(9), Phase::kDecode);
  for (const int head : {0, 1}) {
    rows.read(model.cache.stored(id, 0, head));
    std::vector<std::int32_t> positions = model.cache.stored_positions(id, 0, head);
    EXPECT_EQ(positions.empty(), head == 0);  // noted for selected heads alone
    for (std::int32_t pos = 0; head == 0 && pos < 79; ++pos) positions.push_back(pos);
    ASSERT_EQ(rows.keys().count, std::ssize(positions));
    ASSERT_EQ(rows.values().count, std::ssize(positions));
    for (std::size_t i = 0; i < positions.size(); ++i) {
      const auto token = model.sequences.at(id).tokens[static_cast<std::size_t>(positions[i])];
      for (const Side side : {Side::kK, Side::kV}) {
        const RowView view = side == Side::kK ? rows.keys() : rows.values();
        const std::vector<float> expected =
            test::stored_row<TypeParam>(token, positions[i], 0, head, side, view.dim);
        const float* row = view.row(static_cast<std::int64_t>(i));
        ASSERT_EQ(std::vector<float>(row, row + view.dim), expected);
      }
    }
  }
}

}  // namespace
}  // namespace headwise
