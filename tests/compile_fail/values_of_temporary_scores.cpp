// SPDX-License-Identifier: MIT
// expect: (deleted)
// The table would be gone before the loop begins.
#include <vector>

#include "headwise/heads/scores.hpp"

int main() {
  using namespace headwise;
  const auto query = QueryHeadScores::dense(1, 4, std::vector<double>(4));
  double sum = 0.0;
#ifdef WRONG
  for (const double value : reduce_max(query, 4).values()) sum += value;
#else
  const HeadScores scores = reduce_max(query, 4);
  for (const double value : scores.values()) sum += value;
#endif
  return sum == 0.0 ? 0 : 1;
}
