// SPDX-License-Identifier: MIT
#include "headwise/cache/rows/format.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <numeric>
#include <random>
#include <type_traits>
#include <utility>
#include <vector>

#include "headwise/cache/rows/plain_rows.hpp"
#include "headwise/cache/rows/tiled_rows.hpp"
#include "headwise/core/dtype.hpp"
#include "support/isa_types.hpp"

namespace headwise {
namespace {

constexpr PageShape kRowShapes[] = {{16, 16, 16}, {64, 32, 32}, {32, 80, 96}, {48, 256, 48}};

template <class Types>
class RowFormats : public ::testing::Test {
 protected:
  std::mt19937 random{11};
  std::vector<float> floats(int count) {
    std::vector<float> x(static_cast<std::size_t>(count));
    for (float& value : x) value = std::uniform_real_distribution<float>(-2.0F, 2.0F)(random);
    return x;
  }
};
TYPED_TEST_SUITE(RowFormats, test::AllKernels, test::KernelNames);

TEST(FormatOf, AnElementIsItsTiledRowsAndAFormatItself) {
  static_assert(std::is_same_v<FormatOf<f16>, TiledRows<f16>>);
  static_assert(std::is_same_v<FormatOf<PlainRows<bf16>>, PlainRows<bf16>>);
  static_assert(RowFormat<Int8Rows> && RowFormat<PlainRows<f32>> && !RowFormat<f16>);
}

TYPED_TEST(RowFormats, ReadsBackWhatRoundRowSays) {
  using Format = typename TypeParam::Format;
  for (const PageShape& shape : kRowShapes) {
    std::vector<std::byte> page(Format::page_bytes(shape), std::byte{0xFF});
    const std::vector<float> k = this->floats(shape.k_dim);
    const std::vector<float> v = this->floats(shape.v_dim);
    Format::template encode<typename TypeParam::Isa>(page.data(), shape, 13, k.data(), v.data());
    std::vector<float> rounded_k(k.size()), rounded_v(v.size()), read_k(k.size()), read_v(v.size());
    Format::round_row(shape, k.data(), v.data(), rounded_k.data(), rounded_v.data());
    const auto memory = Format::Memory::over_pages(page.data(), page.size(), shape);
    Format::read_row(memory.page(0), shape, 13, read_k.data(), read_v.data());
    EXPECT_EQ(read_k, rounded_k);
    EXPECT_EQ(read_v, rounded_v);
  }
}

TYPED_TEST(RowFormats, StoresATileAsItsRowsOneByOne) {
  using Format = typename TypeParam::Format;
  using Isa = typename TypeParam::Isa;
  if constexpr (EncodesTiles<Format>) {
    const float infinity = std::numeric_limits<float>::infinity();
    for (const PageShape& shape : kRowShapes) {
      const int k_stride = shape.k_dim + 3;
      const int v_stride = shape.v_dim + 5;
      // What is too large, or was never finite, in a row and at an element of its own each.
      for (const float odd : {1.0F, 70000.0F, 3.4e38F, -infinity, std::nanf("")}) {
        std::vector<float> k = this->floats(16 * k_stride);
        std::vector<float> v = this->floats(16 * v_stride);
        k[static_cast<std::size_t>(5 * k_stride + shape.k_dim - 1)] = odd;
        k[static_cast<std::size_t>(15 * k_stride)] = -odd;
        v[static_cast<std::size_t>(11 * v_stride + shape.v_dim - 1)] = odd;
        std::vector<std::byte> page(Format::page_bytes(shape), std::byte{0x5A});
        std::vector<std::byte> expected = page;
        const std::size_t first = static_cast<std::size_t>(shape.page_tokens) - 16;
        std::int64_t overflows = 0;
        for (int i = 0; i < 16; ++i) {
          overflows += Format::template encode<Isa>(
              expected.data(), shape, first + static_cast<std::size_t>(i), k.data() + i * k_stride,
              v.data() + i * v_stride);
        }
        EXPECT_EQ(Format::template encode_tile<Isa>(page.data(), shape, first, k.data(), k_stride,
                                                    v.data(), v_stride),
                  overflows)
            << odd;
        EXPECT_EQ(page, expected) << odd;
      }
    }
  }
}

TYPED_TEST(RowFormats, CopiesRowsBitForBitAndNoOthers) {
  using Format = typename TypeParam::Format;
  using Rows = std::vector<std::int32_t>;
  for (const PageShape& shape : kRowShapes) {
    const std::size_t bytes = Format::page_bytes(shape);
    std::vector<std::byte> page(bytes);
    std::vector<std::vector<float>> k, v;
    const auto encode = [&](std::vector<std::byte>& to, std::size_t to_row, std::int32_t row) {
      const auto r = static_cast<std::size_t>(row);
      Format::template encode<typename TypeParam::Isa>(to.data(), shape, to_row, k[r].data(),
                                                       v[r].data());
    };
    for (std::int32_t row = 0; row < shape.page_tokens; ++row) {
      k.push_back(this->floats(shape.k_dim));
      v.push_back(this->floats(shape.v_dim));
      encode(page, static_cast<std::size_t>(row), row);
    }
    Rows all(static_cast<std::size_t>(shape.page_tokens));
    std::iota(all.begin(), all.end(), 0);
    const std::int32_t last = shape.page_tokens - 1;
    for (const auto& [rows, to_row] :
         {std::pair{Rows{3}, 14}, std::pair{Rows{15}, 0}, std::pair{Rows{0, 1, 5, 15}, 7},
          std::pair{Rows{2, last}, 9}, std::pair{Rows{}, 3}, std::pair{all, 0}}) {
      std::vector<std::byte> other(bytes, std::byte{0x5A});
      std::vector<std::byte> expected = other;
      Format::copy_rows(page.data(), rows, other.data(), static_cast<std::size_t>(to_row), shape);
      for (std::size_t i = 0; i < rows.size(); ++i) {
        encode(expected, static_cast<std::size_t>(to_row) + i, rows[i]);
      }
      EXPECT_EQ(other, expected);
    }
    // Up within a page, over others of them, and to themselves.
    for (const Rows& rows : {Rows{0, 1, 2, 3}, Rows{0, 4, 9, 12, 13}, Rows{1, last}, all}) {
      const std::size_t to_row = static_cast<std::size_t>(shape.page_tokens) - rows.size();
      std::vector<std::byte> same = page;
      std::vector<std::byte> expected = page;
      Format::copy_rows(same.data(), rows, same.data(), to_row, shape);
      for (std::size_t i = 0; i < rows.size(); ++i) encode(expected, to_row + i, rows[i]);
      EXPECT_EQ(same, expected);
    }
  }
}

TYPED_TEST(RowFormats, AddsExactlyTheRowsAskedFor) {
  using Format = typename TypeParam::Format;
  for (const PageShape& shape : kRowShapes) {
    const auto tokens = static_cast<std::size_t>(shape.page_tokens);
    for (const auto& [first, last] : std::initializer_list<std::pair<std::size_t, std::size_t>>{
             {0, tokens}, {0, 1}, {4, 7}, {4, tokens}, {15, 16}, {7, tokens - 1}, {3, 3}}) {
      // Rows outside stay NaN: one of them in a sum would show.
      std::vector<std::byte> page(Format::page_bytes(shape), std::byte{0xFF});
      const std::vector<float> k_before = this->floats(shape.k_dim);
      const std::vector<float> v_before = this->floats(shape.v_dim);
      std::vector<double> k_sum(k_before.begin(), k_before.end());
      std::vector<double> v_sum(v_before.begin(), v_before.end());
      std::vector<double> k_truth = k_sum;
      std::vector<double> v_truth = v_sum;
      for (std::size_t row = first; row < last; ++row) {
        const std::vector<float> k = this->floats(shape.k_dim);
        const std::vector<float> v = this->floats(shape.v_dim);
        Format::template encode<typename TypeParam::Isa>(page.data(), shape, row, k.data(),
                                                         v.data());
        std::vector<float> stored_k(k.size()), stored_v(v.size());
        Format::round_row(shape, k.data(), v.data(), stored_k.data(), stored_v.data());
        for (std::size_t d = 0; d < k.size(); ++d) k_truth[d] += static_cast<double>(stored_k[d]);
        for (std::size_t d = 0; d < v.size(); ++d) v_truth[d] += static_cast<double>(stored_v[d]);
      }
      Format::template add_rows<typename TypeParam::Isa>(page.data(), shape, first, last,
                                                         k_sum.data(), v_sum.data());
      const double bound = 1e-13;
      for (std::size_t d = 0; d < k_sum.size(); ++d) {
        ASSERT_NEAR(k_sum[d], k_truth[d], bound) << first << " to " << last;
      }
      for (std::size_t d = 0; d < v_sum.size(); ++d) {
        ASSERT_NEAR(v_sum[d], v_truth[d], bound) << first << " to " << last;
      }
    }
  }
}

TYPED_TEST(RowFormats, HasPagesOfWholeCacheLinesThatHoldAllRows) {
  using Format = typename TypeParam::Format;
  for (const PageShape& shape : kRowShapes) {
    const std::size_t bytes = Format::page_bytes(shape);
    EXPECT_EQ(bytes % 64, 0U);
    // Rows that are written last change no row that was written before.
    std::vector<std::byte> page(bytes, std::byte{0xFF});
    std::vector<std::vector<float>> rows;
    const auto memory = Format::Memory::over_pages(page.data(), bytes, shape);
    for (int row = 0; row < shape.page_tokens; ++row) {
      rows.push_back(this->floats(std::max(shape.k_dim, shape.v_dim)));
      Format::template encode<typename TypeParam::Isa>(page.data(), shape,
                                                       static_cast<std::size_t>(row),
                                                       rows.back().data(), rows.back().data());
    }
    for (int row = 0; row < shape.page_tokens; ++row) {
      const std::vector<float>& x = rows[static_cast<std::size_t>(row)];
      std::vector<float> k(static_cast<std::size_t>(shape.k_dim)), rounded_k = k;
      std::vector<float> v(static_cast<std::size_t>(shape.v_dim)), rounded_v = v;
      Format::read_row(memory.page(0), shape, static_cast<std::size_t>(row), k.data(), v.data());
      Format::round_row(shape, x.data(), x.data(), rounded_k.data(), rounded_v.data());
      EXPECT_EQ(k, rounded_k);
      EXPECT_EQ(v, rounded_v);
    }
  }
}

}  // namespace
}  // namespace headwise
