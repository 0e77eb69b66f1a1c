// SPDX-License-Identifier: MIT
// expect: KeptPositions
// Counts do not say which tokens were dropped.
#include "headwise/heads/token_counts.hpp"
#include "headwise/policies/kv_crush.hpp"

#ifdef WRONG
using Chosen = headwise::KeepCounts;
#else
using Chosen = headwise::KeptPositions;
#endif

void keep(const headwise::TokenScores& layer, const Chosen& chosen, headwise::KeptPositions& kept) {
  headwise::kv_crush::add_representatives({}, layer, {}, chosen, 1, kept);
}

int main() {}
