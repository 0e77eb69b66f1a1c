// SPDX-License-Identifier: MIT
// expect: HeadPolicy.*(return-type-requirement|type constraint .*HeadPlan)
// A policy that answers with scores, and leaves the plan to others, is none.
#include "headwise/policies/policy.hpp"

struct Mine {
#ifdef WRONG
  headwise::HeadScores plan(const headwise::HeadScores& scores) const { return scores; }
#else
  headwise::HeadPlan plan(const headwise::HeadScores& scores) const {
    return headwise::HeadPlan(scores.heads_per_layer());
  }
#endif
};
static_assert(headwise::HeadPolicy<Mine, headwise::HeadScores>);

int main() {}
