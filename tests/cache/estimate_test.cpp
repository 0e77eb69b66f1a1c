// SPDX-License-Identifier: MIT
#include "headwise/cache/estimate.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory_resource>
#include <vector>

#include "headwise/cache/kv_cache.hpp"
#include "headwise/core/rounding.hpp"
#include "headwise/heads/shard.hpp"

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
struct SizedModel {
  ModelShape shape{{{4, 2, 64, 64}, {2, 4, 128, 96}}};
  HeadPlan plan{shape};
  CacheOptions options{
      .max_sequences = 3, .max_context = 5000, .max_chunk = 512, .max_rollback = 8};

  SizedModel() {
    for (const int head : {0, 3}) plan.set(0, head, KeepWindow{{4, 60}});
    plan.set(1, 1, KeepWindow{{16, 64}});
  }
};

/// Bytes of a page of either layer: 64 rows of K and V of two bytes an element.
constexpr std::size_t kFirst = std::size_t{64} * (64 + 64) * 2;
constexpr std::size_t kSecond = std::size_t{64} * (128 + 96) * 2;

TEST(Estimate, EqualsWhatTheAllocatorIsAskedForOnce) {
  SizedModel model;
  CountingResource counted;
  model.options.resource = &counted;
  for (const std::size_t max_bytes : {std::size_t{0}, std::size_t{9} << 20}) {
    counted.bytes = 0;
    counted.requests = 0;
    model.options.max_bytes = max_bytes;
    const Estimate expected = estimate<f16>(model.shape, model.plan, model.options);
    const KvCache<f16> cache(model.shape, model.plan, model.options);
    EXPECT_EQ(counted.bytes, expected.pool_bytes + expected.metadata_bytes);
    EXPECT_EQ(counted.requests, 2) << "pages and metadata, one allocation each";
  }
}

TEST(Estimate, CallersPageMemoryIsNotAskedFor) {
  SizedModel model;
  alignas(64) static std::byte memory[4 << 20];
  CountingResource counted;
  model.options.resource = &counted;
  model.options.max_bytes = sizeof memory;
  model.options.page_memory = memory;
  const Estimate expected = estimate<f16>(model.shape, model.plan, model.options);
  const KvCache<f16> cache(model.shape, model.plan, model.options);
  EXPECT_EQ(expected.pool_bytes, 0U);
  EXPECT_EQ(counted.bytes, expected.metadata_bytes);
}

TEST(Estimate, ResidentBytesAreTheClosedForm) {
  const SizedModel model;
  const Estimate e = estimate<f16>(model.shape, model.plan, model.options);
  // ceil(5000 / 64) = 79 pages for each of 3 retrieval heads, 2 of them in the first layer; rings
  // of round_up(4 + 60 + 8) = 2 and round_up(16 + 64 + 8) = 2 pages.
  EXPECT_EQ(e.resident_bytes, 3U * ((2 * 79 + 2 * 2) * kFirst + (79 + 2) * kSecond));
  // A second ring for each streaming head while a chunk is open.
  EXPECT_EQ(e.transient_bytes, 3U * (2 * 2 * kFirst + 2 * kSecond));
  EXPECT_EQ(e.dense_bytes, 3U * 79 * (4 * kFirst + 2 * kSecond));
  // Whole slabs of 16 of the larger pages, for pages of either size.
  EXPECT_GE(e.pool_bytes, e.resident_bytes + e.transient_bytes);
  EXPECT_LE(e.pool_bytes, (e.resident_bytes + e.transient_bytes) * 17 / 16 + 2 * 16 * kSecond);
  EXPECT_TRUE(e.gains());
}

TEST(Estimate, BytesOfASequenceFollowItsLength) {
  const SizedModel model;
  const auto bytes = [&](std::int64_t length) {
    return sequence_bytes<f16>(model.shape, model.plan, model.options, length);
  };
  EXPECT_EQ(bytes(0), 0U);
  EXPECT_EQ(bytes(1), 4 * kFirst + 2 * kSecond) << "a page a head";
  EXPECT_EQ(bytes(64), 4 * kFirst + 2 * kSecond);
  EXPECT_EQ(bytes(65), 8 * kFirst + 4 * kSecond);
  EXPECT_EQ(bytes(129), (2 * 3 + 2 * 2) * kFirst + (3 + 2) * kSecond)
      << "rings have all they will ever hold";
  EXPECT_EQ(bytes(5000), (2 * 79 + 2 * 2) * kFirst + (79 + 2) * kSecond);
}

