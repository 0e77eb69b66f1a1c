// SPDX-License-Identifier: MIT
#include "headwise/cache/step.hpp"

#include <gtest/gtest.h>

#include <set>
#include <string>
#include <type_traits>

namespace headwise {
namespace {

TEST(Step, StartsWithoutRows) {
  const Step step;
  EXPECT_TRUE(step.entries().empty());
  EXPECT_EQ(step.num_rows(), 0);
}

TEST(Step, IsNeitherCopiedNorMoved) {
  // A copy could be committed in its original's stead.
  static_assert(!std::is_copy_constructible_v<Step> && !std::is_move_constructible_v<Step>);
  static_assert(!std::is_copy_assignable_v<Step> && !std::is_move_assignable_v<Step>);
}

TEST(Step, EveryStatusHasWordsOfItsOwn) {
  std::set<std::string> words;
  for (const StepStatus status :
       {StepStatus::kOk, StepStatus::kOutOfPages, StepStatus::kContextTooLong,
        StepStatus::kInvalidChunk, StepStatus::kStale, StepStatus::kIncomplete,
        StepStatus::kTooFarBack}) {
    EXPECT_STRNE(to_string(status), "unknown");
    words.insert(to_string(status));
  }
  EXPECT_EQ(words.size(), 7U);
}

TEST(Step, EntryCountsItsTokens) {
  const StepEntry entry{SequenceId{2}, {10, 12, 17}, 5};
  EXPECT_EQ(entry.num_tokens(), 7);
  EXPECT_EQ(entry.lengths.next_high_water(), 17);
  EXPECT_EQ((StepLengths{10, 30, 17}.next_high_water()), 30);
}

}  // namespace
}  // namespace headwise
