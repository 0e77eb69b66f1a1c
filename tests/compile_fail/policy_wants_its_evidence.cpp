// SPDX-License-Identifier: MIT
// expect: HeadPolicy.*policy.plan.evidence.*invalid
// RazorAttention decides from two tables, induction and echo, and not from one.
#include "headwise/policies/razor_attention.hpp"

#ifdef WRONG
using Evidence = headwise::HeadScores;
#else
using Evidence = headwise::razor_attention::Scores;
#endif
static_assert(headwise::HeadPolicy<headwise::razor_attention::Policy, Evidence>);

int main() {}
