// SPDX-License-Identifier: MIT
/// @file estimate.hpp
/// estimate(): the bytes of a cache before it is built, and what fits into given bytes.
#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>

#include "headwise/cache/geometry.hpp"
#include "headwise/cache/page_ledger.hpp"
#include "headwise/cache/rows/format.hpp"
#include "headwise/cache/rows/tiled_rows.hpp"
#include "headwise/core/dtype.hpp"
#include "headwise/core/shape.hpp"
#include "headwise/heads/plan.hpp"

namespace headwise::inline v0 {

/// Bytes, for all sequences and layers together. What attention needs beside the cache:
/// scratch_bytes() (attention/scratch.hpp).
struct Estimate {
  std::size_t page_bytes = 0;  ///< one page

  std::size_t resident_bytes = 0;   ///< pages held by max_sequences sequences of max_context tokens
  std::size_t transient_bytes = 0;  ///< more pages while a step of max_chunk tokens each is open

  std::size_t pool_bytes = 0;      ///< what the cache asks its allocator for as page memory
  std::size_t metadata_bytes = 0;  ///< and as tables, lengths and compensation rows

  std::size_t dense_bytes = 0;  ///< resident_bytes if every head kept everything

  /// Everything that the cache allocates.
  std::size_t total_bytes() const { return pool_bytes + metadata_bytes; }
  /// False where streaming costs as much as it frees: windows rounded up to pages (and their
  /// second ring) are no smaller than the whole context.
  bool gains() const { return resident_bytes + transient_bytes < dense_bytes; }
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

/// What a KvCache<Rows> of these arguments asks its allocator for.
/// @param max_chunk  most tokens a sequence gets in one step, in [1, max_context]
/// @throws ConfigError as KvCache's constructor, or for max_chunk below 1.
template <class Rows = f16>
Estimate estimate(const ModelShape& shape, const HeadPlan& plan, const CacheOptions& options,
                  std::int64_t max_chunk) {
  if (max_chunk < 1) fail<ConfigError>("max_chunk must be at least 1, got ", max_chunk);
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
  result.dense_bytes = bytes(dense.pages_held(options.max_context, options.max_context));
  return result;
}

/// What must fit beside a cache of these options: a callable that says the bytes. They must not
/// shrink as max_context or max_sequences grow.
template <class Fn>
concept BytesBeside = requires(Fn fn, const CacheOptions& options) {
  { fn(options) } -> std::convertible_to<std::size_t>;
};

/// The cache alone.
struct NothingBeside {
  /// No bytes.
  constexpr std::size_t operator()(const CacheOptions&) const { return 0; }
};

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
template <class Rows, BytesBeside Beside>
bool fits_in(const ModelShape& shape, const HeadPlan& plan, CacheOptions options,
             std::int64_t max_chunk, std::size_t bytes, const Beside& beside) {
  options.max_bytes = 0;
  options.page_memory = {};
  const Estimate whole = estimate<Rows>(shape, plan, options, max_chunk);
  options.max_bytes = whole.resident_bytes + whole.transient_bytes;
  if (options.max_bytes > bytes) return false;
  const std::size_t cache = estimate<Rows>(shape, plan, options, max_chunk).total_bytes();
  return cache <= bytes && beside(options) <= bytes - cache;
}

}  // namespace detail

/// The longest max_context whose pool (just large enough for steps of `max_chunk` tokens), metadata
/// and what is to lie beside the cache fit into `bytes`; other options as given, max_bytes and
/// page_memory ignored. 0 when not even one token fits.
/// @param beside  `[&](const CacheOptions& o) { return scratch_bytes(shape, plan, o, chunk, n); }`
///   with attention's scratch
template <class Rows = f16, BytesBeside Beside = NothingBeside>
std::int64_t longest_context(const ModelShape& shape, const HeadPlan& plan, CacheOptions options,
                             std::int64_t max_chunk, std::size_t bytes, const Beside& beside = {}) {
  return detail::largest_fitting(detail::kLongestContext, [&](std::int64_t context) {
    options.max_context = context;
    return detail::fits_in<Rows>(shape, plan, options, max_chunk, bytes, beside);
  });
}

/// The most sequences of max_context tokens that fit into `bytes`; see longest_context.
template <class Rows = f16, BytesBeside Beside = NothingBeside>
std::int64_t most_sequences(const ModelShape& shape, const HeadPlan& plan, CacheOptions options,
                            std::int64_t max_chunk, std::size_t bytes, const Beside& beside = {}) {
  return detail::largest_fitting(detail::kMostSequences, [&](std::int64_t sequences) {
    options.max_sequences = static_cast<int>(sequences);
    return detail::fits_in<Rows>(shape, plan, options, max_chunk, bytes, beside);
  });
}

}  // namespace headwise::inline v0