TEST(Estimate, BytesOfHeadsAreThoseOfTheSequenceAndShardEvenly) {
  const SizedModel model;
  const auto bytes = head_bytes<f16>(model.shape, model.plan, model.options, 5000);
  const auto first = static_cast<std::int64_t>(kFirst);
  const auto second = static_cast<std::int64_t>(kSecond);
  EXPECT_EQ(bytes, (std::vector<std::int64_t>{2 * first, 79 * first, 79 * first, 2 * first,
                                              79 * second, 2 * second}));
  const Sharding parts = shard(model.plan, 2, bytes);
  std::size_t sum = 0;
  for (int rank = 0; rank < 2; ++rank) {
    const std::size_t held = sequence_bytes<f16>(parts.shape(model.shape, rank),
                                                 parts.plan(model.plan, rank), model.options, 5000);
    EXPECT_EQ(held, static_cast<std::size_t>(parts.costs()[static_cast<std::size_t>(rank)]));
    sum += held;
  }
  EXPECT_EQ(sum, sequence_bytes<f16>(model.shape, model.plan, model.options, 5000));
  EXPECT_THROW((void)head_bytes<f16>(model.shape, model.plan, model.options, 5001), ConfigError);
}

TEST(Estimate, SaysNoGainWhereWindowsAreNoSmallerThanTheContext) {
  SizedModel model;
  model.options.max_context = 128;
  const Estimate e = estimate<f16>(model.shape, model.plan, model.options);
  EXPECT_FALSE(e.gains());
}

TEST(Estimate, InversesAreTheLargestThatFit) {
  SizedModel model;
  constexpr std::size_t kBytes = std::size_t{64} << 20;
  const auto beside = [](const CacheOptions& options) {  // some engine's own, 8 bytes a token
    return static_cast<std::size_t>(options.max_context * options.max_sequences) * 8;
  };
  const auto total = [&](const CacheOptions& options) {
    return estimate<f16>(model.shape, model.plan, options).total_bytes();
  };

  CacheOptions options = model.options;
  options.max_context = longest_context<f16>(model.shape, model.plan, options, kBytes);
  EXPECT_GT(options.max_context, 5000);
  EXPECT_LE(total(options), kBytes);
  ++options.max_context;
  EXPECT_GT(total(options), kBytes);

  options.max_context = longest_context<f16>(model.shape, model.plan, options, kBytes, beside);
  EXPECT_LE(total(options) + beside(options), kBytes);
  ++options.max_context;
  EXPECT_GT(total(options) + beside(options), kBytes);

  options = model.options;
  options.max_sequences =
      static_cast<int>(most_sequences<f16>(model.shape, model.plan, options, kBytes, beside));
  EXPECT_GT(options.max_sequences, 1);
  EXPECT_LE(total(options) + beside(options), kBytes);
  ++options.max_sequences;
  EXPECT_GT(total(options) + beside(options), kBytes);

  EXPECT_EQ(longest_context<f16>(model.shape, model.plan, model.options, 1000), 0);
}

TEST(Estimate, StreamingHeadsLengthenTheContextThatFits) {
  const SizedModel model;
  const HeadPlan dense(model.shape);
  constexpr std::size_t kBytes = std::size_t{256} << 20;
  EXPECT_GT(longest_context<f16>(model.shape, model.plan, model.options, kBytes),
            longest_context<f16>(model.shape, dense, model.options, kBytes) * 19 / 10);
}

TEST(Estimate, AnEngineOfOneTokenStepsPaysForNoSecondRing) {
  // 64 + 256 tokens are 5 pages of 64 x 128 x 2 x 2 bytes; 32 layers of 8 heads.
  const ModelShape shape = ModelShape::uniform(32, 32, 8, 128);
  const HeadPlan streams(shape, KeepWindow{{64, 256}});
  CacheOptions options{.max_context = 131072};
  constexpr std::size_t kRings = std::size_t{32} * 8 * 5 * 32768;
  const Estimate any = estimate<f16>(shape, streams, options);
  EXPECT_EQ(any.pool_bytes, 2 * kRings);
  EXPECT_EQ(any.transient_bytes, kRings);
  options.max_chunk = 1;
  const Estimate one = estimate<f16>(shape, streams, options);
  EXPECT_EQ(one.pool_bytes, kRings);
  EXPECT_EQ(one.transient_bytes, 0U);
  KvCache<f16> cache(shape, streams, options);  // and such an engine runs in it
  const SequenceId id = *cache.add_sequence();
  Step step;
  EXPECT_EQ(cache.begin(step, {{id, 1}}), StepStatus::kOk);
  EXPECT_EQ(cache.begin(step, {{id, 2}}), StepStatus::kChunkTooLong);
}

