// SPDX-License-Identifier: MIT
// Decode stays exact however long the past: the error against the double oracle does not grow.
#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

#include "headwise/attention/attend.hpp"
#include "headwise/attention/reference.hpp"
#include "support/attend_instances.hpp"

namespace headwise {
namespace {

constexpr int kLongDim = 128;

/// Relative L2 error of one decode step over `past` f16 rows of one KV head.
double decode_error(std::int64_t past, int group_size) {
  const ModelShape shape = ModelShape::uniform(1, group_size, 1, kLongDim);
  KvCache<f16> cache(shape, HeadPlan(shape), {.max_context = past + 1});
  const SequenceId id = *cache.add_sequence();

  std::mt19937 random(static_cast<std::uint32_t>(past));
  std::normal_distribution<float> normal;
  const auto rows = static_cast<std::size_t>(past + 1);
  std::vector<float> k(rows * kLongDim);
  std::vector<float> v(k.size());
  std::vector<float> q(static_cast<std::size_t>(group_size) * kLongDim);
  for (float& x : k) x = to_float(from_float<f16>(normal(random)));
  for (float& x : v) x = to_float(from_float<f16>(normal(random)));
  for (float& x : q) x = 2.0F * normal(random);  // scores of a few units: neither flat nor one-hot

  Step step;
  const auto kv = [](const std::vector<float>& x, std::int64_t token) {
    return TensorView<const float>{x.data() + token * kLongDim, kLongDim, kLongDim};
  };
  EXPECT_EQ(cache.begin(step, {{id, past}}), StepStatus::kOk);
  cache.append<simd::BestIsa>(step, step.chunks()[0], 0, 0, kv(k, 0), kv(v, 0));
  step.note_head_done(0);
  EXPECT_EQ(cache.commit(step), StepStatus::kOk);

  std::vector<float> out(q.size());
  EXPECT_EQ(cache.begin(step, {{id, 1}}), StepStatus::kOk);
  EXPECT_EQ(
      attend(cache, step, 0, TensorView<const float>::nhd(q.data(), group_size, kLongDim),
             kv(k, past), kv(v, past), TensorView<float>::nhd(out.data(), group_size, kLongDim)),
      StepStatus::kOk);
  EXPECT_EQ(cache.commit(step), StepStatus::kOk);

  const double scale = static_cast<double>(shape.layer(0).scale());
  double error = 0.0;
  double norm = 0.0;
  for (int g = 0; g < group_size; ++g) {
    std::vector<double> scores(rows);
    double top = -1e300;
    for (std::size_t j = 0; j < rows; ++j) {
      for (std::size_t d = 0; d < kLongDim; ++d) {
        scores[j] += static_cast<double>(q[static_cast<std::size_t>(g) * kLongDim + d]) *
                     static_cast<double>(k[j * kLongDim + d]);
      }
      scores[j] *= scale;
      top = std::max(top, scores[j]);
    }
    std::vector<double> expected(kLongDim);
    double sum = 0.0;
    for (std::size_t j = 0; j < rows; ++j) {
      const double p = std::exp(scores[j] - top);
      sum += p;
      for (std::size_t d = 0; d < kLongDim; ++d) {
        expected[d] += p * static_cast<double>(v[j * kLongDim + d]);
      }
    }
    for (std::size_t d = 0; d < kLongDim; ++d) {
      const double value = expected[d] / sum;
      const double difference =
          value - static_cast<double>(out[static_cast<std::size_t>(g) * kLongDim + d]);
      error += difference * difference;
      norm += value * value;
    }
  }
  return std::sqrt(error / norm);
}

/// Worst error of a prompt whose every row has the same score: an output is the mean of what is
/// seen, in the proportion that a sink logit leaves it.
double worst_error_of_means(const ModelShape& shape, const HeadBudget& budget, double sink_weight) {
  constexpr int kDim = 16;
  constexpr std::int64_t kTokens = 40'000;
  CacheOptions options{.max_context = kTokens};
  options.prefill = PrefillMode::kChunkCausal;
  KvCache<f32> cache(shape, HeadPlan(shape, budget), options);
  const SequenceId id = *cache.add_sequence();
  Step step;
  double sum = 0.0;
  double worst = 0.0;
  for (std::int64_t first = 0, chunk = 3000; first < kTokens; first += chunk) {
    chunk = std::min<std::int64_t>(first % 7 == 0 ? 5 : 3000 - first % 991, kTokens - first);
    const auto floats = static_cast<std::size_t>(chunk) * kDim;
    const std::vector<float> zeros(floats);
    std::vector<float> v(floats);
    std::vector<float> out(floats);
    for (std::size_t i = 0; i < floats; ++i) {
      v[i] = static_cast<float>((first + static_cast<std::int64_t>(i / kDim)) % 256) / 256;
    }
    const auto rows = [](const std::vector<float>& x) {
      return TensorView<const float>::nhd(x.data(), 1, kDim);
    };
    EXPECT_EQ(cache.begin(step, {{id, chunk}}), StepStatus::kOk);
    EXPECT_EQ(attend(cache, step, 0, rows(zeros), rows(zeros), rows(v),
                     TensorView<float>::nhd(out.data(), 1, kDim)),
              StepStatus::kOk);
    EXPECT_EQ(cache.commit(step), StepStatus::kOk);
    for (std::int64_t i = 0; i < chunk; ++i) {
      const auto at = static_cast<std::size_t>(i * kDim);
      sum += static_cast<double>(v[at]);
      const double expected = sum / (static_cast<double>(first + i + 1) + sink_weight);
      worst = std::max(worst, std::fabs(expected - static_cast<double>(out[at])));
    }
  }
  return worst;
}

TEST(LongContext, AHeavyCompensationRowLosesNoneOfTheLightOnes) {
  EXPECT_LE(worst_error_of_means(ModelShape::uniform(1, 1, 1, 16),
                                 KeepGrowingWindow{3, 64, 9'999'999}, 0.0),
            1e-6);
}

TEST(LongContext, AHeavySinkLosesNoneOfTheLightRows) {
  LayerShape layer{1, 1, 16, 16};
  layer.softmax.sinks = {12.0F};
  EXPECT_LE(worst_error_of_means(ModelShape({layer}), KeepEverything{}, std::exp(12.0)), 1e-6);
}

TEST(LongContext, DecodeErrorDoesNotGrow) {
  for (const std::int64_t past : {4096, 16384, 65536, 131072}) {
    EXPECT_LE(decode_error(past, 4), 1e-5) << "context " << past;
  }
}

TEST(LongContext, GroupsOfOneAndEightAreAsExact) {
  EXPECT_LE(decode_error(131072, 1), 1e-5);
  EXPECT_LE(decode_error(65536, 8), 1e-5);
}

}  // namespace
}  // namespace headwise
