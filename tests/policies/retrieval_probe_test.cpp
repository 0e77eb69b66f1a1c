// SPDX-License-Identifier: MIT
#include "headwise/policies/retrieval_probe.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <random>
#include <set>
#include <vector>

#include "support/errors.hpp"

namespace headwise {
namespace {

using testing::message_of;
using Tokens = std::vector<std::int32_t>;

const Tokens& golden_needle() {
  static const Tokens needle{5, 6, 7, 8};
  return needle;
}

/// One head of unit keys: a query looks where it is told.
struct CopyRun {
  static constexpr int kDim = 32;

  CopyRun() : keys(kDim * kDim, 0.0F) {
    for (std::size_t j = 0; j < kDim; ++j) keys[j * kDim + j] = 1.0F;
  }
  void step(std::int64_t attended, std::int32_t generated) {
    std::vector<float> q(kDim, 0.0F);
    q[static_cast<std::size_t>(attended)] = 1.0F;
    const auto rows = [](const std::vector<float>& x) {
      return TensorView<const float>::nhd(x.data(), 1, kDim);
    };
    probe.add(0, rows(q), rows(keys), position++, 1);
    probe.step({&generated, 1});
  }

  retrieval_head::Probe probe{ModelShape::uniform(1, 1, 1, kDim)};
  std::vector<float> keys;
  std::int64_t position = 20;
};

// policies-core, section 5.
TEST(RetrievalProbe, HasTheGoldenScores) {
  CopyRun run;
  run.probe.begin(Pos{10}, golden_needle());
  run.step(10, 5);
  run.step(11, 9);
  run.step(0, 7);
  run.step(13, 8);
  EXPECT_TRUE(run.probe.end());  // 5, 7 and 8 are there
  EXPECT_EQ(run.probe.mean().value(0, 0), .5);
  EXPECT_EQ(run.probe.paper_mean().value(0, 0), .5);

  run.probe.begin(Pos{10}, golden_needle());
  for (const int attended : {10, 11, 0, 13, 10, 10, 10}) {
    run.step(attended, attended == 11 ? 9 : attended == 0 ? 7 : attended == 13 ? 8 : 5);
  }
  EXPECT_TRUE(run.probe.end());
  EXPECT_EQ(run.probe.num_runs(), 2);
  EXPECT_EQ(run.probe.mean().value(0, 0), (.5 + 1.25) / 2);
  EXPECT_EQ(run.probe.paper_mean().value(0, 0), .5);
}

TEST(RetrievalProbe, CountsAnsweredRunsOnly) {
  CopyRun run;
  run.probe.begin(Pos{10}, golden_needle());
  run.step(10, 5);
  run.step(11, 6);
  EXPECT_FALSE(run.probe.end());  // half of the needle is not more than half
  EXPECT_EQ(run.probe.num_runs(), 0);
  EXPECT_EQ(run.probe.mean().value(0, 0), 0.0);
  // A run that was not ended leaves nothing.
  run.probe.begin(Pos{10}, golden_needle());
  run.step(10, 5);
  run.probe.begin(Pos{10}, golden_needle());
  run.step(11, 6);
  run.step(0, 7);
  run.step(0, 8);
  EXPECT_TRUE(run.probe.end());
  EXPECT_EQ(run.probe.mean().value(0, 0), .25);
  run.probe.begin(Pos{10}, golden_needle());
  run.step(10, 5);
  run.probe.begin(Pos{10}, golden_needle());
  run.step(11, 6);
  run.step(0, 7);
  EXPECT_FALSE(run.probe.end());

  retrieval_head::Probe all(ModelShape::uniform(1, 1, 1, 16), -1.0);
  all.begin(Pos{0}, golden_needle());
  EXPECT_TRUE(all.end());
}

TEST(RetrievalProbe, CountsALookOnce) {
  CopyRun run;
  run.probe.begin(Pos{10}, golden_needle());
  run.step(10, 5);
  run.probe.step(golden_needle());  // no layer added
  EXPECT_TRUE(run.probe.end());
  EXPECT_EQ(run.probe.mean().value(0, 0), .25);
}

TEST(RetrievalProbe, RecallsTokensAsOftenAsTheyAreThere) {
  using retrieval_head::unigram_recall;
  EXPECT_EQ(unigram_recall(Tokens{5, 5, 6, 7}, Tokens{5, 6, 6, 9}), .5);
  EXPECT_EQ(unigram_recall(Tokens{5, 5}, Tokens{1, 5, 5, 5}), 1.0);
  EXPECT_EQ(unigram_recall(Tokens{5}, Tokens{}), 0.0);
  EXPECT_THROW((void)unigram_recall(Tokens{}, Tokens{1}), ConfigError);
}

struct RandomCopies {
  static constexpr std::int64_t kTokens = 150;
  static constexpr std::int64_t kPrompt = 90;

