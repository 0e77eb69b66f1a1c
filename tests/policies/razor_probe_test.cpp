// SPDX-License-Identifier: MIT
#include "headwise/policies/razor_probe.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <random>
#include <set>
#include <tuple>
#include <utility>
#include <vector>

#include "support/errors.hpp"

namespace headwise {
namespace {

using razor_attention::ProbePrompt;
using testing::message_of;

/// Q or K of one layer: [tokens, heads, dim].
struct RazorRows {
  RazorRows(std::int64_t tokens, int heads_, int dim_)
      : heads(heads_), dim(dim_), x(static_cast<std::size_t>(tokens * heads_ * dim_), 0.0F) {}
  float& at(std::int64_t token, int head, int d) {
    return x[static_cast<std::size_t>((token * heads + head) * dim + d)];
  }
  double at(std::int64_t token, int head, int d) const {
    return static_cast<double>(x[static_cast<std::size_t>((token * heads + head) * dim + d)]);
  }
  TensorView<const float> from(std::int64_t token) const {
    return TensorView<const float>::nhd(x.data() + token * heads * dim, heads, dim);
  }

  int heads;
  int dim;
  std::vector<float> x;
};

RazorRows random_razor_rows(std::mt19937& random, std::int64_t tokens, int heads, int dim) {
  RazorRows rows(tokens, heads, dim);
  for (float& x : rows.x) x = std::uniform_real_distribution<float>(-2.0F, 2.0F)(random);
  return rows;
}

/// (induction, echo) of a query head as specified: the whole matrix, its first row and column
/// deleted, indices counted after that.
std::pair<double, double> razor_in_double(const ProbePrompt& prompt, const RazorRows& q,
                                          const RazorRows& k, int head, int kv_head) {
  const std::int64_t n = prompt.length();
  std::vector<std::vector<double>> kept;  // [i][j]
  for (std::int64_t query = 1; query < n; ++query) {
    std::vector<double> row;
    double total = 0.0;
    for (std::int64_t key = 0; key <= query; ++key) {
      double dot = 0.0;
      for (int d = 0; d < q.dim; ++d) dot += q.at(query, head, d) * k.at(key, kv_head, d);
      row.push_back(std::exp(dot / std::sqrt(static_cast<double>(q.dim))));
      total += row.back();
    }
    for (double& x : row) x /= total;
    kept.emplace_back(row.begin() + 1, row.end());
  }
  double induction = 0.0;
  double echo = 0.0;
  for (std::int64_t i = prompt.period; i < prompt.period * prompt.repeats; ++i) {
    const std::vector<double>& row = kept[static_cast<std::size_t>(i)];
    for (std::int64_t j = 0; j < i; ++j) {
      if (j % prompt.period != i % prompt.period) continue;
      echo += row[static_cast<std::size_t>(j)];
      induction += row[static_cast<std::size_t>(j + 1)];
    }
  }
  const auto queries = static_cast<double>(prompt.period * (prompt.repeats - 1));
  return {induction / queries, echo / queries};
}

TEST(RazorProbe, IsTheSpecifiedSumInDouble) {
  std::mt19937 random(11);
  const ModelShape shape({{2, 2, 16, 16}, {1, 3, 32, 16}});
  for (const auto& [period, repeats] : {std::pair{2, 2}, {3, 5}, {21, 3}, {64, 2}, {70, 4}}) {
    const ProbePrompt prompt{.period = period, .repeats = repeats};
    razor_attention::Probe probe(shape, prompt);
    std::vector<RazorRows> q;
    std::vector<RazorRows> k;
    for (int l = 0; l < 2; ++l) {
      const LayerShape& layer = shape.layer(l);
      q.push_back(random_razor_rows(random, prompt.length(), layer.num_qo_heads(), layer.k_dim));
      k.push_back(random_razor_rows(random, prompt.length(), layer.num_kv_heads, layer.k_dim));
      probe.add(l, q.back().from(0), k.back().from(0), 0, prompt.length());
    }
    for (int l = 0; l < 2; ++l) {
      const LayerShape& layer = shape.layer(l);
      const auto at = static_cast<std::size_t>(l);
      for (int kv_head = 0; kv_head < layer.num_kv_heads; ++kv_head) {
        std::pair best{0.0, 0.0};
        for (int g = 0; g < layer.group_size; ++g) {
          const int head = kv_head * layer.group_size + g;
          const auto [induction, echo] = razor_in_double(prompt, q[at], k[at], head, kv_head);
          EXPECT_NEAR(probe.induction().value(l, head), induction, 1e-6) << period;
          EXPECT_NEAR(probe.echo().value(l, head), echo, 1e-6) << period;
          best = {std::max(best.first, induction), std::max(best.second, echo)};
        }
        EXPECT_NEAR(probe.scores().induction.value(l, kv_head), best.first, 1e-6);
        EXPECT_NEAR(probe.scores().echo.value(l, kv_head), best.second, 1e-6);
      }
    }
  }
}

TEST(RazorProbe, IsTheSameHoweverThePromptIsCut) {
  std::mt19937 random(12);
  const auto shape = ModelShape::uniform(1, 4, 2, 16);
  const ProbePrompt prompt{.period = 40, .repeats = 3};
  const RazorRows q = random_razor_rows(random, prompt.length(), 4, 16);
  const RazorRows k = random_razor_rows(random, prompt.length(), 2, 16);
  razor_attention::Probe whole(shape, prompt);
  whole.add(0, q.from(0), k.from(0), 0, prompt.length());
  for (const std::int64_t chunk : {1, 7, 40, 64, 100}) {
    razor_attention::Probe cut(shape, prompt);
    for (std::int64_t first = 0; first < prompt.length(); first += chunk) {
      const std::int64_t count = std::min(chunk, prompt.length() - first);
      // Keys that are not there yet are not read.
      std::vector<float> so_far(k.x.begin(), k.x.begin() + (first + count) * 2 * 16);
      cut.add(0, q.from(first), TensorView<const float>::nhd(so_far.data(), 2, 16), first, count);
    }
    EXPECT_EQ(cut.induction(), whole.induction()) << chunk;
    EXPECT_EQ(cut.echo(), whole.echo()) << chunk;
  }
}

// policies-core 4.6: A[i][j] = 1 / (i + 2).
TEST(RazorProbe, HasTheGoldenNoiseFloor) {
  const auto shape = ModelShape::uniform(1, 1, 1, 16);
  for (const auto& [period, repeats, golden, error] :
       {std::tuple{3, 2, .169841, 1e-6}, {3, 4, .215027, 1e-6}, {2500, 4, 3.155e-4, 5e-8}}) {
    const ProbePrompt prompt{.period = period, .repeats = repeats};
    const RazorRows rows(prompt.length(), 1, 16);
    razor_attention::Probe probe(shape, prompt);
    probe.add(0, rows.from(0), rows.from(0), 0, prompt.length());
    EXPECT_NEAR(probe.induction().value(0, 0), golden, error);
    EXPECT_NEAR(probe.echo().value(0, 0), golden, error);
  }
}

/// (induction, echo) where query p looks at `keys(p)` alone, equally at each.
template <class Keys>
std::pair<double, double> of_looks(const ProbePrompt& prompt, Keys keys) {
  const auto shape = ModelShape::uniform(1, 1, 1, 16);
  RazorRows q(prompt.length(), 1, 16);
  RazorRows k(prompt.length(), 1, 16);
  for (std::int64_t p = 0; p < prompt.length(); ++p) {
    k.at(p, 0, static_cast<int>(p)) = 1.0F;
    for (const std::int64_t key : keys(p)) q.at(p, 0, static_cast<int>(key)) = 400.0F;
  }
  razor_attention::Probe probe(shape, prompt);
  probe.add(0, q.from(0), k.from(0), 0, prompt.length());
  return {probe.induction().value(0, 0), probe.echo().value(0, 0)};
}

TEST(RazorProbe, TellsPerfectHeads) {
  const ProbePrompt prompt{.period = 3, .repeats = 4};
  using Keys = std::vector<std::int64_t>;
  const auto expect = [&](auto keys, double induction, double echo) {
    const auto got = of_looks(prompt, keys);
    EXPECT_NEAR(got.first, induction, 1e-6);
    EXPECT_NEAR(got.second, echo, 1e-6);
  };
  expect([](std::int64_t p) { return p > 3 ? Keys{p - 2} : Keys{0}; }, 1, 0);
  expect([](std::int64_t p) { return p > 3 ? Keys{p - 3} : Keys{0}; }, 0, 1);
  expect([](std::int64_t p) { return Keys{p}; }, 0, 0);  // not an earlier one
  expect([](std::int64_t) { return Keys{0}; }, 0, 0);    // the first token, at multiples of K too
  // A copy for 4, 7 and 10 of the 9 queries; it follows the first token, which is none for 6,
  // 9, 12.
  expect([](std::int64_t) { return Keys{1}; }, 0, 1 / 3.0);
  const auto all_copies = [](std::int64_t p) {
    Keys keys;
    for (std::int64_t key = p - 3; key > 0; key -= 3) keys.push_back(key);
    return keys.empty() ? Keys{0} : keys;
  };
  expect(all_copies, 0, 1);
}

TEST(RazorProbe, IsTheMeanOfSeveralPrompts) {
  std::mt19937 random(13);
  const auto shape = ModelShape::uniform(2, 1, 1, 16);
  const ProbePrompt prompt{.period = 5, .repeats = 2};
  razor_attention::Probe both(shape, prompt);
  double sum = 0.0;
  for (int i = 0; i < 2; ++i) {
    const RazorRows q = random_razor_rows(random, prompt.length(), 1, 16);
    razor_attention::Probe one(shape, prompt);
    for (razor_attention::Probe* probe : {&one, &both}) {
      probe->add(0, q.from(0), q.from(0), 0, prompt.length());
    }
    sum += one.echo().value(0, 0);
  }
  EXPECT_DOUBLE_EQ(both.echo().value(0, 0), sum / 2);
  EXPECT_EQ(both.echo().value(1, 0), 0.0);  // never added
}

TEST(RazorProbe, DrawsAPromptThatRepeats) {
  const ProbePrompt prompt{.period = 400, .repeats = 3, .lowest = 16, .highest = 31};
  const std::vector<std::int32_t> tokens = prompt.tokens(1, 9);
  ASSERT_EQ(std::ssize(tokens), 1201);
  EXPECT_EQ(tokens[0], 1);
  for (std::size_t i = 401; i < tokens.size(); ++i) ASSERT_EQ(tokens[i], tokens[i - 400]);
  const std::set<std::int32_t> ids(tokens.begin() + 1, tokens.end());
  EXPECT_EQ(ids.size(), 16U);
  EXPECT_EQ(*ids.begin(), 16);
  EXPECT_EQ(*ids.rbegin(), 31);
  EXPECT_EQ(prompt.tokens(1, 9), tokens);
  EXPECT_NE(prompt.tokens(1, 10), tokens);
  EXPECT_EQ(ProbePrompt{}.length(), 10001);
}

TEST(RazorProbe, RefusesWhatItDoesNotKnow) {
  const auto shape = ModelShape::uniform(1, 1, 1, 16);
  const auto probe_of = [&](ProbePrompt prompt) {
    return [&shape, prompt] { (void)razor_attention::Probe(shape, prompt); };
  };
  EXPECT_THROW(probe_of({.period = 1})(), ConfigError);
  EXPECT_THROW(probe_of({.repeats = 1})(), ConfigError);
  EXPECT_THROW(probe_of({.period = kMaxTokens})(), ConfigError);
  EXPECT_EQ(
      message_of<ConfigError>([] { (void)ProbePrompt{.lowest = 5, .highest = 4}.tokens(0, 1); }),
      "token ids are drawn from a range, got 5 to 4");

  const ProbePrompt prompt{.period = 2, .repeats = 2};
  const RazorRows rows(8, 1, 16);
  razor_attention::Probe probe(shape, prompt);
  EXPECT_EQ(message_of<ConfigError>([&] { probe.add(0, rows.from(0), rows.from(0), 4, 2); }),
            "tokens 4 to 6 of a prompt of 5");
  EXPECT_THROW(probe.add(0, rows.from(0), rows.from(0), -1, 2), ConfigError);
  LayerShape capped{1, 1, 16, 16};
  capped.softmax.soft_cap = 30.0F;
  LayerShape windowed{1, 1, 16, 16};
  windowed.sliding_window = 4;
  razor_attention::Probe other(ModelShape({capped, windowed}), prompt);
  for (const int layer : {0, 1}) {
    EXPECT_THROW(other.add(layer, rows.from(0), rows.from(0), 0, 5), ConfigError);
  }
}

}  // namespace
}  // namespace headwise
