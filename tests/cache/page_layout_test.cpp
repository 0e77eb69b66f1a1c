// SPDX-License-Identifier: MIT
#include "headwise/cache/page_layout.hpp"

#include <gtest/gtest.h>

#include <cstddef>
#include <string>
#include <type_traits>
#include <vector>

namespace headwise {
namespace {

template <class Layout>
class PageLayouts : public ::testing::Test {};
using Layouts = ::testing::Types<PlainLayout, TiledLayout>;
struct LayoutNames {
  template <class L>
  static std::string GetName(int) {
    return std::is_same_v<L, PlainLayout> ? "plain" : "tiled";
  }
};
TYPED_TEST_SUITE(PageLayouts, Layouts, LayoutNames);

TYPED_TEST(PageLayouts, GivesEveryElementAPlaceOfItsOwn) {
  for (const PageShape shape : {PageShape{16, 16, 16}, PageShape{64, 32, 32}, PageShape{48, 80, 96},
                                PageShape{16, 192, 128}}) {
    std::vector<int> uses(shape.num_elements());
    for (std::size_t row = 0; row < static_cast<std::size_t>(shape.page_tokens); ++row) {
      for (std::size_t d = 0; d < static_cast<std::size_t>(shape.k_dim); ++d) {
        ++uses.at(TypeParam::k_offset(shape, row, d));
      }
      for (std::size_t d = 0; d < static_cast<std::size_t>(shape.v_dim); ++d) {
        ++uses.at(TypeParam::v_offset(shape, row, d));
      }
    }
    EXPECT_EQ(uses, std::vector<int>(shape.num_elements(), 1));
  }
}

TYPED_TEST(PageLayouts, PutsAllKBeforeAllV) {
  const PageShape shape{32, 48, 64};
  for (std::size_t row = 0; row < 32; ++row) {
    for (std::size_t d = 0; d < 48; ++d) EXPECT_LT(TypeParam::k_offset(shape, row, d), 32U * 48U);
    for (std::size_t d = 0; d < 64; ++d) EXPECT_GE(TypeParam::v_offset(shape, row, d), 32U * 48U);
  }
}

TEST(PageLayout, PlainRowsAreContiguous) {
  const PageShape shape{64, 128, 96};
  EXPECT_EQ(PlainLayout::k_offset(shape, 3, 5), 3U * 128U + 5U);
  EXPECT_EQ(PlainLayout::v_offset(shape, 3, 5), 64U * 128U + 3U * 96U + 5U);
}

TEST(PageLayout, TilesHold16TokensOfOneKDimensionAnd16DimensionsOfV) {
  const PageShape shape{64, 128, 96};
  for (std::size_t i = 0; i < 16; ++i) {
    EXPECT_EQ(TiledLayout::k_offset(shape, 32 + i, 7), 2U * 16U * 128U + 7U * 16U + i);
    EXPECT_EQ(TiledLayout::v_offset(shape, 9, 32 + i), 64U * 128U + 2U * 64U * 16U + 9U * 16U + i);
  }
}

TEST(PageLayout, IsOneOfTwo) {
  static_assert(PageLayout<PlainLayout> && PageLayout<TiledLayout> && !PageLayout<int>);
}

}  // namespace
}  // namespace headwise
