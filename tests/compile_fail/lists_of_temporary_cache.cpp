// SPDX-License-Identifier: MIT
// expect: (deleted)
// The exporter reads the cache's tables in every step.
#include "headwise/cache/export.hpp"
#include "headwise/cache/kv_cache.hpp"

using Cache = headwise::KvCache<headwise::PlainRows<float>>;

Cache filled() {
  const auto shape = headwise::ModelShape::uniform(1, 1, 1, 16);
  headwise::CacheOptions options;
  options.max_context = 16;
  return {shape, headwise::HeadPlan(shape), options};
}

int main() {
#ifdef WRONG
  const headwise::LayerExporter<float> lists(filled(), 0, headwise::ExportUnit::kPages);
#else
  const Cache cache = filled();
  const headwise::LayerExporter<float> lists(cache, 0, headwise::ExportUnit::kPages);
#endif
  return lists.num_heads();
}
