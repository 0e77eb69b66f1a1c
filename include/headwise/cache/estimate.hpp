// SPDX-License-Identifier: MIT
/// @file estimate.hpp
/// estimate(): the bytes of a cache before it is built, and what fits into given bytes.
#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "headwise/cache/books.hpp"
#include "headwise/cache/geometry.hpp"
#include "headwise/cache/rows/format.hpp"
#include "headwise/cache/rows/tiled_rows.hpp"
#include "headwise/core/checked.hpp"
#include "headwise/core/dtype.hpp"
#include "headwise/core/shape.hpp"
#include "headwise/heads/plan.hpp"

namespace headwise::inline v0 {

/// Bytes, for all sequences and layers together; K and V that layers share count once. What
/// attention needs beside the cache: scratch_bytes() (attention/scratch.hpp).
struct Estimate {
  /// Pages held by max_sequences sequences of max_context tokens, of which selections have left
  /// what KeepSelected::tokens forecasts.
  std::size_t resident_bytes = 0;
  /// More pages while a step of max_chunk tokens each is open, or before anything is selected. A
  /// selection itself takes none but for what checkpoints share, which counts as theirs.
  std::size_t transient_bytes = 0;
  std::size_t checkpoint_bytes = 0;  ///< more pages of all checkpoints, at most

  std::size_t pool_bytes = 0;      ///< what the cache asks its allocator for as page memory
  std::size_t metadata_bytes = 0;  ///< and as tables, lengths and compensation rows

  std::size_t dense_bytes = 0;  ///< resident_bytes if every head kept all that its layer sees

