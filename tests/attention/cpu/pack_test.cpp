// SPDX-License-Identifier: MIT
#include "headwise/attention/cpu/pack.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
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

/// Every row of a block, read back through the tile format, is the row of the dense history.
template <class Element>
void expect_rows(const detail::TileBlock<Element>& block, const AttentionCase& c,
                 const DenseRows& dense) {
  for (int row = block.first; row < block.last; ++row) {
    const std::int64_t pos = block.row0.value + row;
    for (int d = 0; d < c.k_dim; ++d) {
      const int at = row / 16 * 16 * c.k_dim + d * 16 + row % 16;
      ASSERT_TRUE(
          same(to_float(block.k[at]), dense.k[static_cast<std::size_t>(pos * c.k_dim + d)]));
    }
    for (int d = 0; d < c.v_dim; ++d) {
      const std::ptrdiff_t at = d / 16 * block.v_stride + row * 16 + d % 16;
      ASSERT_TRUE(
          same(to_float(block.v[at]), dense.v[static_cast<std::size_t>(pos * c.v_dim + d)]));
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
