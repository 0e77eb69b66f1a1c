// SPDX-License-Identifier: MIT
// expect: (RowFormat.*= int|int.*does not satisfy .RowFormat)
// Rows are f32, f16 or bf16, or a format by name.
#include "headwise/cache/kv_cache.hpp"

#ifdef WRONG
using Row = int;
#else
using Row = headwise::bf16;
#endif

int main() {
  const auto shape = headwise::ModelShape::uniform(1, 1, 1, 16);
  const headwise::KvCache<Row> cache(shape, headwise::HeadPlan(shape), {.max_context = 16});
  return cache.free_pages() > 0 ? 0 : 1;
}
