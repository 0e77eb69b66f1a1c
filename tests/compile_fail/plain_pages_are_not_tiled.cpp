// SPDX-License-Identifier: MIT
// expect: KvView<.*PlainLayout>.* to .*KvView<.*TiledLayout>
// Pages of plain rows, an engine's own perhaps, must not be read as tiles.
#include "headwise/attention/problem.hpp"
#include "headwise/cache/page_layout.hpp"
#include "headwise/core/dtype.hpp"

#ifdef WRONG
using Layout = headwise::TiledLayout;
#else
using Layout = headwise::PlainLayout;
#endif

int main() {
  const headwise::KvView<headwise::f16, headwise::PlainLayout> pages;
  headwise::HeadProblem<headwise::f16, Layout> problem;
  problem.past = pages;
  return problem.past.num_rows() == 0 ? 0 : 1;
}
