// SPDX-License-Identifier: MIT
// expect: (PageLayout.*Layout = HeadMajor|HeadMajor. does not satisfy .PageLayout)
// A layout of one's own is not enough: the kernels know the two that there are.
#include "headwise/cache/kv_cache.hpp"

struct HeadMajor {};
#ifdef WRONG
using Layout = HeadMajor;
#else
using Layout = headwise::PlainLayout;
#endif

int main() {
  const auto shape = headwise::ModelShape::uniform(1, 1, 1, 16);
  const headwise::KvCache<headwise::f16, Layout> cache(shape, headwise::HeadPlan(shape),
                                                       {.max_context = 16});
  return cache.free_pages() > 0 ? 0 : 1;
}
