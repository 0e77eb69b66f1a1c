// SPDX-License-Identifier: MIT
// Contexts and pools beyond 32 bits' comfort.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <random>
#include <vector>

#include "cuda/device_model.cuh"

namespace headwise::test {
namespace {

constexpr int kLongDim = 128;

/// Rows that repeat after a prime number of tokens: cheap to make, and no page looks like another.
struct LongRows {
  static constexpr std::int64_t kPeriod = 4093;
  std::vector<float> values;
  std::vector<f16> bits;

  LongRows(std::int64_t count, std::int64_t width, unsigned seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    for (std::int64_t i = 0; i < std::min(kPeriod, count) * width; ++i) {
      bits.push_back(from_float<f16>(normal(random)));
      values.push_back(to_float(bits.back()));
    }
    for (std::int64_t i = kPeriod * width; i < count * width; ++i) {
      bits.push_back(bits[static_cast<std::size_t>(i - kPeriod * width)]);
    }
  }
  cuda::DeviceMemory upload() const {
    cuda::DeviceMemory memory(bits.size() * sizeof(f16));
    cuda::require(
        cudaMemcpy(memory.data(), bits.data(), memory.num_bytes(), cudaMemcpyHostToDevice),
        "cudaMemcpy");
    return memory;
  }
};

/// Appends `length` tokens to a sequence of two heads, the second streaming, decodes one more and
/// checks its output.
void check_long(cuda::DeviceCache<f16>& cache, std::int64_t length) {
  constexpr int kHeads = 2;
  cuda::DeviceAttention<f16> attention(cache);
  const LongRows k(length + 1, kHeads * kLongDim, 1);
  const LongRows v(length + 1, kHeads * kLongDim, 2);
  const LongRows q(1, 2 * kHeads * kLongDim, 3);
  const cuda::DeviceMemory device_k = k.upload();
  const cuda::DeviceMemory device_v = v.upload();
  const cuda::DeviceMemory device_q = q.upload();
  const cuda::DeviceMemory device_out(2 * kHeads * kLongDim * sizeof(f16));
  const auto rows = [](const cuda::DeviceMemory& memory, std::int64_t first) {
    return TensorView<const f16>::nhd(
        reinterpret_cast<const f16*>(memory.data()) + first * kHeads * kLongDim, kHeads, kLongDim);
  };
  const SequenceId id = *cache.add_sequence();
  Step step;
  ASSERT_EQ(cache.begin(step, {{id, length}}, nullptr), StepStatus::kOk);
  ASSERT_EQ(
      attention.launches().append(cache.place().step(), 0, rows(device_k, 0), rows(device_v, 0),
                                  cache.place().most_rows_stored(), 1, nullptr),
      cudaSuccess);
  ASSERT_EQ(cuda::commit_replayed<f16>(cache, step), StepStatus::kOk);
  ASSERT_EQ(cache.begin(step, {{id, 1, Phase::kDecode}}, nullptr), StepStatus::kOk);
  ASSERT_EQ(attention.plan_work(nullptr), StepStatus::kOk);
  ASSERT_EQ(
      attention.attend(
          step, 0,
          TensorView<const f16>::nhd(reinterpret_cast<const f16*>(device_q.data()), 2 * kHeads,
                                     kLongDim),
          rows(device_k, length), rows(device_v, length),
          TensorView<f16>::nhd(reinterpret_cast<f16*>(device_out.data()), 2 * kHeads, kLongDim),
          nullptr),
      StepStatus::kOk);
  std::vector<f16> out(2 * kHeads * kLongDim);
  ASSERT_EQ(
      cudaMemcpy(out.data(), device_out.data(), out.size() * sizeof(f16), cudaMemcpyDeviceToHost),
      cudaSuccess);
  for (int head = 0; head < 2 * kHeads; ++head) {
    const bool streams = head >= 2;
    std::vector<float> seen_k, seen_v;
    for (std::int64_t j = 0; j <= length; ++j) {
      if (streams && !(j < 64 || length - j < 256)) continue;
      const std::int64_t at = (j % LongRows::kPeriod * kHeads + head / 2) * kLongDim;
      seen_k.insert(seen_k.end(), k.values.begin() + at, k.values.begin() + at + kLongDim);
      seen_v.insert(seen_v.end(), v.values.begin() + at, v.values.begin() + at + kLongDim);
    }
    const std::vector<double> truth =
        oracle_row(q.values.data() + head * kLongDim, seen_k.data(), seen_v.data(),
                   static_cast<std::int64_t>(seen_k.size()) / kLongDim, kLongDim, kLongDim,
                   1.0 / std::sqrt(kLongDim), [](std::int64_t) { return true; });
    double error = 0.0;
    double norm = 0.0;
    for (int d = 0; d < kLongDim; ++d) {
      const double x =
          static_cast<double>(to_float(out[static_cast<std::size_t>(head * kLongDim + d)]));
      error += std::pow(x - truth[static_cast<std::size_t>(d)], 2);
      norm += std::pow(truth[static_cast<std::size_t>(d)], 2);
    }
    EXPECT_LE(std::sqrt(error / norm), 2e-3) << "head " << head;  // outputs near 0: many rows
  }
}

HeadPlan half_streaming(const ModelShape& shape) {
  HeadPlan plan(shape);
  plan.set(0, 1, KeepWindow{{64, 256}});
  return plan;
}

TEST(CudaLong, DecodesAContextOf512k) {
  HEADWISE_NEEDS_DEVICE();
  constexpr std::int64_t kLength = 512 * 1024 - 1;
  const ModelShape shape = ModelShape::uniform(1, 4, 2, kLongDim);
  cuda::DeviceCache<f16> cache(shape, half_streaming(shape), {.max_context = kLength + 1});
  check_long(cache, kLength);
}

TEST(CudaLong, AddressesMoreThan2To31Elements) {
  HEADWISE_NEEDS_DEVICE();
  constexpr std::int64_t kElements = (std::int64_t{1} << 31) + (std::int64_t{1} << 26);
  constexpr std::int64_t kFiller = kElements / (2 * kLongDim);  // tokens of one head
  const ModelShape shape = ModelShape::uniform(1, 4, 2, kLongDim);
  cuda::DeviceCache<f16> cache(shape, half_streaming(shape),
                               {.max_bytes = (kElements + (std::int64_t{1} << 24)) * 2,
                                .max_sequences = 2,
                                .max_context = kFiller});
  Step step;
  const SequenceId filler = *cache.add_sequence();  // its rows are never read
  ASSERT_EQ(cache.begin(step, {{filler, kFiller - 6400}}, nullptr), StepStatus::kOk);
  ASSERT_EQ(cuda::commit_replayed<f16>(cache, step), StepStatus::kOk);
  check_long(cache, 5000);
}

}  // namespace
}  // namespace headwise::test
