// SPDX-License-Identifier: MIT
#include "headwise/cache/estimate.hpp"

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <memory_resource>

#include "headwise/cache/kv_cache.hpp"

namespace headwise {
namespace {

/// Counts what is asked of it.
class CountingResource : public std::pmr::memory_resource {
 public:
  std::size_t bytes = 0;
  int requests = 0;

 private:
  void* do_allocate(std::size_t size, std::size_t alignment) override {
    bytes += size;
    ++requests;
    return std::pmr::new_delete_resource()->allocate(size, alignment);
  }
  void do_deallocate(void* memory, std::size_t size, std::size_t alignment) override {
    std::pmr::new_delete_resource()->deallocate(memory, size, alignment);
  }
  bool do_is_equal(const memory_resource& other) const noexcept override { return this == &other; }
};

/// Half of the heads of two unlike layers stream.
struct Model {
  ModelShape shape{{{4, 2, 64, 64}, {2, 4, 128, 96}}};
  HeadPlan plan{shape};
  CacheOptions options{.max_sequences = 3, .max_context = 5000, .max_rollback = 8};

  Model() {
    for (const int head : {0, 3}) plan.set(0, head, KeepWindow{{4, 60}});
    plan.set(1, 1, KeepWindow{{16, 64}});
  }
};

TEST(Estimate, EqualsWhatTheAllocatorIsAskedForOnce) {
  Model model;
  CountingResource counted;
  model.options.resource = &counted;
  for (const std::size_t max_bytes : {std::size_t{0}, std::size_t{9} << 20}) {
    counted.bytes = 0;
    counted.requests = 0;
    model.options.max_bytes = max_bytes;
    const Estimate expected = estimate<f16>(model.shape, model.plan, model.options, 512);
    const KvCache<f16> cache(model.shape, model.plan, model.options);
    EXPECT_EQ(counted.bytes, expected.pool_bytes + expected.metadata_bytes);
    EXPECT_EQ(counted.requests, 2) << "pages and metadata, one allocation each";
  }
}

TEST(Estimate, CallersPageMemoryIsNotAskedFor) {
  Model model;
  alignas(64) static std::byte memory[4 << 20];
  CountingResource counted;
  model.options.resource = &counted;
  model.options.max_bytes = sizeof memory;
  model.options.page_memory = memory;
  const Estimate expected = estimate<f16>(model.shape, model.plan, model.options, 512);
  const KvCache<f16> cache(model.shape, model.plan, model.options);
  EXPECT_EQ(expected.pool_bytes, 0U);
  EXPECT_EQ(counted.bytes, expected.metadata_bytes);
}

TEST(Estimate, ResidentBytesAreTheClosedForm) {
  const Model model;
  const Estimate e = estimate<f16>(model.shape, model.plan, model.options, 512);
  // The widest layer: 64 rows of 128 + 96 elements of two bytes.
  EXPECT_EQ(e.page_bytes, 64U * 224 * 2);
  // ceil(5000 / 64) = 79 pages for each of 3 retrieval heads; rings of
  // round_up(4 + 60 + 8) = 2 and round_up(16 + 64 + 8) = 2 pages.
  EXPECT_EQ(e.resident_bytes, 3U * (3 * 79 + 2 * 2 + 2) * e.page_bytes);
  // A second ring for each streaming head while a chunk is open.
  EXPECT_EQ(e.transient_bytes, 3U * (2 * 2 + 2) * e.page_bytes);
  EXPECT_EQ(e.dense_bytes, 3U * 6 * 79 * e.page_bytes);
  EXPECT_EQ(e.pool_bytes, e.resident_bytes + e.transient_bytes);
  EXPECT_TRUE(e.gains());
}

TEST(Estimate, BytesOfASequenceFollowItsLength) {
  const Model model;
  const auto pages = [&](std::int64_t length) {
    return sequence_bytes<f16>(model.shape, model.plan, model.options, length) / (64 * 224 * 2);
  };
  EXPECT_EQ(pages(0), 0U);
  EXPECT_EQ(pages(1), 6U) << "a page a head";
  EXPECT_EQ(pages(64), 6U);
  EXPECT_EQ(pages(65), 12U);
  EXPECT_EQ(pages(129), 3U * 3 + 3 * 2) << "rings have all they will ever hold";
  EXPECT_EQ(pages(5000), 3U * 79 + 3 * 2);
}

TEST(Estimate, SaysNoGainWhereWindowsAreNoSmallerThanTheContext) {
  Model model;
  model.options.max_context = 128;
  const Estimate e = estimate<f16>(model.shape, model.plan, model.options, 128);
  EXPECT_FALSE(e.gains());
}

TEST(Estimate, InversesAreTheLargestThatFit) {
  Model model;
  constexpr std::size_t kBytes = std::size_t{64} << 20;
  const auto beside = [](const CacheOptions& options) {  // some engine's own, 8 bytes a token
    return static_cast<std::size_t>(options.max_context * options.max_sequences) * 8;
  };
  const auto total = [&](const CacheOptions& options) {
    CacheOptions sized = options;
    const Estimate whole = estimate<f16>(model.shape, model.plan, options, 256);
    sized.max_bytes = whole.resident_bytes + whole.transient_bytes;
    return estimate<f16>(model.shape, model.plan, sized, 256).total_bytes();
  };

  CacheOptions options = model.options;
  options.max_context = longest_context<f16>(model.shape, model.plan, options, 256, kBytes);
  EXPECT_GT(options.max_context, 5000);
  EXPECT_LE(total(options), kBytes);
  ++options.max_context;
  EXPECT_GT(total(options), kBytes);

  options.max_context = longest_context<f16>(model.shape, model.plan, options, 256, kBytes, beside);
  EXPECT_LE(total(options) + beside(options), kBytes);
  ++options.max_context;
  EXPECT_GT(total(options) + beside(options), kBytes);

  options = model.options;
  options.max_sequences =
      static_cast<int>(most_sequences<f16>(model.shape, model.plan, options, 256, kBytes, beside));
  EXPECT_GT(options.max_sequences, 1);
  EXPECT_LE(total(options) + beside(options), kBytes);
  ++options.max_sequences;
  EXPECT_GT(total(options) + beside(options), kBytes);

  EXPECT_EQ(longest_context<f16>(model.shape, model.plan, model.options, 256, 1000), 0);
}

TEST(Estimate, StreamingHeadsLengthenTheContextThatFits) {
  const Model model;
  const HeadPlan dense(model.shape);
  constexpr std::size_t kBytes = std::size_t{256} << 20;
  EXPECT_GT(longest_context<f16>(model.shape, model.plan, model.options, 256, kBytes),
            longest_context<f16>(model.shape, dense, model.options, 256, kBytes) * 19 / 10);
}

TEST(Estimate, RefusesWhatMakesNoSense) {
  const Model model;
  EXPECT_THROW((void)estimate<f16>(model.shape, model.plan, model.options, 0), ConfigError);
}

}  // namespace
}  // namespace headwise
