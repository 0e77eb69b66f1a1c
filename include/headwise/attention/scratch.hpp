// SPDX-License-Identifier: MIT
/// @file scratch.hpp
/// How much memory a step's tasks need besides the cache, known before the first one runs.
#pragma once

#include <cstddef>
#include <cstdint>

#include "headwise/attention/work.hpp"
#include "headwise/cache/geometry.hpp"
#include "headwise/cache/kv_cache.hpp"
#include "headwise/cache/step.hpp"
#include "headwise/core/check.hpp"
#include "headwise/core/shape.hpp"
#include "headwise/heads/plan.hpp"

namespace headwise::inline v0 {

/// Bytes of scratch that suffice for every step over all sequences of a cache, of at most
/// `max_chunk` tokens a sequence in any mix, on at most `num_threads` threads.
/// @throws ConfigError for max_chunk or num_threads below 1.
inline std::size_t scratch_bytes(const CacheGeometry& geometry, std::int64_t max_chunk,
                                 std::size_t num_threads) {
  if (max_chunk < 1) fail<ConfigError>("max_chunk must be at least 1, got ", max_chunk);
  if (num_threads < 1) fail<ConfigError>("num_threads must be at least 1, got ", num_threads);
  return StepWork::num_bytes(WorkSize::of_largest_step(geometry, max_chunk), num_threads);
}

/// The same for a cache that is yet to be built: beside estimate() (cache/estimate.hpp).
/// @throws ConfigError as KvCache's constructor, or for max_chunk or num_threads below 1.
template <class Rows = f16>
std::size_t scratch_bytes(const ModelShape& shape, const HeadPlan& plan,
                          const CacheOptions& options, std::int64_t max_chunk,
                          std::size_t num_threads) {
  const CacheGeometry geometry(shape, plan, options, &FormatOf<Rows>::page_bytes);
  return scratch_bytes(geometry, max_chunk, num_threads);
}

/// Grows the step's scratch once, so that no later step of this size allocates.
/// @throws ConfigError for max_chunk or num_threads below 1.
template <class Rows>
void reserve_scratch(Step& step, const KvCache<Rows>& cache, std::int64_t max_chunk,
                     std::size_t num_threads) {
  step.reserve_scratch_bytes(scratch_bytes(cache.geometry(), max_chunk, num_threads));
}

}  // namespace headwise::inline v0
