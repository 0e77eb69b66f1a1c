// SPDX-License-Identifier: MIT
// expect: (deleted)
// The shape would be gone before the loop begins.
#include "headwise/core/shape.hpp"

int main() {
  using namespace headwise;
  int heads = 0;
#ifdef WRONG
  for (const LayerShape& layer : ModelShape::uniform(2, 4, 4, 64).layers()) {
    heads += layer.num_kv_heads;
  }
#else
  const ModelShape shape = ModelShape::uniform(2, 4, 4, 64);
  for (const LayerShape& layer : shape.layers()) heads += layer.num_kv_heads;
  // One layer of a temporary is a copy, which lives as long as its name.
  const LayerShape& one = ModelShape::uniform(2, 4, 4, 64).layer(1);
  heads += one.num_kv_heads;
#endif
  return heads;
}
