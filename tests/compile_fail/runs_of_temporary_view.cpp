// SPDX-License-Identifier: MIT
// expect: (deleted)
// The view would be gone before the loop begins.
#include "headwise/cache/rows/tiled_rows.hpp"
#include "headwise/core/kv_view.hpp"

using View = headwise::KvView<headwise::TiledRows<float>>;
View seen() { return {}; }

int main() {
  std::int64_t rows = 0;
#ifdef WRONG
  for (const headwise::KvRun& run : seen().runs()) rows += run.count;
#else
  const View view = seen();
  for (const headwise::KvRun& run : view.runs()) rows += run.count;
#endif
  return static_cast<int>(rows);
}
