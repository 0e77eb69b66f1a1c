// SPDX-License-Identifier: MIT
// expect: Record
// Sums of attention do not say when a token was looked at last.
#include "headwise/policies/h2o.hpp"
#include "headwise/policies/lazy_eviction.hpp"

#ifdef WRONG
using Observed = headwise::h2o::Sums;
#else
using Observed = headwise::lazy_eviction::Record;
#endif

void score(const Observed& observed, headwise::TokenScores& scores) {
  headwise::lazy_eviction::add_head({}, observed, scores);
}

int main() {}
