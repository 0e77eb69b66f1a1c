// SPDX-License-Identifier: MIT
// The compensation row against raw rows: a million of them, so that a sum in float would show.
#include <gtest/gtest.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

#include "headwise/cache/kv_cache.hpp"
#include "headwise/simd/simd.hpp"
#include "support/isa_types.hpp"

namespace headwise {
namespace {

constexpr int kDim = 16;
constexpr std::int64_t kTokens = 1'000'000;

template <class Format>
class CompensationOf : public ::testing::Test {
 protected:
  CompensationOf()
      : cache_(ModelShape::uniform(1, 1, 1, kDim),
               HeadPlan(ModelShape::uniform(1, 1, 1, kDim), KeepGrowingWindow{4, 100, 1000}),
               {.max_context = kTokens, .prefill = PrefillMode::kChunkCausal}),
        sequence_(*cache_.add_sequence()) {}

  /// Appends k(pos, d) and v(pos, d) and compares the row's means with those of what was stored.
  template <class K, class V>
  void expect_means(K&& k_of, V&& v_of) {
    constexpr std::int64_t kChunk = 4000;
    std::vector<float> k(std::size_t{kChunk} * kDim), v(k.size()), stored_k(kDim), stored_v(kDim);
    std::vector<double> k_sum(kDim), v_sum(kDim);
    std::int64_t summed = 4;  // the sinks are not folded
    std::vector<float> all_k, all_v;
    for (std::int64_t pos = 0; pos < kTokens; pos += kChunk) {
      for (std::int64_t i = 0; i < kChunk; ++i) {
        for (int d = 0; d < kDim; ++d) {
          k[static_cast<std::size_t>(i * kDim + d)] = k_of(pos + i, d);
          v[static_cast<std::size_t>(i * kDim + d)] = v_of(pos + i, d);
        }
      }
      all_k.insert(all_k.end(), k.begin(), k.end());
      all_v.insert(all_v.end(), v.begin(), v.end());
      ASSERT_EQ(cache_.begin(step_, {{sequence_, kChunk}}), StepStatus::kOk);
      cache_.template append<simd::BestIsa>(step_, step_.chunks()[0], 0, 0,
                                            TensorView<const float>::nhd(k.data(), 1, kDim),
                                            TensorView<const float>::nhd(v.data(), 1, kDim));
      step_.note_head_done(0);
      ASSERT_EQ(cache_.commit(step_), StepStatus::kOk);
    }
    ASSERT_EQ(cache_.begin(step_, {{sequence_, 0}}), StepStatus::kOk);
    const auto view = cache_.seen(step_.chunks()[0], 0, 0).view;
    const CompensationRow& row = view.compensation;
    ASSERT_GT(row.count, 990'000);
    for (; summed < 4 + row.count; ++summed) {
      const auto at = static_cast<std::size_t>(summed * kDim);
      Format::round_row({.k_dim = kDim, .v_dim = kDim}, &all_k[at], &all_v[at], stored_k.data(),
                        stored_v.data());
      for (std::size_t d = 0; d < kDim; ++d) k_sum[d] += static_cast<double>(stored_k[d]);
      for (std::size_t d = 0; d < kDim; ++d) v_sum[d] += static_cast<double>(stored_v[d]);
    }
    for (std::size_t d = 0; d < kDim; ++d) {
      const auto count = static_cast<double>(row.count);
      EXPECT_NEAR(static_cast<double>(row.k_mean[d]), k_sum[d] / count, 1e-7);
      EXPECT_NEAR(static_cast<double>(row.v_mean[d]), v_sum[d] / count, 1e-7);
    }
  }

  KvCache<Format> cache_;
  SequenceId sequence_;
  Step step_;
};
using CompensatedFormats = ::testing::Types<TiledRows<f32>, PlainRows<bf16>, Int8Rows>;
TYPED_TEST_SUITE(CompensationOf, CompensatedFormats, test::FormatNames);

TYPED_TEST(CompensationOf, AMillionEqualRowsIsThatRow) {
  this->expect_means([](std::int64_t, int) { return 0.1F; },
                     [](std::int64_t, int d) { return d == 0 ? 0.1F : 0.3F; });
}

TYPED_TEST(CompensationOf, AMillionUnlikeRowsIsTheirMean) {
  std::mt19937 random(9);
  std::uniform_real_distribution<float> uniform(-0.5F, 1.0F);
  this->expect_means([&](std::int64_t, int) { return uniform(random); },
                     [&](std::int64_t, int) { return uniform(random); });
}

}  // namespace
}  // namespace headwise
