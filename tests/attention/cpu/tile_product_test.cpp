// SPDX-License-Identifier: MIT
#include "headwise/attention/cpu/tile_product.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <random>
#include <vector>

#include "support/isa_types.hpp"

namespace headwise::test {
namespace {

template <class Isa>
class TileProductOn : public ::testing::Test {};
TYPED_TEST_SUITE(TileProductOn, AllIsas, IsaNames);

TYPED_TEST(TileProductOn, EqualsPlainLoopsForEveryNumberOfRowsAndTiles) {
  // Two panels, the second of odd width: its last step has no cache line of its own.
  constexpr int kDepth = detail::kPanel + 21;
  constexpr int kMostRows = 20;
  constexpr int kMostTiles = 9;
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  std::vector<float> a(std::size_t{2 * kMostRows * detail::kPanel}), rescale(kMostRows);
  std::vector<f16> b(std::size_t{kMostTiles} * kDepth * 16);
  for (float& x : a) x = normal(random);
  for (float& x : rescale) x = normal(random);
  for (f16& x : b) x = from_float<f16>(normal(random));

  for (int rows = 1; rows <= kMostRows; ++rows) {
    for (int tiles = 1; tiles <= kMostTiles; ++tiles) {
      for (const bool add : {false, true}) {
        const int stride = tiles * 16;
        std::vector<float> c(static_cast<std::size_t>(rows * stride), 0.5F);
        detail::TileProduct<f16> p;
        p.a = a.data();
        p.a_stride = kMostRows * detail::kPanel;
        p.b = b.data();
        p.b_stride = kDepth * 16;
        p.c = c.data();
        p.c_stride = stride;
        p.rescale = add ? rescale.data() : nullptr;
        p.num_rows = rows;
        p.num_tiles = tiles;
        p.depth = kDepth;
        detail::multiply_tiles<TypeParam, true>(p);
        for (int r = 0; r < rows; ++r) {
          for (int column = 0; column < stride; ++column) {
            double truth =
                add ? 0.5 * static_cast<double>(rescale[static_cast<std::size_t>(r)]) : 0.0;
            for (int i = 0; i < kDepth; ++i) {
              const int at = (column / 16 * kDepth + i) * 16 + column % 16;
              const int panel = i / detail::kPanel * kMostRows;
              const int from = (panel + r) * detail::kPanel + i % detail::kPanel;
              truth += static_cast<double>(a[static_cast<std::size_t>(from)]) *
                       static_cast<double>(to_float(b[static_cast<std::size_t>(at)]));
            }
            const float value = c[static_cast<std::size_t>(r * stride + column)];
            ASSERT_NEAR(static_cast<double>(value), truth, 3e-5) << rows << ' ' << tiles;
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace headwise::test
