// SPDX-License-Identifier: MIT
// expect: (deleted)
// The scores would be gone before they are filled in.
#include "headwise/heads/token_scores.hpp"

int main() {
#ifdef WRONG
  for (float& score : headwise::TokenScores(8).add_head()) score = 1.0F;
#else
  headwise::TokenScores scores(8);
  for (float& score : scores.add_head()) score = 1.0F;
#endif
}