TEST(Estimate, InversesHoldForEveryOptionAndFormat) {
  const SizedModel model;
  const auto holds = [&]<class Rows>(const CacheOptions& given) {
    constexpr std::size_t kBytes = std::size_t{16} << 20;
    CacheOptions options = given;
    options.max_context = longest_context<Rows>(model.shape, model.plan, options, kBytes);
    ASSERT_GT(options.max_context, 0);
    EXPECT_LE(estimate<Rows>(model.shape, model.plan, options).total_bytes(), kBytes);
    ++options.max_context;
    EXPECT_GT(estimate<Rows>(model.shape, model.plan, options).total_bytes(), kBytes);
    options = given;
    options.max_sequences =
        static_cast<int>(most_sequences<Rows>(model.shape, model.plan, options, kBytes));
    ASSERT_GT(options.max_sequences, 0);
    EXPECT_LE(estimate<Rows>(model.shape, model.plan, options).total_bytes(), kBytes);
    ++options.max_sequences;
    EXPECT_GT(estimate<Rows>(model.shape, model.plan, options).total_bytes(), kBytes);
  };
  for (const int page_tokens : {16, 64}) {
    for (const std::int64_t max_chunk : {0, 1, 512}) {
      for (const std::int64_t max_rollback : {0, 8, 300}) {
        for (const PrefillMode prefill : {PrefillMode::kWindowed, PrefillMode::kChunkCausal}) {
          CacheOptions options{.page_tokens = page_tokens, .max_sequences = 2};
          options.max_context = 900;
          options.max_chunk = max_chunk;
          options.max_rollback = max_rollback;
          options.prefill = prefill;
          holds.operator()<f16>(options);
          holds.operator()<f32>(options);
          holds.operator()<Int8Rows>(options);
          holds.operator()<PlainRows<bf16>>(options);
        }
      }
    }
  }
}

TEST(Estimate, BytesByContextAreWhatASequenceHolds) {
  const SizedModel model;
  const std::vector<std::int64_t> contexts{5000, 0, 1, 64, 65, 128, 129, 600, 640, 641};
  const auto rows = bytes_by_context<f16>(model.shape, model.plan, model.options, contexts);
  ASSERT_EQ(rows.size(), contexts.size());
  constexpr std::size_t kRings = 2 * 2 * kFirst + 2 * kSecond;
  for (std::size_t i = 0; i < rows.size(); ++i) {
    const std::int64_t n = contexts[i];
    SCOPED_TRACE(n);
    EXPECT_EQ(rows[i].context, n);
    EXPECT_EQ(rows[i].resident_bytes,
              sequence_bytes<f16>(model.shape, model.plan, model.options, n));
    const auto pages = static_cast<std::size_t>((n + 63) / 64);
    EXPECT_EQ(rows[i].dense_bytes, pages * (4 * kFirst + 2 * kSecond));
    EXPECT_EQ(rows[i].gains(), n > 128) << "a ring is two pages";
    // A chunk of 512 tokens fills a second ring beside what its streaming heads held before.
    const std::size_t before = n > 512 ? static_cast<std::size_t>((n - 512 + 63) / 64) : 0;
    const std::size_t transient = std::min<std::size_t>(before, 2) * kRings / 2;
    EXPECT_EQ(rows[i].transient_bytes, transient);
  }
  for (const std::int64_t n : {std::int64_t{-1}, std::int64_t{5001}}) {
    EXPECT_THROW((void)bytes_by_context<f16>(model.shape, model.plan, model.options, {{n}}),
                 ConfigError);
  }
}

