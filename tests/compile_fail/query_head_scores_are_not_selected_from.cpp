// SPDX-License-Identifier: MIT
// expect: (use of|call to) deleted function
// Plans are of KV heads: scores of query heads must be reduced first, by a rule that is named.
#include "headwise/heads/select.hpp"

int main() {
  const auto scores = headwise::QueryHeadScores::dense(1, 4, std::vector{0.1, 0.9, 0.2, 0.3});
#ifdef WRONG
  const auto& evidence = scores;
#else
  const auto evidence = headwise::reduce_max(scores, 2);
#endif
  const auto plan = headwise::select(evidence, {.sparsity = 0.5, .window = {4, 60}});
  return plan.num_heads() == 2 ? 0 : 1;
}