  /// Everything that the cache allocates.
  std::size_t total_bytes() const { return pool_bytes + metadata_bytes; }
  /// False where streaming costs as much as it frees: windows rounded up to pages (and their
  /// second ring) are no smaller than the whole context.
  bool gains() const { return resident_bytes + transient_bytes + checkpoint_bytes < dense_bytes; }
};

namespace detail {

inline Estimate estimate_of(const CacheGeometry& geometry, const CacheGeometry& dense,
                            bool keeps_log) {
  const CacheOptions& options = geometry.options();
  const std::int64_t longest = options.max_context;
  const auto for_all = [&](std::size_t bytes) {
    return checked_mul(static_cast<std::size_t>(options.max_sequences), bytes, "bytes of pages");
  };
  const auto bytes_of = [&](const std::vector<std::int64_t>& pages) {
    std::size_t bytes = 0;
    for (std::size_t size = 0; size < pages.size(); ++size) {
      bytes = checked_add(bytes,
                          checked_mul(static_cast<std::size_t>(pages[size]),
                                      geometry.pool().page_bytes(size), "bytes of pages"),
                          "bytes of pages");
    }
    return bytes;
  };
  const std::size_t peak = bytes_of(geometry.peak_pages(options.max_chunk));
  Estimate result;
  result.resident_bytes = for_all(geometry.bytes_selected(longest, longest));
  result.transient_bytes = std::max(for_all(peak), result.resident_bytes) - result.resident_bytes;
  result.checkpoint_bytes = for_all(bytes_of(geometry.checkpoint_pages()));
  result.pool_bytes = options.page_memory.empty() ? geometry.pool_bytes() : 0;
  result.metadata_bytes = BooksLayout(geometry, keeps_log).sections.total_bytes();
  result.dense_bytes = for_all(dense.bytes_held(longest, longest));
  return result;
}

}  // namespace detail

/// Page bytes that one sequence of `length` tokens holds between steps: KvCache::held_bytes()
/// beforehand, with nothing selected from it yet.
/// @throws ConfigError as KvCache's constructor, and for a length outside [0, max_context].
template <class Rows = f16>
std::size_t sequence_bytes(const ModelShape& shape, const HeadPlan& plan,
                           const CacheOptions& options, std::int64_t length) {
  const CacheGeometry geometry(shape, plan, options, FormatList<Rows>::kPageBytes);
  detail::checked_range(length, 0, geometry.options().max_context, "length");
  return geometry.bytes_held(length, length);
}

/// sequence_bytes() of each KV head, layer by layer: what shard() (heads/shard.hpp) evens out.
/// Heads of a layer that reads another's K and V hold nothing.
/// @throws ConfigError as sequence_bytes().
template <class Rows = f16>
std::vector<std::int64_t> head_bytes(const ModelShape& shape, const HeadPlan& plan,
                                     const CacheOptions& options, std::int64_t length) {
  const CacheGeometry geometry(shape, plan, options, FormatList<Rows>::kPageBytes);
  detail::checked_range(length, 0, geometry.options().max_context, "length");
  std::vector<std::int64_t> bytes;
  for (int l = 0; l < shape.num_layers(); ++l) {
    for (int h = 0; h < shape.layer(l).num_kv_heads; ++h) {
      const auto class_idx = static_cast<std::size_t>(geometry.head(l, h).class_idx);
      const std::size_t held =
          geometry.head_bytes_held(geometry.classes()[class_idx], length, length);
      bytes.push_back(shape.layer(l).owns_kv()
                          ? detail::checked_cast<std::int64_t>(held, "bytes of a head")
                          : 0);
    }
  }
  return bytes;
}

/// What a KvCache<Rows> of these arguments asks its allocator for. CacheOptions::max_chunk bounds
/// the steps; with max_bytes 0 the pool holds resident, transient and checkpoints' bytes (in whole
/// slabs, where layers differ in width).
/// @throws ConfigError as KvCache's constructor.
template <class Rows = f16>
Estimate estimate(const ModelShape& shape, const HeadPlan& plan, const CacheOptions& options) {
  const CacheGeometry geometry(shape, plan, options, FormatList<Rows>::kPageBytes);
  const CacheGeometry dense(shape, HeadPlan(shape), options, FormatList<Rows>::kPageBytes);
  return detail::estimate_of(geometry, dense, /*keeps_log=*/false);
}

/// One row of bytes_by_context(): what one sequence holds.
struct ContextBytes {
  std::int64_t context = 0;         ///< its length in tokens
  std::size_t resident_bytes = 0;   ///< pages between steps
  std::size_t transient_bytes = 0;  ///< more of them while the step to this length is open
  std::size_t dense_bytes = 0;      ///< resident_bytes if every head kept everything
  /// False where streaming costs as much as it frees, as Estimate::gains().
  bool gains() const { return resident_bytes + transient_bytes < dense_bytes; }
};

/// Bytes against context: a row for each length, of one sequence in a cache of these arguments
/// that gets there in steps of max_chunk tokens.
/// @param contexts  lengths in [0, max_context], in any order
/// @throws ConfigError as KvCache's constructor, and for a length out of range.
template <class Rows = f16>
std::vector<ContextBytes> bytes_by_context(const ModelShape& shape, const HeadPlan& plan,
                                           const CacheOptions& options,
                                           std::span<const std::int64_t> contexts) {
  const CacheGeometry geometry(shape, plan, options, FormatList<Rows>::kPageBytes);
  const CacheGeometry dense(shape, HeadPlan(shape), options, FormatList<Rows>::kPageBytes);
  std::vector<ContextBytes> rows;
  for (const std::int64_t n : contexts) {
    detail::checked_range(n, 0, geometry.options().max_context, "a context");
    const std::int64_t before = std::max<std::int64_t>(0, n - geometry.options().max_chunk);
    ContextBytes row;
    row.context = n;
    row.resident_bytes = geometry.bytes_held(n, n);
    row.transient_bytes = geometry.bytes_in_step({before, before, n}) - row.resident_bytes;
    row.dense_bytes = dense.bytes_held(n, n);
    rows.push_back(row);
  }
  return rows;
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

/// Whether a pool for any step, and the rest, fit.
/// @param total  `total(geometry)`: all bytes; asked where the pool alone fits
template <class Rows, class Total>
bool fits_in(const ModelShape& shape, const HeadPlan& plan, const CacheOptions& options,
             std::size_t bytes, const Total& total) {
  if (!CacheGeometry::places_fit(options)) return false;
  const CacheGeometry geometry(shape, plan, options, FormatList<Rows>::kPageBytes);
  // In double: a pool far beyond all bytes may have more pages than can be named, and more bytes
  // than 64 bits count.
  const std::vector<std::int64_t> pages = geometry.most_pages(geometry.options().max_chunk);
  double slabs = 0.0;
  for (std::size_t size = 0; size < pages.size(); ++size) {
    slabs += std::ceil(static_cast<double>(pages[size]) * options.max_sequences /
                       static_cast<double>(geometry.pool().pages_per_slab(size)));
  }
  return slabs * static_cast<double>(geometry.pool().slab_bytes()) <= static_cast<double>(bytes) &&
         slabs <= static_cast<double>(PagePool::max_slabs(geometry.pool())) &&
         total(geometry) <= bytes;
}

/// What a cache on the host takes, and what is to lie beside it.
template <BytesBeside Beside>
auto host_total(const Beside& beside) {
  return [&beside](const CacheGeometry& geometry) {
    const std::size_t metadata = BooksLayout(geometry, /*keeps_log=*/false).sections.total_bytes();
    return checked_add(checked_add(geometry.pool_bytes(), metadata, "bytes of a cache"),
                       static_cast<std::size_t>(beside(geometry.options())), "bytes of a cache");
  };
}

/// longest_context() of any place.
template <class Rows, class Total>
std::int64_t longest_context_of(const ModelShape& shape, const HeadPlan& plan, CacheOptions options,
                                std::size_t bytes, const Total& total) {
  options.max_bytes = 0;
  options.page_memory = {};
  return largest_fitting(kLongestContext, [&](std::int64_t context) {
    options.max_context = context;
    return fits_in<Rows>(shape, plan, options, bytes, total);
  });
}

/// most_sequences() of any place.
template <class Rows, class Total>
std::int64_t most_sequences_of(const ModelShape& shape, const HeadPlan& plan, CacheOptions options,
                               std::size_t bytes, const Total& total) {
  options.max_bytes = 0;
  options.page_memory = {};
  return largest_fitting(kMostSequences, [&](std::int64_t sequences) {
    options.max_sequences = static_cast<int>(sequences);
    return fits_in<Rows>(shape, plan, options, bytes, total);
  });
}

}  // namespace detail

/// The longest max_context whose pool (large enough for any step), metadata and what is to lie
/// beside the cache fit into `bytes`; other options as given, max_bytes and page_memory ignored.
/// 0 when not even one token fits.
/// @param beside  `[&](const CacheOptions& o) { return scratch_bytes(shape, plan, o, n); }` with
///   attention's scratch
template <class Rows = f16, BytesBeside Beside = NothingBeside>
std::int64_t longest_context(const ModelShape& shape, const HeadPlan& plan,
                             const CacheOptions& options, std::size_t bytes,
                             const Beside& beside = {}) {
  return detail::longest_context_of<Rows>(shape, plan, options, bytes, detail::host_total(beside));
}

/// The most sequences of max_context tokens that fit into `bytes`; see longest_context.
template <class Rows = f16, BytesBeside Beside = NothingBeside>
std::int64_t most_sequences(const ModelShape& shape, const HeadPlan& plan,
                            const CacheOptions& options, std::size_t bytes,
                            const Beside& beside = {}) {
  return detail::most_sequences_of<Rows>(shape, plan, options, bytes, detail::host_total(beside));
}

}  // namespace headwise::inline v0
