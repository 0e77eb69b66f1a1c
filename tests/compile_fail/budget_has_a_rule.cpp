// SPDX-License-Identifier: MIT
// expect: (RuleFor<.*KeepNewest.*variant<>)
// A kind of budget that no rule keeps does not pass for one of the others.
#include "headwise/cache/keep/keep.hpp"

struct KeepNewest {
  long tokens = 0;
};
#ifdef WRONG
using Budget = KeepNewest;
#else
using Budget = headwise::KeepWindow;
#endif

int main() {
  const auto rule = headwise::detail::RuleFor<Budget, headwise::KeepRules>::type::make(
      Budget{}, {.page_tokens = 16, .max_context = 100, .max_chunk = 100});
  return rule == rule ? 0 : 1;
}
