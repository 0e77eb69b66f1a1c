// SPDX-License-Identifier: MIT
// expect: (RowFormat.*HeadMajor|HeadMajor. does not satisfy .RowFormat)
// A type that says where elements lie is not a format yet: rows must get into a page and out.
#include "headwise/cache/kv_cache.hpp"

struct HeadMajor {};
#ifdef WRONG
using Rows = HeadMajor;
#else
using Rows = headwise::PlainRows<headwise::f16>;
#endif

int main() {
  const auto shape = headwise::ModelShape::uniform(1, 1, 1, 16);
  const headwise::KvCache<Rows> cache(shape, headwise::HeadPlan(shape), {.max_context = 16});
  return cache.free_pages() > 0 ? 0 : 1;
}
