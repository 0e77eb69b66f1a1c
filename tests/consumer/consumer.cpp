// SPDX-License-Identifier: MIT
// What an engine does with Headwise, small. It prints what it found; tests/flags compares that text over flags.
#include <cstdio>

#include "headwise/headwise.hpp"

int main() {
  const auto shape = headwise::ModelShape::uniform(2, 8, 4, 64);
  headwise::HeadPlan plan(shape);
  plan.set(1, 2, headwise::KeepWindow{{4, 60}});
  std::printf("%d layers, sparsity %.3f\n", plan.num_layers(), plan.sparsity());
  return plan.num_layers() == 2 ? 0 : 1;
}
