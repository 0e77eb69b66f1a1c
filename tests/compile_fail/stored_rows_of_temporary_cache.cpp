// SPDX-License-Identifier: MIT
// expect: (deleted)
// The pages would be gone before the rows are read.
#include "headwise/attention/stored_rows.hpp"
#include "headwise/cache/kv_cache.hpp"

using Cache = headwise::KvCache<float>;

Cache restored() {
  const auto shape = headwise::ModelShape::uniform(1, 1, 1, 16);
  headwise::CacheOptions options;
  options.max_context = 16;
  return {shape, headwise::HeadPlan(shape), options};
}

int main() {
  headwise::StoredRows rows;
#ifdef WRONG
  rows.read(restored().stored({}, 0, 0));
#else
  const Cache cache = restored();
  rows.read(cache.stored({}, 0, 0));
#endif
}
