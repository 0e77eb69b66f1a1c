// SPDX-License-Identifier: MIT
// Comparisons that an engine's .cu files make link: nvcc derives no == from a defaulted <=>.
#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "headwise/headwise.cuh"

namespace headwise::test {
namespace {

template <class T>
bool finds(const std::vector<T>& all, const T& one) {
  return std::find(all.begin(), all.end(), one) != all.end();
}

TEST(CudaComparisons, ValuesAreFoundInDeviceCode) {
  EXPECT_TRUE(finds({SequenceId{1, 0}, SequenceId{2, 5}}, SequenceId{2, 5}));
  EXPECT_FALSE(finds({SequenceId{2, 5}}, SequenceId{2, 6}));
  EXPECT_TRUE(finds({Pos{1}, Pos{2}}, Pos{2}));
  EXPECT_TRUE(finds({Slot{1}, Slot{2}}, Slot{2}));
  EXPECT_TRUE(finds({Window{4, 60}}, Window{4, 60}));
  EXPECT_TRUE(finds({HeadId{0, 1}}, HeadId{0, 1}));
  EXPECT_FALSE(finds<HeadBudget>({KeepEverything{}, KeepWindow{{4, 60}}}, KeepGrowingWindow{}));
}

}  // namespace
}  // namespace headwise::test
