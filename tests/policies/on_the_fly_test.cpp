// SPDX-License-Identifier: MIT
#include "headwise/policies/on_the_fly.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <complex>
#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

#include "support/errors.hpp"

namespace headwise {
namespace {

constexpr int kFlyDim = 16;
using Complex = std::complex<double>;

/// Rows before RoPE as complex numbers, one a pair, and as an engine has them after it.
struct FlyRows {
  FlyRows(std::int64_t tokens, int heads_)
      : heads(heads_), pairs(static_cast<std::size_t>(tokens * heads * kFlyDim / 2)) {}
  Complex& at(std::int64_t token, int head, int pair) {
    return pairs[static_cast<std::size_t>((token * heads + head) * kFlyDim / 2 + pair)];
  }
  std::int64_t tokens() const { return std::ssize(pairs) * 2 / kFlyDim / heads; }
  std::vector<float> turned(const Rope& rope, std::int64_t first_position) {
    std::vector<float> rows(pairs.size() * 2);
    for (std::int64_t t = 0; t < tokens(); ++t) {
      for (int h = 0; h < heads; ++h) {
        for (int i = 0; i < kFlyDim / 2; ++i) {
          const double angle = static_cast<double>(first_position + t) * rope.frequency(i, kFlyDim);
          const Complex x = at(t, h, i) * std::polar(1.0, angle);
          const bool halves = rope.pairs == RopePairs::kHalves;
          float* row = rows.data() + (t * heads + h) * kFlyDim;
          row[halves ? i : 2 * i] = static_cast<float>(x.real());
          row[halves ? i + kFlyDim / 2 : 2 * i + 1] = static_cast<float>(x.imag());
        }
      }
    }
    return rows;
  }
  Complex mean(int head, int pair) {
    Complex sum = 0.0;
    for (std::int64_t t = 0; t < tokens(); ++t) sum += at(t, head, pair);
    return sum / static_cast<double>(tokens());
  }

