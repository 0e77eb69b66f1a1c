// SPDX-License-Identifier: MIT
/// @file scratch.hpp
/// How much memory a step's tasks need besides the cache, known before the first one runs.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "headwise/attention/cpu/decode.hpp"
#include "headwise/attention/cpu/prefill.hpp"
#include "headwise/attention/tasks.hpp"
#include "headwise/cache/geometry.hpp"
#include "headwise/cache/step.hpp"

namespace headwise::inline v0 {

/// Scratch of the largest step: bytes and counters.
struct ScratchSize {
  std::size_t num_bytes = 0;     ///< of the step's Scratch
  std::size_t num_counters = 0;  ///< one for every head of every sequence
};

/// What any step over all sequences of a cache may need, of at most `max_chunk` tokens a sequence,
/// on `num_threads` threads.
inline ScratchSize scratch_size(const CacheGeometry& geometry, std::int64_t max_chunk,
                                std::size_t num_threads) {
  const CacheOptions& options = geometry.options();
  ScratchSize size;
  for (const LayerPlace& layer : geometry.layers()) {
    const LayerShape& shape = layer.shape;
    const std::int64_t heads = std::int64_t{shape.num_kv_heads} * options.max_sequences;
    const std::int64_t query_rows = std::min(max_chunk * shape.group_size, kMaxDecodeRows);
    // A split is full but for the last of its head, so the pool bounds how many there can be.
    const std::int64_t rows_in_pool = geometry.num_pages() * options.page_tokens;
    const std::int64_t splits = std::min(heads * ceil_div(options.max_context, kSplitRows),
                                         heads + rows_in_pool / kSplitRows);
    const std::size_t partials =
        static_cast<std::size_t>(splits) * decode_partial_floats(query_rows, shape.v_dim);
    const std::size_t floats = partials + num_threads * thread_scratch_floats(shape);
    size.num_bytes = std::max(size.num_bytes, floats * sizeof(float));
    size.num_counters = std::max(size.num_counters, static_cast<std::size_t>(heads));
  }
  return size;
}

/// Grows the step's scratch once, so that no later step of this size allocates.
template <class Rows>
void reserve_scratch(Step& step, const KvCache<Rows>& cache, std::int64_t max_chunk,
                     std::size_t num_threads) {
  const ScratchSize size = scratch_size(cache.geometry(), max_chunk, num_threads);
  step.scratch().reserve(size.num_bytes, size.num_counters);
}

}  // namespace headwise::inline v0
