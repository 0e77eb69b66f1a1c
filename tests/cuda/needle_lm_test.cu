// SPDX-License-Identifier: MIT
// The demo's way to a device against the CPU cache: same plan, same rows, same outputs.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "../../examples/needle_lm/cuda_cache.hpp"
#include "cuda/device_model.cuh"
#include "headwise/attention/attend.hpp"

namespace headwise::test {
namespace {

TEST(CudaNeedleLm, GivesWhatTheCpuGives) {
  HEADWISE_NEEDS_DEVICE();
  constexpr int kDim = 32;
  const ModelShape shape = ModelShape::uniform(2, 8, 4, kDim);
  HeadPlan plan(shape);
  for (int l = 0; l < 2; ++l) plan.set(l, l + 1, KeepWindow{{4, 60}});
  const CacheOptions options{.max_context = 600};
  KvCache<f16> cpu(shape, plan, options);
  needle_lm::CudaCache<f16> device(shape, plan, options);
  const SequenceId id = *cpu.add_sequence();
  const SequenceId device_id = *device.add_sequence();
  Step cpu_step;
  Step device_step;
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (const std::int64_t n : {300, 1, 1, 37, 1}) {
    const SequenceChunk chunk{device_id, n};
    ASSERT_EQ(cpu.begin(cpu_step, {{id, n}}), StepStatus::kOk);
    ASSERT_EQ(device.begin(device_step, {&chunk, 1}), StepStatus::kOk);
    for (int l = 0; l < 2; ++l) {
      std::vector<float> q(static_cast<std::size_t>(n * 8 * kDim));
      std::vector<float> k(q.size() / 2), v(q.size() / 2), a(q.size()), b(q.size());
      for (std::vector<float>* rows : {&q, &k, &v}) {
        for (float& x : *rows) x = normal(random);
      }
      const auto view = [](const std::vector<float>& x, int heads) {
        return TensorView<const float>::nhd(x.data(), heads, kDim);
      };
      (void)attend(cpu, cpu_step, l, view(q, 8), view(k, 4), view(v, 4),
                   TensorView<float>::nhd(a.data(), 8, kDim));
      device.attend(device_step, l, view(q, 8), view(k, 4), view(v, 4),
                    TensorView<float>::nhd(b.data(), 8, kDim));
      double error = 0.0;
      double norm = 0.0;
      for (std::size_t i = 0; i < a.size(); ++i) {
        error += std::pow(static_cast<double>(a[i]) - static_cast<double>(b[i]), 2);
        norm += std::pow(static_cast<double>(a[i]), 2);
      }
      EXPECT_LE(std::sqrt(error / norm), 2e-3) << n << " tokens, layer " << l;
    }
    ASSERT_EQ(cpu.commit(cpu_step), StepStatus::kOk);
    ASSERT_EQ(device.commit(device_step), StepStatus::kOk);
    EXPECT_EQ(cpu.held_bytes(id), device.held_bytes(device_id));
  }
}

}  // namespace
}  // namespace headwise::test
