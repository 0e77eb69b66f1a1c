// SPDX-License-Identifier: MIT
#include "headwise/attention/logit_blocks.hpp"

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

#include "support/errors.hpp"
#include "support/isa_types.hpp"

namespace headwise {
namespace {

template <class Isa>
class LogitBlocks : public ::testing::Test {};
TYPED_TEST_SUITE(LogitBlocks, test::AllIsas, test::IsaNames);

std::vector<float> random_rows(std::mt19937& random, std::int64_t count) {
  std::vector<float> x(static_cast<std::size_t>(count));
  for (float& value : x) value = std::uniform_real_distribution<float>(-2.0F, 2.0F)(random);
  return x;
}

/// All logits that queries see, query by query, as they are visited.
template <class Isa>
std::vector<std::vector<float>> logits_of(const RowView& queries,
                                          const std::vector<std::int64_t>& visible,
                                          const RowView& keys) {
  std::vector<std::vector<float>> all(visible.size());
  for_each_logits<Isa>(queries, visible, keys, 0.5F,
                       [&](std::int64_t row, std::int64_t first, const float* logits, int count) {
                         std::vector<float>& of_row = all[static_cast<std::size_t>(row)];
                         EXPECT_EQ(first, std::ssize(of_row));  // ascending, none left out
                         EXPECT_EQ(first % detail::KeyBlock<Isa>::kKeys, 0);
                         of_row.insert(of_row.end(), logits, logits + count);
                       });
  return all;
}

TYPED_TEST(LogitBlocks, AreTheScaledProductsOfWhatEachQuerySees) {
  std::mt19937 random(5);
  constexpr int kDim = 16;
  constexpr std::int64_t kHeads = 3;  // head 1 of three, token by token
  for (const std::int64_t n : {1, 63, 64, 65, 200}) {
    const std::vector<float> k = random_rows(random, n * kHeads * kDim);
    const std::vector<float> q = random_rows(random, 3 * kDim);
    const RowView keys{k.data() + kDim, kHeads * kDim, n, kDim};
    const RowView queries = RowView::dense(q.data(), 3, kDim);
    const std::vector<std::int64_t> visible{n, 0, (n + 1) / 2};
    const auto all = logits_of<TypeParam>(queries, visible, keys);
    for (std::size_t i = 0; i < all.size(); ++i) {
      ASSERT_EQ(std::ssize(all[i]), visible[i]);
      for (std::size_t j = 0; j < all[i].size(); ++j) {
        double dot = 0.0;
        for (std::size_t d = 0; d < kDim; ++d) {
          dot += static_cast<double>(q[i * kDim + d]) *
                 static_cast<double>(k[(j * kHeads + 1) * kDim + d]);
        }
        ASSERT_NEAR(all[i][j], 0.5 * dot, 1e-5) << i << " " << j;
      }
    }
  }
}

TYPED_TEST(LogitBlocks, AreTheSameBitsForAQueryAlone) {
  std::mt19937 random(6);
  const std::vector<float> k = random_rows(random, 100 * 16);
  const std::vector<float> q = random_rows(random, 2 * 16);
  const RowView keys = RowView::dense(k.data(), 100, 16);
  const RowView queries = RowView::dense(q.data(), 2, 16);
  const auto both = logits_of<TypeParam>(queries, {99, 100}, keys);
  EXPECT_EQ(logits_of<TypeParam>(queries.rows(0, 1), {99}, keys.rows(0, 99))[0], both[0]);
  EXPECT_EQ(logits_of<TypeParam>(queries.rows(1, 2), {100}, keys)[0], both[1]);
}

TEST(LogitBlocksSizes, MustAgree) {
  const std::vector<float> rows(64, 1.0F);
  const RowView three = RowView::dense(rows.data(), 3, 16);
  const auto call = [&](const RowView& queries, std::vector<std::int64_t> visible) {
    for_each_logits(queries, visible, three, 1.0F,
                    [](std::int64_t, std::int64_t, const float*, int) { FAIL(); });
  };
  EXPECT_EQ(testing::message_of<ConfigError>([&] { call(RowView::dense(rows.data(), 1, 8), {1}); }),
            "queries of width 8 over keys of width 16");
  EXPECT_EQ(testing::message_of<ConfigError>([&] { call(three, {1}); }),
            "1 counts of visible keys for 3 queries");
  EXPECT_EQ(testing::message_of<ConfigError>([&] {
              call(three.rows(0, 2), {1, 4});
            }),
            "a query sees 4 of 3 keys");
  EXPECT_THROW(call(three.rows(0, 1), {-1}), ConfigError);
}

}  // namespace
}  // namespace headwise
