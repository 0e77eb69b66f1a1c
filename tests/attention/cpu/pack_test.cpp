// SPDX-License-Identifier: MIT
#include "headwise/attention/cpu/pack.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "support/attention_cases.hpp"
#include "support/isa_types.hpp"

namespace headwise::test {
namespace {

template <class Types>
class Pack : public ::testing::Test {};
TYPED_TEST_SUITE(Pack, AllKernels, KernelNames);

/// Rows that no query sees may be NaN.
bool same(float a, float b) { return a == b || (std::isnan(a) && std::isnan(b)); }

/// One value of K, or V, with its scale.
template <class Element>
float value_of(const detail::Tiles<Element>& tiles, std::ptrdiff_t line, int lane, int half,
               int group, int row) {
  const Element* at = tiles.data + line * 16 + lane;
  if constexpr (!detail::kIsScaled<Element>) {
    return to_float(*at);
  } else {
    float values[2] = {};
    if constexpr (std::is_same_v<Element, std::int8_t>) {
      values[0] = static_cast<float>(*at);
    } else {
      simd::Ops<simd::Scalar>::load_int4(&at->bits, values[0], values[1]);
    }
    return values[half] * to_float(tiles.scales[group * tiles.scale_stride + row]);
  }
}

/// Every row of a block, read back through the tile format, is the row of the dense history.
template <class K, class V>
void expect_rows(const detail::TileBlock<K, V>& block, const AttentionCase& c,
                 const DenseRows& dense) {
  constexpr int k_steps = detail::TileElement<K>::kSteps;
  constexpr int v_tiles = detail::TileElement<V>::kTiles;
  const auto group = [](int d, int width) { return width == 0 ? 0 : d / width; };
  for (int row = block.first; row < block.last; ++row) {
    const std::int64_t pos = block.row0.value + row;
    for (int d = 0; d < c.k_dim; ++d) {
      ASSERT_TRUE(same(value_of(block.k, row / 16 * block.k.stride / 16 + d / k_steps, row % 16,
                                d % k_steps, group(d, detail::TileElement<K>::kGroup), row),
                       dense.k[static_cast<std::size_t>(pos * c.k_dim + d)]));
    }
    for (int d = 0; d < c.v_dim; ++d) {
      ASSERT_TRUE(same(value_of(block.v, d / (16 * v_tiles) * block.v.stride / 16 + row, d % 16,
                                d / 16 % v_tiles, group(d, detail::TileElement<V>::kGroup), row),
                       dense.v[static_cast<std::size_t>(pos * c.v_dim + d)]));
    }
  }
}

TYPED_TEST(Pack, GivesEveryStoredRowOnce) {
  using Format = typename TypeParam::Format;
  for (const AttentionCase& c : attention_cases()) {
    PagedHead<Format> head(c);
    const auto problem = head.problem();
    const DenseRows dense = head.dense_rows();
    AlignedFloats packed(detail::packed_block_floats(c.k_dim, c.v_dim));
    for (const KvRun& run : problem.past.runs()) {
      std::int64_t rows_seen = 0;
      detail::for_each_block(
          problem.past, run.first_slot, run.first_pos, run.count,
          [&](const detail::StoredRows& rows) {
            ASSERT_EQ(rows.pos, run.first_pos + rows_seen);
            ASSERT_EQ(rows.more, rows_seen + rows.count < run.count);
            rows_seen += rows.count;
            const auto block =
                detail::pack_block<typename TypeParam::Isa>(problem.past, rows, packed.data());
            ASSERT_EQ(block.last - block.first, rows.count);
            ASSERT_EQ(block.row0 + block.first, rows.pos);
            expect_rows(block, c, dense);
            if constexpr (TiledInPlace<Format>) {
              expect_rows(detail::block_in_place<typename TypeParam::Isa>(problem.past, rows), c,
                          dense);
            }
          });
      ASSERT_EQ(rows_seen, run.count);
    }
  }
}

TYPED_TEST(Pack, RoundsOwnRowsToTheRowFormat) {
  const AttentionCase c{.name = "", .k_dim = 48, .v_dim = 32, .past = 5, .queries = 70};
  PagedHead<typename TypeParam::Format> head(c);
  AlignedFloats packed(detail::packed_block_floats(c.k_dim, c.v_dim));
  for (const auto& [begin, count] : {std::pair{0, 64}, {64, 6}, {3, 17}, {69, 1}}) {
    const auto problem = head.problem();
    const auto block =
        detail::pack_own_block<typename TypeParam::Isa>(problem, begin, count, packed.data());
    ASSERT_EQ(block.row0, Pos{5 + begin});
    ASSERT_EQ(block.last, count);
    expect_rows(block, c, head.dense_rows());
  }
}

}  // namespace
}  // namespace headwise::test
