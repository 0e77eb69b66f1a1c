// SPDX-License-Identifier: MIT
/// @file scratch.hpp
/// How much memory a step's tasks need besides the cache, known before the first one runs.
#pragma once

#include <cstddef>

#include "headwise/attention/work.hpp"
#include "headwise/cache/geometry.hpp"
#include "headwise/cache/kv_cache.hpp"
#include "headwise/cache/step.hpp"
#include "headwise/core/check.hpp"
#include "headwise/core/shape.hpp"
#include "headwise/heads/plan.hpp"

namespace headwise::inline v0 {

/// Bytes of scratch that suffice for every step over all sequences of a cache, of at most
/// CacheOptions::max_chunk tokens a sequence in any mix, on at most `num_threads` threads.
/// @throws ConfigError for num_threads below 1.
inline std::size_t scratch_bytes(const CacheGeometry& geometry, std::size_t num_threads) {
  if (num_threads < 1) fail<ConfigError>("num_threads must be at least 1, got ", num_threads);
  return StepWork::num_bytes(WorkSize::of_largest_step(geometry), num_threads);
}

/// The same for a cache that is yet to be built: beside estimate() (cache/estimate.hpp).
/// @throws ConfigError as KvCache's constructor, or for num_threads below 1.
template <class Rows = f16>
std::size_t scratch_bytes(const ModelShape& shape, const HeadPlan& plan,
                          const CacheOptions& options, std::size_t num_threads) {
  return scratch_bytes(CacheGeometry(shape, plan, options, FormatList<Rows>::kPageBytes),
                       num_threads);
}

/// Grows the step's scratch once, so that no later step of the cache allocates.
/// @throws ConfigError for num_threads below 1.
template <class Rows>
void reserve_scratch(Step& step, const KvCache<Rows>& cache, std::size_t num_threads) {
  step.reserve_scratch_bytes(scratch_bytes(cache.geometry(), num_threads));
}

}  // namespace headwise::inline v0
