// SPDX-License-Identifier: MIT
#include "headwise/cache/place.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "headwise/cache/kv_cache.hpp"

namespace headwise {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::ThrowsMessage;

CacheOptions options_of(std::int64_t context) {
  CacheOptions options;
  options.page_tokens = 16;
  options.max_context = context;
  options.max_sequences = 3;
  return options;
}

CacheGeometry placed_geometry(const CacheOptions& options) {
  const ModelShape shape = ModelShape::uniform(1, 2, 2, 16);
  return CacheGeometry(shape, HeadPlan(shape), options, &FormatOf<f16>::page_bytes);
}

TEST(HostPlace, OwnsAsManyBytesAsThePoolHas) {
  const CacheGeometry geometry = placed_geometry(options_of(100));
  const HostPlace place(geometry);
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(place.pages()) % kCacheLine, 0U);
  std::fill_n(place.pages(), geometry.pool_bytes(), std::byte{1});  // all of it is writable
}

TEST(HostPlace, LiesOnHugePagesWhereItIsLargeEnough) {
  const HostPlace place(placed_geometry(options_of(100'000)));
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(place.pages()) % Allocation::kHugePage, 0U);
}

TEST(HostPlace, TakesTheCallersMemory) {
  CacheOptions options = options_of(100);
  const std::size_t bytes = placed_geometry(options).pool_bytes();
  std::vector<std::byte> memory(bytes + 128);
  void* aligned = memory.data();
  std::size_t space = memory.size();
  std::align(64, bytes, aligned, space);
  auto* first = static_cast<std::byte*>(aligned);

  options.page_memory = {first, bytes};
  EXPECT_EQ(HostPlace(placed_geometry(options)).pages(), first);

  options.page_memory = {first, bytes - 1};
  EXPECT_THAT([&] { HostPlace{placed_geometry(options)}; },
              ThrowsMessage<ConfigError>(
                  AllOf(HasSubstr(std::to_string(bytes - 1)), HasSubstr(std::to_string(bytes)))));
  options.page_memory = {first + 32, bytes};
  EXPECT_THAT([&] { HostPlace{placed_geometry(options)}; },
              ThrowsMessage<ConfigError>(HasSubstr("aligned to 64")));
}

TEST(HostPlace, CopiesWholePagesByTheirNumbers) {
  const CacheGeometry geometry = placed_geometry(options_of(100));
  const HostPlace place(geometry);
  const std::size_t page = geometry.pool().page_bytes(0);
  std::fill_n(place.pages(), geometry.pool_bytes(), std::byte{0});
  std::fill_n(place.pages() + 2 * page, page, std::byte{7});
  const PageCopy copies[] = {{2, 5, page}, {5, 0, page}};  // in order
  ASSERT_EQ(place.copy_pages(copies, {}), StepStatus::kOk);
  for (const std::size_t i : {0U, 1U, 2U, 3U, 5U}) {
    const std::byte expected{i == 1 || i == 3 ? std::uint8_t{0} : std::uint8_t{7}};
    EXPECT_EQ(place.pages()[i * page], expected) << i;
    EXPECT_EQ(place.pages()[i * page + page - 1], expected) << i;
  }
}

// A place that fails -----------------------------------------------------------------------------

/// The host's memory behind a connection that can be cut.
class CutPlace : public HostPlace {
 public:
  using HostPlace::HostPlace;
  static inline bool is_cut = false;

  StepStatus copy_pages(std::span<const PageCopy> copies, Stream stream) const {
    return is_cut ? StepStatus::kDeviceError : HostPlace::copy_pages(copies, stream);
  }
  StepStatus send(Books&, const Step&, Stream) const {
    return is_cut ? StepStatus::kDeviceError : StepStatus::kOk;
  }
};

struct CachesOfAFailingPlace : ::testing::Test {
  CachesOfAFailingPlace() { CutPlace::is_cut = false; }
  ~CachesOfAFailingPlace() override { CutPlace::is_cut = false; }

  ModelShape shape = ModelShape::uniform(1, 2, 2, 16);
  KvCache<f16, CutPlace> cache{shape, HeadPlan(shape), options_of(100)};
  Step step;

  StepStatus advance(SequenceId id, std::int64_t tokens) {
    const StepStatus status = cache.begin(step, {{id, tokens}});
    if (status != StepStatus::kOk) return status;
    step.note_heads_done(0, 2);
    return cache.commit(step);
  }
};

TEST_F(CachesOfAFailingPlace, BeginSaysWhatThePlaceSaidAndOpensNothing) {
  const SequenceId id = cache.add_sequence().value();
  ASSERT_EQ(advance(id, 40), StepStatus::kOk);
  const std::int64_t held = cache.pages_in_use();
  CutPlace::is_cut = true;
  EXPECT_EQ(cache.begin(step, {{id, 30}}), StepStatus::kDeviceError);
  EXPECT_FALSE(cache.is_open(step));
  EXPECT_EQ(cache.commit(step), StepStatus::kStale);
  EXPECT_EQ(cache.pages_in_use(), held);
  EXPECT_EQ(cache.length(id), 40);
  CutPlace::is_cut = false;
  EXPECT_EQ(advance(id, 30), StepStatus::kOk);
}

TEST_F(CachesOfAFailingPlace, AForkThatWasNotCopiedIsNoSequence) {
  const SequenceId id = cache.add_sequence().value();
  ASSERT_EQ(advance(id, 40), StepStatus::kOk);
  const std::int64_t held = cache.pages_in_use();
  CutPlace::is_cut = true;
  SequenceId child{7, 7};
  EXPECT_EQ(cache.fork(id, child), StepStatus::kDeviceError);
  EXPECT_EQ(child, (SequenceId{7, 7}));
  EXPECT_EQ(cache.pages_in_use(), held);
  CutPlace::is_cut = false;
  EXPECT_EQ(cache.fork(id, child), StepStatus::kOk);
  EXPECT_EQ(cache.length(child), 40);
  EXPECT_TRUE(cache.add_sequence().has_value());  // the place of the failed one is free again
}

TEST_F(CachesOfAFailingPlace, ACheckpointThatWasNotCopiedOpensNoStep) {
  CacheOptions options = options_of(100);
  options.checkpoint_tokens = 40;
  KvCache<f16, CutPlace> own(shape, HeadPlan(shape), options);
  const SequenceId id = own.add_sequence().value();
  ASSERT_EQ(own.begin(step, {{id, 40}}), StepStatus::kOk);
  step.note_heads_done(0, 2);
  ASSERT_EQ(own.commit(step), StepStatus::kOk);
  const std::int64_t held = own.pages_in_use();
  CutPlace::is_cut = true;
  EXPECT_EQ(own.begin(step, {{id, 10}}), StepStatus::kDeviceError);
  EXPECT_FALSE(own.is_open(step));
  EXPECT_EQ(own.pages_in_use(), held);
  CutPlace::is_cut = false;
  EXPECT_EQ(own.begin(step, {{id, 10}}), StepStatus::kOk);
}

// A fork of more pages than are copied at once ---------------------------------------------------

/// The host's memory, counting how it is asked.
class CountingPlace : public HostPlace {
 public:
  using HostPlace::HostPlace;
  static inline std::size_t num_calls = 0;
  static inline std::size_t num_copies = 0;
  static inline std::size_t fails_at = 0;  // of the calls; 0: never

  StepStatus copy_pages(std::span<const PageCopy> copies, Stream stream) const {
    if (++num_calls == fails_at) return StepStatus::kDeviceError;
    num_copies += copies.size();
    return HostPlace::copy_pages(copies, stream);
  }
};

TEST(CopiedPages, GoToThePlaceInPortionsAndAfterAFailureNoMoreOfThem) {
  const ModelShape shape = ModelShape::uniform(1, 1, 1, 16);
  CacheOptions options = options_of(60'000);
  options.max_rollback = 50'000;  // all of 3125 pages and one more may be written again
  KvCache<f16, CountingPlace> cache(shape, HeadPlan(shape), options);
  const SequenceId id = cache.add_sequence().value();
  Step step;
  ASSERT_EQ(cache.begin(step, {{id, 50'001}}), StepStatus::kOk);
  step.note_heads_done(0, 1);
  ASSERT_EQ(cache.commit(step), StepStatus::kOk);
  const std::int64_t held = cache.pages_in_use();
  for (const std::size_t fails_at : {1U, 2U, 4U}) {
    CountingPlace::fails_at = fails_at;
    CountingPlace::num_calls = 0;
    SequenceId child{7, 7};
    EXPECT_EQ(cache.fork(id, child), StepStatus::kDeviceError);
    EXPECT_EQ(CountingPlace::num_calls, fails_at);
    EXPECT_EQ(child, (SequenceId{7, 7}));
    EXPECT_EQ(cache.pages_in_use(), held);
  }
  CountingPlace::fails_at = CountingPlace::num_calls = CountingPlace::num_copies = 0;
  SequenceId child;
  EXPECT_EQ(cache.fork(id, child), StepStatus::kOk);
  EXPECT_EQ(CountingPlace::num_copies, 3126U);
  EXPECT_EQ(CountingPlace::num_calls, 4U);
}

}  // namespace
}  // namespace headwise
