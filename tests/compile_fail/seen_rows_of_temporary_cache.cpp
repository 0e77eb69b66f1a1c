// SPDX-License-Identifier: MIT
// expect: (deleted)
// The pages would be gone before attention reads them.
#include "headwise/cache/kv_cache.hpp"

using Cache = headwise::KvCache<float>;

Cache restored() {
  const auto shape = headwise::ModelShape::uniform(1, 1, 1, 16);
  headwise::CacheOptions options;
  options.max_context = 16;
  return {shape, headwise::HeadPlan(shape), options};
}

int main() {
#ifdef WRONG
  const auto rows = restored().seen(headwise::StepChunk{}, 0, 0);
#else
  const Cache cache = restored();
  const auto rows = cache.seen(headwise::StepChunk{}, 0, 0);
#endif
  return rows.view.num_runs;
}
