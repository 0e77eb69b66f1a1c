// SPDX-License-Identifier: MIT
// expect: (no match for|invalid operands to binary expression)
// A count of kept rows is not a position: a window has forgotten most of them.
#include "headwise/core/position.hpp"

int main() {
  const long kept_rows = 64;
  const headwise::Pos next{1000};
#ifdef WRONG
  return next == kept_rows ? 0 : 1;
#else
  return next == headwise::Pos{1000} && kept_rows == 64 ? 0 : 1;
#endif
}
