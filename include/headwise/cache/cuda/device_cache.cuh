// SPDX-License-Identifier: MIT
/// @file device_cache.cuh
/// DeviceCache: KvCache over device pages.
#pragma once

#include <limits>

#include "headwise/cache/cuda/device_place.cuh"
#include "headwise/cache/cuda/elements.cuh"
#include "headwise/cache/kv_cache.hpp"
#include "headwise/cache/rows/plain_rows.hpp"

namespace headwise::inline v0::cuda {

/// K and V of many sequences in device pages, head by head as the plan says; see DevicePlace.
template <DeviceRow Row>
using DeviceCache = KvCache<PlainRows<Row>, DevicePlace>;

/// Makes the step's rows part of their sequences after a graph that attends every layer was
/// launched: the host saw no layer pass.
template <DeviceRow Row>
StepStatus commit_replayed(DeviceCache<Row>& cache, Step& step) {
  if (cache.is_open(step)) {
    for (int l = 0; l < static_cast<int>(cache.geometry().layers().size()); ++l) {
      step.note_heads_done(l, std::numeric_limits<std::int32_t>::max());
    }
  }
  return cache.commit(step);
}

}  // namespace headwise::inline v0::cuda
