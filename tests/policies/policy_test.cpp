// SPDX-License-Identifier: MIT
#include "headwise/policies/policy.hpp"

#include <gtest/gtest.h>

#include <vector>

namespace headwise {
namespace {

struct EverythingPolicy {
  HeadPlan plan(const HeadScores& scores) const { return HeadPlan(scores.heads_per_layer()); }
};
struct NoPlan {
  int plan(const HeadScores&) const { return 0; }
};
static_assert(HeadPolicy<EverythingPolicy, HeadScores>);
static_assert(!HeadPolicy<EverythingPolicy, QueryHeadScores>, "query heads must be reduced first");
static_assert(!HeadPolicy<NoPlan, HeadScores>);
static_assert(!CapacityPolicy<EverythingPolicy>);

TEST(HeadPolicy, TurnsItsEvidenceIntoAPlan) {
  const HeadScores scores = HeadScores::dense(1, 2, std::vector<double>(2));
  EXPECT_EQ(EverythingPolicy{}.plan(scores).sparsity(), 0.0);
}

}  // namespace
}  // namespace headwise
