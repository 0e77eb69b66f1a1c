// SPDX-License-Identifier: MIT
// What kernels read of a sequence is what its keep rule says. Needs no device.
#include <gtest/gtest.h>

#include <set>
#include <string>

#include "headwise/cache/cuda/class_state.cuh"
#include "headwise/cache/keep/keep.hpp"

namespace headwise::test {
namespace {

/// Slots of the state's two runs, as a decode launch would read them.
std::set<std::int64_t> slots_read(const cuda::ClassState& state) {
  std::set<std::int64_t> slots;
  for (int r = 0; r < 2; ++r) {
    for (std::int64_t s = state.slot_begin[r]; s < state.slot_end[r]; ++s) {
      EXPECT_TRUE(slots.insert(s).second) << "slot " << s << " twice";
    }
  }
  return slots;
}

TEST(CudaClassState, ADecodeTokenReadsTheSlotsOfWhatItsWindowSees) {
  for (const Window window : {Window{4, 60}, Window{0, 64}, Window{64, 256}, Window{3, 1}}) {
    for (const std::int64_t rollback : {0, 7}) {
      SCOPED_TRACE(std::to_string(window.sink) + "+" + std::to_string(window.recent));
      const WindowRule rule =
          WindowRule::make(KeepWindow{window}, {64, 2000, rollback, 2000, PrefillMode::kWindowed});
      for (std::int64_t n = 0; n < 1500; ++n) {
        const cuda::ClassState state = cuda::class_state(rule, {}, {n, n, n + 1}, Phase::kDecode);
        std::set<std::int64_t> wanted;
        for (std::int64_t j = 0; j <= n; ++j) {
          if (window.sees(Pos{n}, Pos{j})) wanted.insert(rule.slots({}).slot(Pos{j}).value);
        }
        ASSERT_EQ(slots_read(state), wanted) << n;
        ASSERT_EQ(state.sink, window.sink);
        ASSERT_EQ(state.recent, window.recent);
      }
    }
  }
}

TEST(CudaClassState, AHeadThatKeepsEverythingIsAWindowThatNeverForgets) {
  const EverythingRule rule = EverythingRule::make({}, {64, 2000, 0, 2000, PrefillMode::kWindowed});
  for (const std::int64_t n : {0, 1, 63, 64, 1999}) {
    const cuda::ClassState state = cuda::class_state(rule, {}, {n, n, n + 1}, Phase::kPrompt);
    EXPECT_EQ(slots_read(state).size(), static_cast<std::size_t>(n + 1));
    EXPECT_EQ(state.first_count, n);
    EXPECT_EQ(state.turn, 0);
    EXPECT_EQ(state.sink, 0);
    EXPECT_EQ(state.recent, 0x7FFFFFFF);
  }
}

TEST(CudaClassState, AChunkThatFillsASecondRingStoresEverySlotOfIt) {
  const WindowRule rule =
      WindowRule::make(KeepWindow{{4, 60}}, {64, 2000, 0, 2000, PrefillMode::kWindowed});
  const StepLengths wraps{100, 100, 150};
  const cuda::ClassState state = cuda::class_state(rule, {}, wraps, Phase::kPrompt);
  EXPECT_EQ(state.append_entry, rule.pages_per_bank());
  EXPECT_EQ(cuda::most_rows_stored(rule, {}, wraps), std::max<std::int64_t>(50, rule.rows));
  EXPECT_EQ(cuda::most_rows_stored(rule, {}, {100, 100, 101}), 1);
}

}  // namespace
}  // namespace headwise::test
