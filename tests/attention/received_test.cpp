// SPDX-License-Identifier: MIT
#include "headwise/attention/received.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "support/errors.hpp"
#include "support/isa_types.hpp"

namespace headwise {
namespace {

template <class Isa>
class ReceivedAttention : public ::testing::Test {};
TYPED_TEST_SUITE(ReceivedAttention, test::AllIsas, test::IsaNames);

std::vector<float> floats(std::mt19937& random, std::int64_t count, float scale) {
  std::vector<float> x(static_cast<std::size_t>(count));
  for (float& value : x) value = std::uniform_real_distribution<float>(-scale, scale)(random);
  return x;
}

TYPED_TEST(ReceivedAttention, IsWhatTheSoftmaxesGiveInDouble) {
  std::mt19937 random(23);
  for (const int dim : {8, 16, 80}) {
    for (const std::int64_t n : {1, 2, 63, 64, 65, 130, 300}) {
      for (const std::int64_t rows : {1, 3, 9}) {
        const std::vector<float> q = floats(random, rows * dim, 3.0F);
        const std::vector<float> k = floats(random, n * dim, 3.0F);
        std::vector<std::int64_t> visible;
        for (std::int64_t i = 0; i < rows; ++i) {
          visible.push_back(std::clamp<std::int64_t>(n - rows + 1 + i, 0, n));
        }
        const float scale = 1.0F / std::sqrt(static_cast<float>(dim));
        std::vector<double> sum(static_cast<std::size_t>(n), 0.0);
        std::vector<double> max(static_cast<std::size_t>(n), 0.0);
        for (std::int64_t i = 0; i < rows; ++i) {
          std::vector<double> weights;
          double total = 0.0;
          for (std::int64_t j = 0; j < visible[static_cast<std::size_t>(i)]; ++j) {
            double dot = 0.0;
            for (int d = 0; d < dim; ++d) {
              dot += static_cast<double>(q[static_cast<std::size_t>(i * dim + d)]) *
                     static_cast<double>(k[static_cast<std::size_t>(j * dim + d)]);
            }
            weights.push_back(std::exp(dot * static_cast<double>(scale)));
            total += weights.back();
          }
          for (std::size_t j = 0; j < weights.size(); ++j) {
            sum[j] += weights[j] / total;
            max[j] = std::max(max[j], weights[j] / total);
          }
        }
        for (const Received how : {Received::kSum, Received::kMax}) {
          std::vector<float> received(static_cast<std::size_t>(n), 0.0F);
          received_attention<TypeParam>(RowView::dense(q.data(), rows, dim), visible,
                                        RowView::dense(k.data(), n, dim), scale, how, received);
          for (std::size_t j = 0; j < received.size(); ++j) {
            const double expected = how == Received::kSum ? sum[j] : max[j];
            ASSERT_NEAR(received[j], expected, 2e-6) << "n " << n << ", dim " << dim;
          }
        }
      }
    }
  }
}

TYPED_TEST(ReceivedAttention, AddsToWhatIsThere) {
  const std::vector<float> rows(16, 0.25F);
  const std::vector<std::int64_t> visible{1};
  std::vector<float> received{0.5F};
  const RowView one = RowView::dense(rows.data(), 1, 16);
  received_attention<TypeParam>(one, visible, one, 1.0F, Received::kSum, received);
  EXPECT_EQ(received[0], 1.5F);
  received_attention<TypeParam>(one, visible, one, 1.0F, Received::kMax, received);
  EXPECT_EQ(received[0], 1.5F);
}

TYPED_TEST(ReceivedAttention, HidesKeysBehindAQueryWhateverTheyAre) {
  std::vector<float> k(3 * 16, 0.5F);
  std::fill(k.begin() + 16, k.end(), std::nanf(""));
  const std::vector<float> q(2 * 16, 1.0F);
  const std::vector<std::int64_t> visible{1, 0};
  std::vector<float> received(3, 0.0F);
  received_attention<TypeParam>(RowView::dense(q.data(), 2, 16), visible,
                                RowView::dense(k.data(), 3, 16), 1.0F, Received::kSum, received);
  EXPECT_EQ(received, (std::vector<float>{1.0F, 0.0F, 0.0F}));
}

TEST(ReceivedAttentionSizes, MustAgree) {
  const std::vector<float> rows(64, 1.0F);
  const RowView three = RowView::dense(rows.data(), 3, 16);
  std::vector<float> received(3);
  const auto call = [&](const RowView& queries, std::vector<std::int64_t> visible) {
    received_attention(queries, visible, three, 1.0F, Received::kSum, received);
  };
  EXPECT_EQ(testing::message_of<ConfigError>([&] { call(RowView::dense(rows.data(), 1, 8), {1}); }),
            "queries of width 8 over keys of width 16");
  EXPECT_EQ(testing::message_of<ConfigError>([&] { call(three.rows(0, 1), {4}); }),
            "a query sees 4 of 3 keys");
  EXPECT_THROW(call(three.rows(0, 1), {-1}), ConfigError);
  EXPECT_THROW(call(three, {1}), ConfigError);
}

}  // namespace
}  // namespace headwise