  int heads;
  std::vector<Complex> pairs;
};

FlyRows random_fly_rows(std::mt19937& random, std::int64_t tokens, int heads) {
  std::uniform_real_distribution<double> uniform(-1.0, 3.0);
  FlyRows rows(tokens, heads);
  for (Complex& x : rows.pairs) x = {uniform(random), uniform(random)};
  return rows;
}

TensorView<const float> fly_view(const std::vector<float>& rows, int heads,
                                 std::int64_t token = 0) {
  return TensorView<const float>::nhd(rows.data() + token * heads * kFlyDim, heads, kFlyDim);
}

/// A query head's score as published: turn, softmax, cumulate, average.
double fly_in_double(const Rope& rope, FlyRows& q, FlyRows& k, int head, int kv_head, int length) {
  std::vector<double> weights;
  double total = 0.0;
  for (int j = 0; j < length; ++j) {
    double dot = 0.0;
    for (int i = 0; i < kFlyDim / 2; ++i) {
      const double frequency = rope.frequency(i, kFlyDim);
      const Complex query = q.mean(head, i) * std::polar(1.0, frequency * (length - 1));
      const Complex key = k.mean(kv_head, i) * std::polar(1.0, frequency * j);
      dot += query.real() * key.real() + query.imag() * key.imag();
    }
    weights.push_back(std::exp(dot / std::sqrt(static_cast<double>(kFlyDim))));
    total += weights.back();
  }
  double cumulated = 0.0;
  double sum = 0.0;
  for (const double weight : weights) {
    cumulated += weight / total;
    sum += cumulated;
  }
  return sum / length;
}

TEST(OnTheFly, IsTheAreaUnderTheCumulatedAttentionInDouble) {
  std::mt19937 random(17);
  const ModelShape shape({{2, 2, kFlyDim, 16}, {1, 3, kFlyDim, 16}});
  const std::array<double, 8> own{1.0, .5, .3, .11, .05, .02, .01, .003};
  for (const Rope& rope : {Rope{}, Rope{.pairs = RopePairs::kNeighbours}, Rope{.theta = 500.0},
                           Rope{.frequencies = own}}) {
    on_the_fly::Probe probe(shape, rope, 50);
    std::vector<std::vector<double>> expected(2);
    for (auto& of_layer : expected) of_layer.assign(2, 0.0);
    for (const std::int64_t tokens : {7, 20}) {
      for (int l = 0; l < 2; ++l) {
        const LayerShape& layer = shape.layer(l);
        FlyRows q = random_fly_rows(random, tokens, layer.num_qo_heads());
        FlyRows k = random_fly_rows(random, tokens, layer.num_kv_heads);
        const std::vector<float> q_rows = q.turned(rope, 5);
        const std::vector<float> k_rows = k.turned(rope, 5);
        probe.add(l, fly_view(q_rows, q.heads), fly_view(k_rows, k.heads), 5, tokens);
        for (int head = 0; head < layer.num_qo_heads(); ++head) {
          const int kv_head = head / layer.group_size;
          expected[static_cast<std::size_t>(l)][static_cast<std::size_t>(kv_head)] +=
              fly_in_double(rope, q, k, head, kv_head, 50) / layer.group_size / 2;
        }
      }
      probe.end_text();
    }
    for (int l = 0; l < 2; ++l) {
      for (int h = 0; h < shape.layer(l).num_kv_heads; ++h) {
        EXPECT_NEAR(probe.scores().value(l, h),
                    expected[static_cast<std::size_t>(l)][static_cast<std::size_t>(h)], 1e-5);
      }
    }
  }
}

/// One head: query 1 in each pair, the key turned to the phase of `back` positions.
double fly_score(double strength, double back) {
  const auto shape = ModelShape::uniform(1, 1, 1, kFlyDim);
  FlyRows q(3, 1);
  FlyRows k(3, 1);
  for (std::int64_t t = 0; t < 3; ++t) {
    for (int i = 0; i < kFlyDim / 2; ++i) {
      q.at(t, 0, i) = strength;
      k.at(t, 0, i) = strength * std::polar(1.0, Rope{}.frequency(i, kFlyDim) * back);
    }
  }
  const std::vector<float> q_rows = q.turned({}, 9);
  const std::vector<float> k_rows = k.turned({}, 9);
  on_the_fly::Probe probe(shape, {});
  probe.add(0, fly_view(q_rows, 1), fly_view(k_rows, 1), 9, 3);
  probe.end_text();
  return probe.scores().value(0, 0);
}

// policies-core 2.6.
TEST(OnTheFly, HasTheGoldenScores) {
  EXPECT_NEAR(fly_score(0.0, 0.0), .501, 1e-9);    // spread evenly
  EXPECT_NEAR(fly_score(40.0, 0.0), .002, 1e-6);   // on the last key
  EXPECT_NEAR(fly_score(40.0, 499.0), 1.0, 1e-6);  // on the first
}

TEST(OnTheFly, IsTheSameHoweverATextIsCut) {
  std::mt19937 random(18);
  const auto shape = ModelShape::uniform(1, 4, 2, kFlyDim);
  FlyRows q = random_fly_rows(random, 30, 4);
  FlyRows k = random_fly_rows(random, 30, 2);
  const std::vector<float> q_rows = q.turned({}, 0);
  const std::vector<float> k_rows = k.turned({}, 0);
  on_the_fly::Probe whole(shape, {});
  whole.add(0, fly_view(q_rows, 4), fly_view(k_rows, 2), 0, 30);
  EXPECT_EQ(whole.scores().value(0, 0), 0.0);  // not ended yet
  whole.end_text();
  whole.end_text();  // of nothing
  for (const std::int64_t chunk : {1, 7}) {
    on_the_fly::Probe cut(shape, {});
    for (std::int64_t first = 0; first < 30; first += chunk) {
      cut.add(0, fly_view(q_rows, 4, first), fly_view(k_rows, 2, first), first,
              std::min(chunk, 30 - first));
    }
    cut.end_text();
    EXPECT_EQ(cut.scores(), whole.scores()) << chunk;
  }
}

TEST(OnTheFly, RefusesARopeOfAnotherWidth) {
  const auto shape = ModelShape::uniform(1, 1, 1, kFlyDim);
  const std::array<double, 2> few{1.0, .5};
  EXPECT_EQ(
      testing::message_of<ConfigError>([&] { on_the_fly::Probe(shape, Rope{.frequencies = few}); }),
      "2 frequencies for a width of 16");
  EXPECT_THROW(on_the_fly::Probe(shape, {}, 0), ConfigError);
}

}  // namespace
}  // namespace headwise
