// SPDX-License-Identifier: MIT
#include "headwise/attention/reference.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "support/attention_cases.hpp"

namespace headwise::test {
namespace {

TEST(Reference, AveragesValuesWhenScoresAreEqual) {
  const float q[16] = {};
  const std::vector<float> k(3 * 16, 0.7F);
  std::vector<float> v(3 * 16, 0.0F);
  v[0] = 1.0F;
  v[16] = 2.0F;
  v[32] = 6.0F;
  const auto all = [](std::int64_t) { return true; };
  EXPECT_DOUBLE_EQ(reference_attention(q, k.data(), v.data(), 3, 16, 16, 1.0F, all)[0], 3.0);
  const auto not_the_last = [](std::int64_t j) { return j < 2; };
  EXPECT_DOUBLE_EQ(reference_attention(q, k.data(), v.data(), 3, 16, 16, 1.0F, not_the_last)[0],
                   1.5);
}

TEST(Reference, IsZeroWhereNothingIsSeen) {
  const float q[16] = {1.0F};
  const auto none = [](std::int64_t) { return false; };
  const std::vector<float> x(16, 1.0F);
  EXPECT_EQ(reference_attention(q, x.data(), x.data(), 1, 16, 16, 1.0F, none),
            std::vector<double>(16, 0.0));
}

TEST(Reference, WeighsARowByWhatItStandsFor) {
  const float q[1] = {2.0F};
  ReferenceRow once(q, 1.0), thrice(q, 1.0);
  const double k[2] = {0.0, 0.5};
  const double v[2] = {1.0, 4.0};
  const auto row = [](const double& x) { return std::span(&x, 1); };
  once.add(row(k[0]), row(v[0]));
  thrice.add(row(k[0]), row(v[0]));
  once.add(row(k[1]), row(v[1]), std::log(3.0));
  for (int i = 0; i < 3; ++i) thrice.add(row(k[1]), row(v[1]));
  EXPECT_NEAR(once.output(1)[0], thrice.output(1)[0], 1e-14);
}

TEST(Reference, TakesARowWhoseScoresAreAllMinusInfinityForEmpty) {
  const float q[1] = {-1e20F};
  const double k[1] = {1e20}, v[1] = {5.0};
  ReferenceRow row(q, 1.0);
  row.add(std::span<const double>(k), std::span<const double>(v));  // -1e40: -inf in f32
  EXPECT_EQ(row.output(1)[0], 0.0);
  EXPECT_EQ(row.lse(), -std::numeric_limits<double>::infinity());
  const double low[1] = {1e10};
  row.add(std::span<const double>(low), std::span<const double>(v));
  EXPECT_EQ(row.output(1)[0], 5.0);
  EXPECT_NEAR(row.lse(), -1e30, 1e24);
}

TEST(Reference, LetsPlusInfinityAndNanThrough) {
  for (const float x :
       {-std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    const float q[1] = {x};
    const double k[1] = {-1.0}, v[1] = {5.0};
    ReferenceRow row(q, 1.0);
    row.add(std::span<const double>(k), std::span<const double>(v));
    EXPECT_TRUE(std::isnan(row.output(1)[0]));
  }
}

/// One dimension, q 1: scores 0, 1, 10, values 1, 2, 4, in double by hand.
class ReferenceOfThree : public ::testing::Test {
 protected:
  static constexpr double kKeys[3] = {0.0, 1.0, 10.0};
  static constexpr double kValues[3] = {1.0, 2.0, 4.0};
  const float q_[1] = {1.0F};

  void add(ReferenceRow& row, int i, double bias = 0.0) {
    row.add(std::span(&kKeys[i], 1), std::span(&kValues[i], 1), bias);
  }
};

TEST_F(ReferenceOfThree, CapsScores) {
  // 5 tanh(0), 5 tanh(0.2), 5 tanh(2) = 0, 0.98687660, 4.82013790
  ReferenceRow row(q_, 1.0, 5.0);
  for (int i = 0; i < 3; ++i) add(row, i);
  EXPECT_NEAR(row.lse(), std::log(1.0 + 2.6828428 + 123.9822), 1e-6);
  EXPECT_NEAR(row.output(1)[0], (1.0 + 2.0 * 2.6828428 + 4.0 * 123.9822) / 127.66504, 1e-6);
}

TEST_F(ReferenceOfThree, AddsASinkToTheSumAndNothingToTheValues) {
  ReferenceRow row(q_, 1.0);
  row.add_sink(std::log(2.0));
  EXPECT_EQ(row.output(1)[0], 0.0);
  EXPECT_NEAR(row.lse(), std::log(2.0), 1e-15);
  add(row, 0);
  EXPECT_NEAR(row.output(1)[0], 1.0 / 3.0, 1e-15);
  add(row, 1);
  EXPECT_NEAR(row.output(1)[0], (1.0 + 2.0 * std::exp(1.0)) / (3.0 + std::exp(1.0)), 1e-15);
}

TEST_F(ReferenceOfThree, NeitherCapsNorScalesBiasAndSink) {
  ReferenceRow row(q_, 2.0, 1.0);
  row.add_sink(3.0);
  add(row, 0, 7.0);
  EXPECT_NEAR(row.lse(), std::log(std::exp(3.0) + std::exp(7.0)), 1e-14);
}

TEST(Reference, CountsSlopesInTokensFromQueryToKey) {
  // Equal scores, slope ln 2 and 0: each token away halves the weight of the first head's keys.
  AttentionCase c{.name = "", .k_dim = 16, .v_dim = 16, .group_size = 2, .past = 2, .queries = 2};
  PagedHead<PlainRows<f32>> head(c);
  head.set_q(0.0F);
  for (std::int64_t pos = 0; pos < 4; ++pos) head.set_row(pos, 0.5F, static_cast<float>(pos));
  auto problem = head.problem();
  const float slopes[2] = {std::log(2.0F), 0.0F};
  problem.softmax.alibi_slopes = slopes;
  const std::vector<double> out = reference_attention(problem);
  EXPECT_NEAR(out[0 * 16], (0.0 / 4 + 1.0 / 2 + 2.0) / 1.75, 1e-7);
  EXPECT_NEAR(out[1 * 16], 1.0, 1e-7);
  EXPECT_NEAR(out[2 * 16], (0.0 / 8 + 1.0 / 4 + 2.0 / 2 + 3.0) / 1.875, 1e-7);
  EXPECT_NEAR(out[3 * 16], 1.5, 1e-7);
}

/// The reading of a paged problem and the reading of the dense history are independent code: they
/// must agree on every case whose rows are all in the history.
template <class Format>
void paged_equals_dense() {
  for (const AttentionCase& c : attention_cases()) {
    if (c.compensation > 0 || c.kept == Kept::kSecondRun) continue;
    if (c.soft_cap > 0.0F || c.sinks || c.alibi) continue;  // no part of the dense reading
    PagedHead<Format> head(c);
    const auto problem = head.problem();
    const std::vector<double> paged = reference_attention(problem);
    const DenseRows dense = head.dense_rows();
    for (std::int64_t i = 0; i < c.queries; ++i) {
      for (int g = 0; g < c.group_size; ++g) {
        const auto sees = [&](std::int64_t j) { return c.window.sees(Pos{c.past + i}, Pos{j}); };
        const std::vector<double> row =
            reference_attention(problem.q.row(i, g), dense.k.data(), dense.v.data(),
                                c.past + c.queries, c.k_dim, c.v_dim, problem.scale, sees);
        for (int d = 0; d < c.v_dim; ++d) {
          const auto at = static_cast<std::size_t>((i * c.group_size + g) * c.v_dim + d);
          ASSERT_NEAR(paged[at], row[static_cast<std::size_t>(d)], 1e-12) << c.name;
        }
      }
    }
  }
}

TEST(Reference, ReadsPlainPagesLikeADenseHistory) { paged_equals_dense<PlainRows<f16>>(); }
TEST(Reference, ReadsTiledPagesLikeADenseHistory) { paged_equals_dense<TiledRows<f16>>(); }

}  // namespace
}  // namespace headwise::test