  explicit RandomCopies(unsigned seed) : random(seed) {
    for (const LayerShape& layer : shape.layers()) {
      q.push_back(rows(layer.num_qo_heads() * layer.k_dim));
      k.push_back(rows(layer.num_kv_heads * layer.k_dim));
    }
    for (std::int64_t i = 0; i < 70; ++i) needle.push_back(static_cast<int>(random() % 3));
    for (std::int64_t i = kPrompt; i < kTokens; ++i)
      output.push_back(static_cast<int>(random() % 3));
  }
  std::vector<float> rows(std::int64_t width) {
    std::vector<float> x(static_cast<std::size_t>(kTokens * width));
    for (float& value : x) value = std::uniform_real_distribution<float>(-2.0F, 2.0F)(random);
    return x;
  }
  /// Steps of `chunk` tokens, the last one perhaps of fewer.
  retrieval_head::Probe run(std::int64_t chunk) const {
    retrieval_head::Probe probe(shape, -1.0);
    probe.begin(Pos{15}, needle);
    for (std::int64_t first = kPrompt; first < kTokens; first += chunk) {
      const std::int64_t count = std::min(chunk, kTokens - first);
      for (int l = 0; l < shape.num_layers(); ++l) {
        const LayerShape& layer = shape.layer(l);
        const auto at = static_cast<std::size_t>(l);
        const auto queries =
            TensorView<const float>::nhd(q[at].data(), layer.num_qo_heads(), layer.k_dim);
        const std::vector<float> so_far(
            k[at].begin(), k[at].begin() + (first + count) * layer.num_kv_heads * layer.k_dim);
        probe.add(l, {queries.row(first, 0), queries.stride_n, queries.stride_h},
                  TensorView<const float>::nhd(so_far.data(), layer.num_kv_heads, layer.k_dim),
                  first, count);
      }
      probe.step(std::span(output).subspan(static_cast<std::size_t>(first - kPrompt),
                                           static_cast<std::size_t>(count)));
    }
    EXPECT_TRUE(probe.end());
    return probe;
  }

