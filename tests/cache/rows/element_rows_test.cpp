// SPDX-License-Identifier: MIT
#include "headwise/cache/rows/element_rows.hpp"

#include <gtest/gtest.h>

#include <cmath>
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
class ElementRows : public ::testing::Test {
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

TYPED_TEST_SUITE(ElementRows, test::ElementKernels, test::KernelNames);

TYPED_TEST(ElementRows, WritesEveryElementWhereTheLayoutSaysAndNothingElse) {
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

TYPED_TEST(ElementRows, RoundsLikeTheDefinition) {
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

TYPED_TEST(ElementRows, CountsTheFiniteElementsThatBecameInfinite) {
  using Row = typename TypeParam::Format::Element;
  using Format = typename TypeParam::Format;
  const float infinity = std::numeric_limits<float>::infinity();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const PageShape shape{16, 32, 16};
  std::vector<Row> page = this->poisoned(shape);
  std::vector<float> k(32, 1.0F), v(16, -1.0F);
  const auto overflows = [&] {
    return Format::template encode<typename TypeParam::Isa>(this->bytes(page), shape, 3, k.data(),
                                                            v.data());
  };
  EXPECT_EQ(overflows(), 0);
  for (const float x : {65504.0F, 65519.9F, 65520.0F, 70000.0F, -70000.0F, 3.38e38F, 3.395e38F,
                        3.4e38F, -3.4e38F, infinity, -infinity, nan}) {
    k[31] = x;
    v[0] = x;
    const bool overflowed = std::isfinite(x) && std::isinf(to_float(from_float<Row>(x)));
    EXPECT_EQ(overflows(), overflowed ? 2 : 0) << x;
    v[15] = infinity;  // was infinite before
    EXPECT_EQ(overflows(), overflowed ? 2 : 0) << x;
    v[15] = -1.0F;
  }
}

}  // namespace
}  // namespace headwise
