// SPDX-License-Identifier: MIT
/// @file estimate.hpp
/// estimate(): the bytes of a cache before it is built, and what fits into given bytes.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "headwise/attention/scratch.hpp"
#include "headwise/cache/geometry.hpp"
#include "headwise/cache/page_ledger.hpp"
#include "headwise/cache/rows/tiled_rows.hpp"
#include "headwise/core/dtype.hpp"
#include "headwise/core/shape.hpp"
#include "headwise/heads/plan.hpp"

namespace headwise::inline v0 {

/// Bytes, for all sequences and layers together.
struct Estimate {
  std::size_t page_bytes = 0;  ///< one page

  std::size_t resident_bytes = 0;   ///< pages held by max_sequences sequences of max_context tokens
  std::size_t transient_bytes = 0;  ///< more pages while a step of max_chunk tokens each is open

  std::size_t pool_bytes = 0;      ///< what the cache asks its allocator for as page memory
  std::size_t metadata_bytes = 0;  ///< and as tables, lengths and compensation rows
  std::size_t scratch_bytes = 0;   ///< what reserve_scratch() allocates for the steps

  std::size_t dense_bytes = 0;  ///< resident_bytes if every head kept everything

  /// Everything allocated: by the cache and for the steps.
  std::size_t total_bytes() const { return pool_bytes + metadata_bytes + scratch_bytes; }
  /// False where streaming costs as much as it frees: windows rounded up to pages (and their
  /// second ring) are no smaller than the whole context.
  bool gains() const { return resident_bytes + transient_bytes < dense_bytes; }
  /// The verdict in words.
  const char* verdict() const { return gains() ? "gain" : "no gain"; }
};

/// Page bytes that one sequence of `length` tokens holds between steps: KvCache::held_bytes()
/// beforehand.
/// @throws ConfigError as KvCache's constructor.
template <class Rows = f16>
std::size_t sequence_bytes(const ModelShape& shape, const HeadPlan& plan,
                           const CacheOptions& options, std::int64_t length) {
  const CacheGeometry geometry(shape, plan, options, &FormatOf<Rows>::page_bytes);
  return static_cast<std::size_t>(geometry.pages_held(length, length)) * geometry.page_bytes();
}

/// What a KvCache<Rows> of these arguments asks its allocator for, and what its steps need.
/// @param max_chunk  most tokens a sequence gets in one step, in [1, max_context]
/// @param num_threads  of the executor
/// @throws ConfigError as KvCache's constructor, or for max_chunk or num_threads below 1.
template <class Rows = f16>
Estimate estimate(const ModelShape& shape, const HeadPlan& plan, const CacheOptions& options,
                  std::int64_t max_chunk, std::size_t num_threads) {
  if (max_chunk < 1) fail<ConfigError>("max_chunk must be at least 1, got ", max_chunk);
  if (num_threads < 1) fail<ConfigError>("num_threads must be at least 1, got ", num_threads);
  const CacheGeometry geometry(shape, plan, options, &FormatOf<Rows>::page_bytes);
  const CacheGeometry dense(shape, HeadPlan(shape), options, &FormatOf<Rows>::page_bytes);
  const std::int64_t chunk = std::min(max_chunk, options.max_context);
  const auto bytes = [&](std::int64_t pages_per_sequence) {
    return static_cast<std::size_t>(options.max_sequences * pages_per_sequence) *
           geometry.page_bytes();
  };
  const std::int64_t held = geometry.pages_held(options.max_context, options.max_context);

  Estimate result;
  result.page_bytes = geometry.page_bytes();
  result.resident_bytes = bytes(held);
  result.transient_bytes = bytes(std::max(held, geometry.peak_pages(chunk)) - held);
  result.pool_bytes = options.page_memory.empty()
                          ? static_cast<std::size_t>(geometry.num_pages()) * geometry.page_bytes()
                          : 0;
  result.metadata_bytes = MetadataLayout(geometry).total_bytes;
  result.scratch_bytes = scratch_size(geometry, chunk, num_threads).num_bytes;
  result.dense_bytes = bytes(dense.pages_held(options.max_context, options.max_context));
  return result;
}

namespace detail {

/// The largest value in [0, limit] for which `fits` holds, `fits` being true up to it.
template <class Fits>
std::int64_t largest_fitting(std::int64_t limit, Fits&& fits) {
  std::int64_t low = 0;
  while (low < limit) {
    const std::int64_t middle = low + (limit - low + 1) / 2;
    if (fits(middle)) {
      low = middle;
    } else {
      limit = middle - 1;
    }
  }
  return low;
}

/// Longest context and most sequences that the inverses look for; beyond any model and server.
inline constexpr std::int64_t kLongestContext = std::int64_t{1} << 30;
inline constexpr std::int64_t kMostSequences = std::int64_t{1} << 20;

/// Whether a pool just large enough for steps of `max_chunk` tokens, and the rest, fit.
template <class Rows>
bool fits_in(const ModelShape& shape, const HeadPlan& plan, CacheOptions options,
             std::int64_t max_chunk, std::size_t num_threads, std::size_t bytes) {
  options.max_bytes = 0;
  options.page_memory = {};
  const Estimate whole = estimate<Rows>(shape, plan, options, max_chunk, num_threads);
  options.max_bytes = whole.resident_bytes + whole.transient_bytes;
  if (options.max_bytes > bytes) return false;
  return estimate<Rows>(shape, plan, options, max_chunk, num_threads).total_bytes() <= bytes;
}

}  // namespace detail

/// The longest max_context whose pool (just large enough for steps of `max_chunk` tokens), metadata
/// and scratch fit into `bytes`; other options as given, max_bytes and page_memory ignored. 0 when
/// not even one token fits.
template <class Rows = f16>
std::int64_t longest_context(const ModelShape& shape, const HeadPlan& plan, CacheOptions options,
                             std::int64_t max_chunk, std::size_t num_threads, std::size_t bytes) {
  return detail::largest_fitting(detail::kLongestContext, [&](std::int64_t context) {
    options.max_context = context;
    return detail::fits_in<Rows>(shape, plan, options, max_chunk, num_threads, bytes);
  });
}

/// The most sequences of max_context tokens that fit into `bytes`; see longest_context.
template <class Rows = f16>
std::int64_t most_sequences(const ModelShape& shape, const HeadPlan& plan, CacheOptions options,
                            std::int64_t max_chunk, std::size_t num_threads, std::size_t bytes) {
  return detail::largest_fitting(detail::kMostSequences, [&](std::int64_t sequences) {
    options.max_sequences = static_cast<int>(sequences);
    return detail::fits_in<Rows>(shape, plan, options, max_chunk, num_threads, bytes);
  });
}

}  // namespace headwise::inline v0
