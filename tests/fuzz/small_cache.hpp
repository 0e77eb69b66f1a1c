// SPDX-License-Identifier: MIT
/// @file small_cache.hpp
/// A cache with a head of every kind whose snapshots have a few kilobytes.
#pragma once

#include "headwise/cache/kv_cache.hpp"
#include "headwise/core/shape.hpp"
#include "headwise/heads/plan.hpp"

namespace headwise::test {

inline HeadPlan small_plan(const ModelShape& shape) {
  HeadPlan plan(shape);
  plan.set(0, 1, KeepWindow{{4, 12}});
  plan.set(0, 2, KeepGrowingWindow{4, 16, 3});
  return plan;
}

inline CacheOptions small_options() {
  CacheOptions options;
  options.page_tokens = 16;
  options.max_context = 100;
  options.max_rollback = 5;
  options.max_sequences = 2;
  options.prefill = PrefillMode::kChunkCausal;
  return options;
}

struct SmallCache {
  ModelShape shape = ModelShape::uniform(1, 3, 3, 16);
  KvCache<f16> cache{shape, small_plan(shape), small_options()};
};

}  // namespace headwise::test
