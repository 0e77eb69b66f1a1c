// SPDX-License-Identifier: MIT
// expect: (deleted)
// The table would be gone before the loop begins.
#include <vector>

#include "headwise/heads/scores.hpp"

int main() {
  using namespace headwise;
  const std::vector<double> values(4);
  double sum = 0.0;
#ifdef WRONG
  for (const double value : HeadScores::dense(1, 4, values).row(0)) sum += value;
#else
  const HeadScores scores = HeadScores::dense(1, 4, values);
  for (const double value : scores.row(0)) sum += value;
#endif
  return sum == 0.0 ? 0 : 1;
}
