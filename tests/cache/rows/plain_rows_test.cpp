// SPDX-License-Identifier: MIT
#include "headwise/cache/rows/plain_rows.hpp"

#include <gtest/gtest.h>

#include <cstddef>
#include <vector>

namespace headwise {
namespace {

TEST(PlainRowsOf, GivesEveryElementAPlaceOfItsOwnAllKBeforeAllV) {
  using Format = PlainRows<f16>;
  for (const PageShape shape : {PageShape{16, 16, 16}, PageShape{64, 32, 32}, PageShape{48, 80, 96},
                                PageShape{16, 192, 128}}) {
    const auto k_elements = static_cast<std::size_t>(shape.page_tokens * shape.k_dim);
    std::vector<int> uses(Format::page_bytes(shape) / sizeof(f16));
    for (std::size_t row = 0; row < static_cast<std::size_t>(shape.page_tokens); ++row) {
      for (std::size_t d = 0; d < static_cast<std::size_t>(shape.k_dim); ++d) {
        ASSERT_LT(Format::k_offset(shape, row, d), k_elements);
        ++uses.at(Format::k_offset(shape, row, d));
      }
      for (std::size_t d = 0; d < static_cast<std::size_t>(shape.v_dim); ++d) {
        ASSERT_GE(Format::v_offset(shape, row, d), k_elements);
        ++uses.at(Format::v_offset(shape, row, d));
      }
    }
    EXPECT_EQ(uses, std::vector<int>(uses.size(), 1));
  }
}

TEST(PlainRowsOf, AreContiguous) {
  const PageShape shape{64, 128, 96};
  EXPECT_EQ(PlainRows<f16>::k_offset(shape, 3, 5), 3U * 128U + 5U);
  EXPECT_EQ(PlainRows<f16>::v_offset(shape, 3, 5), 64U * 128U + 3U * 96U + 5U);
}

}  // namespace
}  // namespace headwise
