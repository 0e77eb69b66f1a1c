// SPDX-License-Identifier: MIT
// expect: (deleted)
// The plan would be gone before the loop begins.
#include "headwise/policies/uniform_budget.hpp"

int main() {
  using namespace headwise;
  const ModelShape shape = ModelShape::uniform(1, 4, 4, 64);
  int retrieval = 0;
#ifdef WRONG
  for (const HeadBudget& budget : uniform_budget::Policy{}.plan(shape).budgets()) {
    retrieval += is_retrieval(budget) ? 1 : 0;
  }
#else
  const HeadPlan plan = uniform_budget::Policy{}.plan(shape);
  for (const HeadBudget& budget : plan.budgets()) retrieval += is_retrieval(budget) ? 1 : 0;
  // One budget of a temporary is a copy, which lives as long as its name.
  const HeadBudget& one = uniform_budget::Policy{}.plan(shape).budget(0, 0);
  retrieval += is_retrieval(one) ? 1 : 0;
#endif
  return retrieval;
}
