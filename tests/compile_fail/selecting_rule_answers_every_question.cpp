// SPDX-License-Identifier: MIT
// expect: (static assertion failed|static_assert failed)
// A rule that selects and forgets what is forecast of its budgets selects nothing.
#include "headwise/cache/keep/selected.hpp"

using namespace headwise;

#ifdef WRONG
struct ForgetsForecasts : SelectedRule {
  static ForgetsForecasts make(const Budget&, const KeepLimits&) { return {}; }
  void forecast() const;  // hides the one that there is
  friend bool operator==(const ForgetsForecasts&, const ForgetsForecasts&) = default;
};
static_assert(KeepRule<ForgetsForecasts>, "it lacks nothing else");
static_assert(SelectsRows<ForgetsForecasts>);
#else
static_assert(SelectsRows<SelectedRule>);
#endif

int main() {}
