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
