// SPDX-License-Identifier: MIT
// What a cache and its attention take on a device is known before there is one.
#include <gtest/gtest.h>

#include "cuda/device_model.cuh"
#include "headwise/attention/cuda/estimate.cuh"

namespace headwise::test {
namespace {

const ModelShape kShape = ModelShape::uniform(32, 32, 8, 128);

HeadPlan half_streams() {
  HeadPlan plan(kShape);
  for (int l = 0; l < 32; ++l) {
    for (int h = 4; h < 8; ++h) plan.set(l, h, KeepWindow{{64, 256}});
  }
  return plan;
}

cuda::DeviceLimits h100() {
  cuda::DeviceLimits limits;
  limits.num_sms = 132;
  limits.smem_per_block = 227 * 1024;
  return limits;
}

TEST(CudaEstimate, NeedsNoDeviceAndNamesThePoolsBytes) {
  const CacheOptions options{.max_sequences = 4, .max_context = 16384};
  const auto all = cuda::estimate_device<f16>(kShape, HeadPlan(kShape), options, h100());
  EXPECT_EQ(all.page_bytes, std::size_t{4} * 32 * 8 * 256 * (64 * 128 * 2 * 2));
  const auto half = cuda::estimate_device<f16>(kShape, half_streams(), options, h100());
  EXPECT_LT(half.page_bytes, all.page_bytes * 6 / 10);
  EXPECT_GT(half.scratch_bytes, 0U);
  EXPECT_GT(half.pinned_bytes, 0U);
  EXPECT_EQ(half.device_bytes(), half.page_bytes + half.cache_bytes + half.scratch_bytes);
}

TEST(CudaEstimate, InversesAreTheLargestThatFit) {
  constexpr std::size_t kBytes = std::size_t{24} << 30;
  const HeadPlan plan = half_streams();
  const auto bytes = [&](const CacheOptions& options) {
    return cuda::estimate_device<f16>(kShape, plan, options, h100()).device_bytes();
  };
  CacheOptions options{.max_sequences = 4, .max_context = 16384, .max_chunk = 2048};
  options.max_context = cuda::longest_context<f16>(kShape, plan, options, h100(), kBytes);
  EXPECT_GT(options.max_context, 80'000);
  EXPECT_LE(bytes(options), kBytes);
  ++options.max_context;
  EXPECT_GT(bytes(options), kBytes);

  options.max_context = 16384;
  options.max_sequences =
      static_cast<int>(cuda::most_sequences<f16>(kShape, plan, options, h100(), kBytes));
  EXPECT_GT(options.max_sequences, 16);
  EXPECT_LE(bytes(options), kBytes);
  ++options.max_sequences;
  EXPECT_GT(bytes(options), kBytes);

  EXPECT_EQ(cuda::longest_context<f16>(kShape, plan, options, h100(), 1000), 0);
  options.page_tokens = 32;
  EXPECT_THROW((void)cuda::longest_context<f16>(kShape, plan, options, h100(), kBytes),
               ConfigError);
}

TEST(CudaEstimate, TenMillionTokensOf64SequencesCostNoGigabytesOfTables) {
  const CacheOptions options{.max_bytes = std::size_t{16} << 30,
                             .max_sequences = 64,
                             .max_context = 10'000'000,
                             .max_chunk = 8192};
  const auto bytes = cuda::estimate_device<f16>(kShape, half_streams(), options, h100());
  EXPECT_LT(bytes.cache_bytes, std::size_t{512} << 20);
  EXPECT_LT(bytes.pinned_bytes, std::size_t{64} << 20);
}

TEST(CudaEstimate, IsWhatIsAllocated) {
  HEADWISE_NEEDS_DEVICE();
  const CacheOptions options{.max_sequences = 3, .max_context = 1000};
  const auto planned =
      cuda::estimate_device<f16>(kShape, half_streams(), options, cuda::DeviceLimits::current());
  std::size_t before = 0, after = 0, total = 0;
  ASSERT_EQ(cudaMemGetInfo(&before, &total), cudaSuccess);
  cuda::DeviceCache<f16> cache(kShape, half_streams(), options);
  const cuda::DeviceAttention<f16> attention(cache);
  ASSERT_EQ(cudaMemGetInfo(&after, &total), cudaSuccess);
  EXPECT_EQ(attention.device_bytes(), planned.scratch_bytes);
  // cudaMalloc hands out pieces of 2 MiB; modules that load meanwhile take some, too.
  EXPECT_GE(before - after + (std::size_t{2} << 20), planned.device_bytes());
  EXPECT_LE(before - after, planned.device_bytes() + (std::size_t{64} << 20));
}

}  // namespace
}  // namespace headwise::test