TEST(Estimate, BytesByContextAreThoseThatACacheTakes) {
  const SizedModel model;
  KvCache<f16> cache(model.shape, model.plan, model.options);
  const SequenceId id = *cache.add_sequence();
  const std::size_t all = cache.free_bytes();
  Step step;
  for (const std::int64_t n : {512, 1024, 1536}) {
    const auto row = bytes_by_context<f16>(model.shape, model.plan, model.options, {{n}}).front();
    ASSERT_EQ(cache.begin(step, {{id, 512}}), StepStatus::kOk);
    EXPECT_EQ(all - cache.free_bytes(), row.resident_bytes + row.transient_bytes);
    for (int l = 0; l < 2; ++l) {
      step.note_heads_done(l, model.shape.layer(l).num_kv_heads);
    }
    ASSERT_EQ(cache.commit(step), StepStatus::kOk);
    EXPECT_EQ(all - cache.free_bytes(), row.resident_bytes);
  }
}

TEST(Estimate, ShortChunksNeedNoSecondRings) {
  SizedModel model;
  model.options.max_chunk = 1;
  EXPECT_EQ(estimate<f16>(model.shape, model.plan, model.options).transient_bytes, 0U);
}

/// Of the widest rows: 2^25 bytes a token in f32.
const ModelShape& wide() {
  static const ModelShape shape = ModelShape::uniform(1, 64, 64, kMaxDim);
  return shape;
}

TEST(Estimate, BytesThatPass64BitsAreRefusedNotWrapped) {
  const HeadPlan windows(wide(), KeepWindow{{16, 16}});
  const HeadPlan dense(wide());
  CacheOptions options{.page_tokens = 16, .max_bytes = std::size_t{1} << 30};
  options.max_context = kMaxTokens / 4;
  EXPECT_EQ(estimate<f32>(wide(), windows, options).dense_bytes, std::size_t{1} << 63);
  options.max_context = kMaxTokens;  // 2^65 bytes
  EXPECT_THROW((void)estimate<f32>(wide(), windows, options), ConfigError);
  EXPECT_THROW((void)estimate<f32>(wide(), dense, options), ConfigError);
  EXPECT_THROW((void)sequence_bytes<f32>(wide(), dense, options, kMaxTokens), ConfigError);
}

TEST(Estimate, InversesAnswerForTheWidestRowsAndForAllBytes) {
  const CacheOptions options{.page_tokens = 16, .max_context = kMaxTokens};
  EXPECT_EQ(most_sequences<f32>(wide(), HeadPlan(wide()), options, std::size_t{64} << 30), 0);
  EXPECT_GT(most_sequences<f32>(wide(), HeadPlan(wide(), KeepWindow{{16, 16}}), options,
                                std::size_t{64} << 30),
            10)
      << "whatever a dense cache would need";

  // Where bytes are no limit, the names of pages are: 2^31 - 1 of them.
  const ModelShape small = ModelShape::uniform(1, 1, 1, 16);
  CacheOptions few{.page_tokens = 16, .max_context = std::int64_t{1} << 30};
  EXPECT_EQ(
      most_sequences<f16>(small, HeadPlan(small), few, std::numeric_limits<std::size_t>::max()),
      31);  // of 2^26 pages each
}

TEST(Estimate, RollbackBeyondTheContextCostsNoMoreThanTheContext) {
  const ModelShape shape = ModelShape::uniform(1, 1, 1, 16);
  CacheOptions options{.page_tokens = 16, .max_context = 64};
  options.prefill = PrefillMode::kChunkCausal;
  const HeadPlan plan(shape, KeepGrowingWindow{4, kMaxTokens, 5});
  const auto metadata = [&](std::int64_t max_rollback) {
    options.max_rollback = max_rollback;
    return estimate<f32>(shape, plan, options).metadata_bytes;
  };
  EXPECT_EQ(metadata(1 << 20), metadata(64));
  EXPECT_EQ(metadata(kMaxTokens), metadata(64));
}

TEST(Estimate, RefusesWhatMakesNoSense) {
  SizedModel model;
  model.options.max_chunk = -1;
  EXPECT_THROW((void)estimate<f16>(model.shape, model.plan, model.options), ConfigError);
  model.options.max_chunk = 0;
  for (const std::int64_t length : {std::int64_t{-1}, std::int64_t{5001}, kMaxTokens}) {
    EXPECT_THROW((void)sequence_bytes<f16>(model.shape, model.plan, model.options, length),
                 ConfigError)
        << length;
  }
}

}  // namespace
}  // namespace headwise
