// SPDX-License-Identifier: MIT
// expect: KvView<.*PlainRows<.*>.* to .*KvView<.*TiledRows<
// Pages of plain rows, an engine's own perhaps, must not be read as tiles.
#include "headwise/attention/problem.hpp"
#include "headwise/cache/rows/plain_rows.hpp"
#include "headwise/cache/rows/tiled_rows.hpp"
#include "headwise/core/dtype.hpp"

#ifdef WRONG
using Format = headwise::TiledRows<headwise::f16>;
#else
using Format = headwise::PlainRows<headwise::f16>;
#endif

int main() {
  const headwise::KvView<headwise::PlainRows<headwise::f16>> pages;
  headwise::HeadProblem<Format> problem;
  problem.past = pages;
  return problem.past.num_rows() == 0 ? 0 : 1;
}
