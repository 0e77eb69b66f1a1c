// SPDX-License-Identifier: MIT
#include "headwise/policies/streaming_llm.hpp"

#include <gtest/gtest.h>

namespace headwise {
namespace {

TEST(StreamingLlm, StreamsEveryHead) {
  const HeadPlan plan = streaming_llm::Policy{}.plan(ModelShape::uniform(2, 8, 2, 64));
  EXPECT_EQ(plan.sparsity(), 1.0);
  EXPECT_EQ(plan.budget(1, 1), HeadBudget{(KeepWindow{{.sink = 4, .recent = 1021}})});
}

TEST(StreamingLlm, SeesTheCachedTokensAndItsOwn) {
  // S = 4, R = 3 over tokens 0..9: after the trim {0,1,2,3,7,8,9} are cached, and token 10 sees
  // these and itself.
  constexpr Window kFromExclusive = Window::from_exclusive(4, 3);
  for (int key = 0; key <= 10; ++key) {
    EXPECT_EQ(kFromExclusive.sees(Pos{10}, Pos{key}), key < 4 || key >= 7) << key;
  }
}

}  // namespace
}  // namespace headwise
