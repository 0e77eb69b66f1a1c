// SPDX-License-Identifier: MIT
/// @file chunk_rule.cuh
/// Who attends a chunk: decode, in items of which size, or prefill. One rule for host and device.
#pragma once

#include <cstdint>

#include "headwise/core/config.hpp"

namespace headwise::inline v0::cuda {

/// Most query heads of a KV head.
inline constexpr int kMostGroup = 128;

/// A size of decode items: query rows for which K and V are read once. Each has a kernel.
///
/// A warp multiplies 16 K and V rows with 8 or 16 query rows, the M and one or two N of
/// mma.m16n8k16. Two or four warps with query rows of their own share what they read, in tiles of
/// as many times 16 rows.
struct DecodeSize {
  int rows = 0;   ///< query rows (token, query head of the group) of an item
  int warps = 0;  ///< that share a tile

  /// Sizes there are: 8, 16, 32 and 64 rows. The first one is for single tokens only.
  static constexpr int kCount = 4;
  /// Query rows of the largest.
  static constexpr int kMostRows = 64;

  HEADWISE_HOST_DEVICE constexpr explicit DecodeSize(int size)
      : rows(8 << size), warps(size < 2 ? 1 : 1 << (size - 1)) {}
  /// K and V rows of a tile.
  HEADWISE_HOST_DEVICE constexpr int tile_rows() const { return 16 * warps; }
};

/// Which chunks of a layer decode attends.
///
/// Decode splits a sequence over the device and reads K and V once for the rows of an item, prefill
/// reads them once for 128 query rows and splits nothing: as long as all rows of a chunk fit an
/// item, reading is what it costs.
struct ChunkRule {
  /// What decode_size() says of a chunk that is prefill's, or empty.
  static constexpr int kNone = -1;

  std::int32_t group_size = 1;  ///< query heads per KV head
  /// The largest size that the device has shared memory for.
  std::int32_t largest_size = DecodeSize::kCount - 1;

  /// The size of a chunk's items, kNone where decode does not attend it.
  HEADWISE_HOST_DEVICE constexpr int decode_size(std::int64_t num_tokens) const {
    const std::int64_t rows = num_tokens * group_size;
    if (num_tokens < 1 || (num_tokens > 1 && rows > DecodeSize::kMostRows)) return kNone;
    int size = num_tokens == 1 ? 0 : 1;
    while (size < largest_size && rows > DecodeSize(size).rows) ++size;
    return size;
  }
  /// Most items of a size that one KV head of a sequence has.
  HEADWISE_HOST_DEVICE constexpr int items_a_head(int size) const {
    if (size < largest_size) return 1;
    const int most = group_size > DecodeSize::kMostRows ? group_size : DecodeSize::kMostRows;
    return (most + DecodeSize(size).rows - 1) / DecodeSize(size).rows;
  }
};

/// Whether prefill attends a chunk.
HEADWISE_HOST_DEVICE constexpr bool is_prefilled(std::int64_t num_tokens, int group_size) {
  return num_tokens > 1 && ChunkRule{group_size}.decode_size(num_tokens) == ChunkRule::kNone;
}

}  // namespace headwise::inline v0::cuda
