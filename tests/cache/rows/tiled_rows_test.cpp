// SPDX-License-Identifier: MIT
#include "headwise/cache/rows/tiled_rows.hpp"

#include <gtest/gtest.h>

#include <cstddef>
#include <vector>

namespace headwise {
namespace {

TEST(TiledRowsOf, GivesEveryElementAPlaceOfItsOwnAllKBeforeAllV) {
  using Format = TiledRows<f16>;
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

TEST(TiledRowsOf, Hold16TokensOfOneKDimensionAnd16DimensionsOfV) {
  const PageShape shape{64, 128, 96};
  using Format = TiledRows<f16>;
  for (std::size_t i = 0; i < 16; ++i) {
    EXPECT_EQ(Format::k_offset(shape, 32 + i, 7), 2U * 16U * 128U + 7U * 16U + i);
    EXPECT_EQ(Format::v_offset(shape, 9, 32 + i), 64U * 128U + 2U * 64U * 16U + 9U * 16U + i);
  }
}

}  // namespace
}  // namespace headwise
