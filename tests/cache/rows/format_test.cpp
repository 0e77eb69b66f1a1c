// SPDX-License-Identifier: MIT
#include "headwise/cache/rows/format.hpp"

#include <gtest/gtest.h>

#include <cstddef>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <random>
#include <utility>
#include <vector>

#include "headwise/cache/rows/plain_rows.hpp"
#include "headwise/cache/rows/tiled_rows.hpp"
#include "headwise/core/dtype.hpp"
#include "support/isa_types.hpp"

namespace headwise {
namespace {

constexpr PageShape kShapes[] = {{16, 16, 16}, {64, 32, 32}, {32, 80, 96}, {48, 256, 48}};

template <class Types>
class RowFormats : public ::testing::Test {
 protected:
  using RowT = typename Types::Format::Element;

  std::mt19937 random{11};
  std::vector<float> floats(int count) {
    std::vector<float> x(static_cast<std::size_t>(count));
    for (float& value : x) value = std::uniform_real_distribution<float>(-2.0F, 2.0F)(random);
    return x;
  }

  /// A page of NaN, as the pool hands it out in hardened builds.
  static std::vector<RowT> poisoned(const PageShape& shape) {
    std::vector<RowT> page(Types::Format::page_bytes(shape) / sizeof(RowT));
    std::memset(static_cast<void*>(page.data()), 0xFF, page.size() * sizeof(RowT));
    return page;
  }

  static std::byte* bytes(std::vector<RowT>& page) {
    return reinterpret_cast<std::byte*>(page.data());
  }
  static bool same_bits(RowT a, RowT b) { return std::memcmp(&a, &b, sizeof(RowT)) == 0; }
};

TYPED_TEST_SUITE(RowFormats, test::AllKernels, test::KernelNames);

TYPED_TEST(RowFormats, WritesEveryElementWhereTheLayoutSaysAndNothingElse) {
  using Row = typename TypeParam::Format::Element;
  using Format = typename TypeParam::Format;
  for (const PageShape& shape : kShapes) {
    for (const int row : {0, 1, 15, shape.page_tokens - 1}) {
      const auto r = static_cast<std::size_t>(row);
      const std::vector<float> k = this->floats(shape.k_dim);
      const std::vector<float> v = this->floats(shape.v_dim);
      std::vector<Row> expected = this->poisoned(shape);
      std::vector<Row> page = expected;
      for (std::size_t d = 0; d < k.size(); ++d) {
        expected[Format::k_offset(shape, r, d)] = from_float<Row>(k[d]);
      }
      for (std::size_t d = 0; d < v.size(); ++d) {
        expected[Format::v_offset(shape, r, d)] = from_float<Row>(v[d]);
      }
      Format::template encode<typename TypeParam::Isa>(this->bytes(page), shape, r, k.data(),
                                                       v.data());
      EXPECT_EQ(std::memcmp(page.data(), expected.data(), page.size() * sizeof(Row)), 0)
          << shape.k_dim << " x " << shape.page_tokens << ", row " << row;
    }
  }
}

TYPED_TEST(RowFormats, RoundsLikeTheDefinition) {
  using Row = typename TypeParam::Format::Element;
  using Format = typename TypeParam::Format;
  const PageShape shape{16, 16, 16};
  // Ties, subnormals, overflow, infinity and both zeros, in every format.
  const float infinity = std::numeric_limits<float>::infinity();
  const float k[16] = {0.0F,           -0.0F,     1.0F + 0x1p-11F, 1.0F + 0x1.8p-10F,
                       1.0F + 0x1p-8F, 1e-7F,     -5.96e-8F,       0x1p-25F,
                       65504.0F,       65520.0F,  -70000.F,        3.0e38F,
                       infinity,       -infinity, 0x1.FF8p-15F,    1e-30F};
  std::vector<Row> page = this->poisoned(shape);
  Format::template encode<typename TypeParam::Isa>(this->bytes(page), shape, 5, k, k);
  for (std::size_t d = 0; d < 16; ++d) {
    EXPECT_TRUE(this->same_bits(page[Format::k_offset(shape, 5, d)], from_float<Row>(k[d])))
        << k[d];
    EXPECT_TRUE(this->same_bits(page[Format::v_offset(shape, 5, d)], from_float<Row>(k[d])))
        << k[d];
  }
}

TYPED_TEST(RowFormats, ReadsBackWhatRoundRowSays) {
  using Format = typename TypeParam::Format;
  for (const PageShape& shape : kShapes) {
    std::vector<std::byte> page(Format::page_bytes(shape), std::byte{0xFF});
    const std::vector<float> k = this->floats(shape.k_dim);
    const std::vector<float> v = this->floats(shape.v_dim);
    Format::template encode<typename TypeParam::Isa>(page.data(), shape, 13, k.data(), v.data());
    std::vector<float> rounded_k(k.size()), rounded_v(v.size()), read_k(k.size()), read_v(v.size());
    Format::round_row(k.data(), shape.k_dim, rounded_k.data());
    Format::round_row(v.data(), shape.v_dim, rounded_v.data());
    const auto memory = Format::Memory::over_pages(page.data(), page.size(), shape);
    Format::read_row(memory.page(0), shape, 13, read_k.data(), read_v.data());
    EXPECT_EQ(read_k, rounded_k);
    EXPECT_EQ(read_v, rounded_v);
  }
}

TYPED_TEST(RowFormats, AddsExactlyTheRowsAskedFor) {
  using Row = typename TypeParam::Format::Element;
  using Format = typename TypeParam::Format;
  for (const PageShape& shape : kShapes) {
    const auto tokens = static_cast<std::size_t>(shape.page_tokens);
    for (const auto& [first, last] : std::initializer_list<std::pair<std::size_t, std::size_t>>{
             {0, tokens}, {0, 1}, {4, 7}, {4, tokens}, {15, 16}, {7, tokens - 1}, {3, 3}}) {
      // Rows outside stay NaN: one of them in a sum would show.
      std::vector<Row> page = this->poisoned(shape);
      const std::vector<float> k_before = this->floats(shape.k_dim);
      const std::vector<float> v_before = this->floats(shape.v_dim);
      std::vector<double> k_sum(k_before.begin(), k_before.end());
      std::vector<double> v_sum(v_before.begin(), v_before.end());
      std::vector<double> k_truth = k_sum;
      std::vector<double> v_truth = v_sum;
      for (std::size_t row = first; row < last; ++row) {
        const std::vector<float> k = this->floats(shape.k_dim);
        const std::vector<float> v = this->floats(shape.v_dim);
        Format::template encode<typename TypeParam::Isa>(this->bytes(page), shape, row, k.data(),
                                                         v.data());
        for (std::size_t d = 0; d < k.size(); ++d) {
          k_truth[d] += static_cast<double>(to_float(from_float<Row>(k[d])));
        }
        for (std::size_t d = 0; d < v.size(); ++d) {
          v_truth[d] += static_cast<double>(to_float(from_float<Row>(v[d])));
        }
      }
      Format::template add_rows<typename TypeParam::Isa>(this->bytes(page), shape, first, last,
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

}  // namespace
}  // namespace headwise
