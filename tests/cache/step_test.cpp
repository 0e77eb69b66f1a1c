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
  EXPECT_TRUE(step.chunks().empty());
  EXPECT_EQ(step.num_rows(), 0);
  EXPECT_EQ(step.num_overflows(), 0);
}

TEST(Step, IsNeitherCopiedNorMoved) {
  // A copy could be committed in its original's stead.
  static_assert(!std::is_copy_constructible_v<Step> && !std::is_move_constructible_v<Step>);
  static_assert(!std::is_copy_assignable_v<Step> && !std::is_move_assignable_v<Step>);
}

TEST(Step, EveryStatusHasWordsOfItsOwn) {
  std::set<std::string> words;
  int statuses = 0;
  for (int value = 0; value < 256; ++value) {
    const std::string text = to_string(static_cast<StepStatus>(value));
    if (text == "unknown") break;  // the values lie in a row
    words.insert(text);
    ++statuses;
  }
  EXPECT_GT(statuses, static_cast<int>(StepStatus::kSelectedFrom));
  EXPECT_EQ(words.size(), static_cast<std::size_t>(statuses));
}

TEST(Step, CountsOverflowsFromAnyHead) {
  const Step step;
  step.note_overflows(3);
  step.note_overflows(0);
  step.note_overflows(4);
  EXPECT_EQ(step.num_overflows(), 7);
}

TEST(Step, EntryCountsItsTokens) {
  const StepChunk chunk{SequenceId{2}, {10, 12, 17}, 5};
  EXPECT_EQ(chunk.num_tokens(), 7);
  EXPECT_EQ(chunk.phase, Phase::kPrompt);
}

TEST(SequenceId, NamesNobodyUnlessACacheGaveIt) {
  EXPECT_EQ(SequenceId{}.index, -1);
  EXPECT_NE((SequenceId{3, 1}), (SequenceId{3, 2}));  // who had the place before is another one
}

}  // namespace
}  // namespace headwise
