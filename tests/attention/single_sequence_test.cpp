// SPDX-License-Identifier: MIT
#include "headwise/attention/single_sequence.hpp"

#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "support/attend_instances.hpp"

namespace headwise {
namespace {

constexpr int kSingleHeads = 2;
constexpr int kSingleDim = 32;

/// Token `t` of any head: its key and value point in its own direction.
std::vector<float> rows(std::int64_t first, std::int64_t count) {
  std::vector<float> data;
  for (std::int64_t t = first; t < first + count; ++t) {
    for (int i = 0; i < kSingleHeads * kSingleDim; ++i) {
      data.push_back(static_cast<float>((t * 31 + i * 7) % 23) * 0.1F - 1.0F);
    }
  }
  return data;
}

TEST(SingleSequence, IsTheCacheInTwoLines) {
  const ModelShape shape = ModelShape::uniform(1, kSingleHeads, kSingleHeads, kSingleDim);
  HeadPlan plan(shape);
  plan.set(0, 1, KeepWindow{{2, 30}});
  const CacheOptions options{.max_context = 400, .max_rollback = 4};

  SingleSequence<f32> face(shape, plan, options);
  KvCache<f32> cache(shape, plan, options);
  const SequenceId id = *cache.add_sequence();
  Step step;
  for (const std::int64_t tokens : {150, 1, 1, 3, 100, 1}) {
    const std::int64_t length = face.length();
    const std::vector<float> x = rows(length, tokens);
    std::vector<float> expected(x.size());
    std::vector<float> out(x.size());
    const auto in = TensorView<const float>::nhd(x.data(), kSingleHeads, kSingleDim);

    ASSERT_EQ(face.begin(tokens), StepStatus::kOk);
    ASSERT_EQ(
        face.attend(0, in, in, in, TensorView<float>::nhd(out.data(), kSingleHeads, kSingleDim)),
        StepStatus::kOk);
    ASSERT_EQ(face.commit(), StepStatus::kOk);

    ASSERT_EQ(cache.begin(step, {{id, tokens}}), StepStatus::kOk);
    ASSERT_EQ(attend(cache, step, 0, in, in, in,
                     TensorView<float>::nhd(expected.data(), kSingleHeads, kSingleDim)),
              StepStatus::kOk);
    ASSERT_EQ(cache.commit(step), StepStatus::kOk);
    EXPECT_EQ(out, expected);
  }
  EXPECT_EQ(face.length(), 256);
  EXPECT_EQ(face.rollback(252), StepStatus::kOk);
  EXPECT_EQ(face.length(), 252);
  EXPECT_EQ(face.rollback(251), StepStatus::kTooFarBack);
}

TEST(SingleSequence, RefusesMoreThanOne) {
  const ModelShape shape = ModelShape::uniform(1, kSingleHeads, kSingleHeads, kSingleDim);
  EXPECT_THROW(SingleSequence<f32>(shape, HeadPlan(shape), {.max_sequences = 2, .max_context = 8}),
               ConfigError);
}

}  // namespace
}  // namespace headwise