  std::mt19937 random;
  ModelShape shape{{{2, 2, 16, 16}, {1, 3, 32, 16}}};
  std::vector<std::vector<float>> q;  // [layer][token, head, dim]
  std::vector<std::vector<float>> k;
  Tokens needle;
  Tokens output;
};

TEST(RetrievalProbe, IsTheDefinitionInDouble) {
  const RandomCopies model(3);
  const retrieval_head::Probe probe = model.run(1);
  for (int l = 0; l < 2; ++l) {
    const LayerShape& layer = model.shape.layer(l);
    const auto dim = static_cast<std::size_t>(layer.k_dim);
    for (int head = 0; head < layer.num_qo_heads(); ++head) {
      std::int64_t hits = 0;
      std::set<std::int64_t> copied;
      for (std::int64_t p = RandomCopies::kPrompt; p < RandomCopies::kTokens; ++p) {
        std::int64_t attended = -1;
        double most = -std::numeric_limits<double>::infinity();
        for (std::int64_t j = 0; j <= p; ++j) {
          double dot = 0.0;
          for (std::size_t d = 0; d < dim; ++d) {
            const auto query = static_cast<std::size_t>(p * layer.num_qo_heads() + head);
            const auto key =
                static_cast<std::size_t>(j * layer.num_kv_heads + head / layer.group_size);
            dot += static_cast<double>(model.q[static_cast<std::size_t>(l)][query * dim + d]) *
                   static_cast<double>(model.k[static_cast<std::size_t>(l)][key * dim + d]);
          }
          if (dot > most) {
            most = dot;
            attended = j;
          }
        }
        if (attended < 15 || attended >= 85) continue;
        if (model.needle[static_cast<std::size_t>(attended - 15)] !=
            model.output[static_cast<std::size_t>(p - RandomCopies::kPrompt)]) {
          continue;
        }
        ++hits;
        copied.insert(attended);
      }
      EXPECT_GT(hits, 0);
      EXPECT_DOUBLE_EQ(probe.mean().value(l, head), static_cast<double>(hits) / 70);
      EXPECT_DOUBLE_EQ(probe.paper_mean().value(l, head), static_cast<double>(copied.size()) / 70);
    }
  }
}

TEST(RetrievalProbe, IsTheSameForStepsOfSeveralTokens) {
  const RandomCopies model(4);
  const retrieval_head::Probe one_by_one = model.run(1);
  for (const std::int64_t chunk : {7, 60}) {
    EXPECT_EQ(model.run(chunk).mean(), one_by_one.mean()) << chunk;
  }
}

TEST(RetrievalProbe, TakesTheFirstOfEqualKeys) {
  const auto shape = ModelShape::uniform(1, 1, 1, 16);
  const std::vector<float> rows(100 * 16, 1.0F);
  const auto view = TensorView<const float>::nhd(rows.data(), 1, 16);
  retrieval_head::Probe probe(shape, -1.0);
  const Tokens needle{7};
  probe.begin(Pos{0}, needle);
  probe.add(0, view, view, 99, 1);
  probe.step(needle);
  EXPECT_TRUE(probe.end());
  EXPECT_EQ(probe.mean().value(0, 0), 1.0);
}

TEST(RetrievalProbe, RefusesWhatDoesNotGoTogether) {
  CopyRun run;
  const std::vector<std::int32_t> two{1, 2};
  EXPECT_EQ(message_of<ConfigError>([&] { run.step(1, 1); }),
            "a step outside a run: begin() comes first");
  EXPECT_THROW((void)run.probe.end(), ConfigError);
  run.probe.begin(Pos{1}, golden_needle());
  const auto view = TensorView<const float>::nhd(run.keys.data(), 1, 32);
  run.probe.add(0, view, view, 5, 1);
  EXPECT_EQ(message_of<ConfigError>([&] { run.probe.step(two); }),
            "layer 0: 1 queries, 2 tokens generated");
  EXPECT_THROW(run.probe.add(0, view, view, -1, 1), ConfigError);
  EXPECT_THROW(run.probe.begin(Pos{1}, {}), ConfigError);
  EXPECT_THROW(retrieval_head::Probe(ModelShape::uniform(1, 1, 1, 16),
                                     std::numeric_limits<double>::quiet_NaN()),
               ConfigError);
  LayerShape windowed{1, 1, 16, 16};
  windowed.sliding_window = 4;
  LayerShape sloped{1, 1, 16, 16};
  sloped.softmax.alibi_slopes = {0.5F};
  retrieval_head::Probe other(ModelShape({windowed, sloped}));
  for (const int layer : {0, 1}) EXPECT_THROW(other.add(layer, view, view, 0, 1), ConfigError);
}

}  // namespace
}  // namespace headwise
