// SPDX-License-Identifier: MIT
/// @file prefill.cuh
/// Prefill: chunks of many sequences, every head under its own window rule.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "headwise/attention/cuda/head_dims.cuh"
#include "headwise/attention/cuda/tensor_core.cuh"
#include "headwise/cache/cuda/device_cache.cuh"
#include "headwise/cache/cuda/step_state.cuh"
#include "headwise/core/tensor_view.hpp"

namespace headwise::inline v0::cuda {

/// One layer's chunks as a kernel's parameters.
struct PrefillArgs {
  DeviceStep step;                    ///< the open step and the pages
  LayerHeads heads;                   ///< those to attend; others are not touched
  TensorView<const std::uint16_t> q;  ///< [rows, num_qo_heads, dim]
  TensorView<const std::uint16_t> k;  ///< [rows, num_kv_heads, dim] the step's own
  TensorView<const std::uint16_t> v;  ///< [rows, num_kv_heads, dim]
  TensorView<std::uint16_t> out;      ///< [rows, num_qo_heads, dim]
  std::int32_t group_size = 1;        ///< query heads per KV head
  float scale_log2 = 1.0F;            ///< softmax scale x log2(e)
};

namespace detail {

inline constexpr int kPrefillWarps = 4;
/// Keys handled at once. With 32 tokens of 4 heads a tile, a window of 64 + 256 costs 2 + 9 blocks
/// of 32: 352 keys where 320 are seen; blocks of 64 would cost 384.
inline constexpr int kPrefillKeys = 32;
inline constexpr int kPrefillStages = 3;

/// Tiles of 16 query rows in a warp: two share each K and V fragment, which halves the reads of
/// shared memory; width 256 has no registers for it.
__host__ __device__ constexpr int prefill_row_tiles(int dim) { return dim <= 128 ? 2 : 1; }
__host__ __device__ constexpr int prefill_rows(int dim) {
  return kPrefillWarps * 16 * prefill_row_tiles(dim);
}

__host__ __device__ constexpr std::size_t prefill_bytes(int dim) {
  const auto row = static_cast<std::size_t>(dim + 8) * 2;
  return (static_cast<std::size_t>(prefill_rows(dim)) + kPrefillStages * 2 * kPrefillKeys) * row;
}

/// Keys of consecutive positions from one source: the step's own rows, or consecutive slots.
struct KeyRange {
  std::int32_t first_pos = 0;
  std::int32_t count = 0;
  std::int32_t slot = -1;  ///< of the first key; -1: the step's own rows
};

/// What one block works on: some tokens of one sequence's chunk, all query heads of one KV head.
struct PrefillTile {
  EntryState entry;
  ClassState state;
  std::int32_t head = 0;
  std::int32_t first_token = 0;
  std::int32_t num_tokens = 0;
  std::int32_t num_ranges = 0;
  KeyRange ranges[8];  // four sources, each seen at its sinks and at its recent end
};

/// Adds what some query at [oldest, newest] sees of positions [first, first + count).
__device__ inline void add_seen(PrefillTile& tile, int oldest, int newest, int first, int count,
                                int slot) {
  if (count == 0) return;
  const ClassState& state = tile.state;
  const auto within = [](int x, int low, int high) { return min(max(x, low), high); };
  const int end = within(newest - first + 1, 0, count);
  const int sinks = within(state.sink - first, 0, end);
  const int recent = within(oldest - state.recent + 1 - first, sinks, end);
  const auto add = [&](int from, int to) {
    if (from >= to) return;
    tile.ranges[tile.num_ranges++] = {first + from, to - from, slot < 0 ? -1 : slot + from};
  };
  if (sinks == recent) {
    add(0, end);
  } else {
    add(0, sinks);
    add(recent, end);
  }
}

/// Which chunk tile `index` is of, and the tile's number in it; one warp, all lanes alike.
struct ChunkTile {
  int entry = -1;
  int index = 0;
};
__device__ inline ChunkTile find_chunk(const DeviceStep& step, int index, int tile_tokens) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  for (int base = 0; base < step.max_sequences; base += 32) {
    const int e = base + lane;
    // Read before num_entries is known: one latency less.
    const int tokens = e < step.max_sequences ? static_cast<int>(step.entries[e].num_tokens) : 0;
    const bool counts = e < step.header->num_entries && tokens > 1;
    int tiles = counts ? (tokens + tile_tokens - 1) / tile_tokens : 0;
    const int own = tiles;
    for (int d = 1; d < 32; d *= 2) {
      const int below = __shfl_up_sync(kWholeWarp, tiles, static_cast<unsigned>(d));
      if (lane >= d) tiles += below;
    }
    const unsigned behind = __ballot_sync(kWholeWarp, index < tiles);
    if (behind != 0) {
      const int found = __ffs(static_cast<int>(behind)) - 1;
      return {base + found, index - __shfl_sync(kWholeWarp, tiles - own, found)};
    }
    index -= __shfl_sync(kWholeWarp, tiles, 31);
  }
  return {};
}

/// Describes a chunk's tile and lists the keys that it needs; one thread.
__device__ inline void describe(const PrefillArgs& args, const ChunkTile& chunk, int head,
                                int tile_tokens, PrefillTile& tile) {
  tile.num_tokens = 0;
  if (chunk.entry < 0) return;
  tile.entry = args.step.entries[chunk.entry];
  tile.state = args.step.classes[chunk.entry * args.step.num_classes + args.heads.class_idx[head]];
  tile.head = head;
  tile.first_token = chunk.index * tile_tokens;
  tile.num_tokens = min(tile_tokens, static_cast<int>(tile.entry.num_tokens) - tile.first_token);
  tile.num_ranges = 0;
  const int length = static_cast<int>(tile.entry.length);
  const int oldest = length + tile.first_token;
  const int newest = oldest + tile.num_tokens - 1;
  const ClassState& s = tile.state;
  add_seen(tile, oldest, newest, 0, s.first_count, 0);
  add_seen(tile, oldest, newest, s.older_pos, s.older_count, s.older_slot);
  add_seen(tile, oldest, newest, s.older_pos + s.older_count, s.newer_count, s.newer_slot);
  add_seen(tile, oldest, newest, length, static_cast<int>(tile.entry.num_tokens), -1);
}

/// Walks over a tile's keys, kPrefillKeys at a time.
struct KeyWalk {
  int range = 0;
  int done = 0;  ///< keys of the range

  __device__ bool at_end(const PrefillTile& tile) const { return range >= tile.num_ranges; }
  __device__ int count(const PrefillTile& tile) const {
    return min(tile.ranges[range].count - done, kPrefillKeys);
  }
  __device__ void advance(const PrefillTile& tile) {
    done += kPrefillKeys;
    if (done >= tile.ranges[range].count) {
      ++range;
      done = 0;
    }
  }
};

/// Starts the copy of the keys at `walk`: K rows, then V rows, padded. Rows past the last one
/// repeat it, so that what is multiplied by zero is a number.
template <int kDim>
__device__ void copy_keys(const PrefillArgs& args, const PrefillTile& tile, const KeyWalk& walk,
                          std::uint32_t to) {
  constexpr int kChunks = kDim / 8;
  constexpr int kThreads = kPrefillWarps * 32;
  const KeyRange range = tile.ranges[walk.range];
  const int last = walk.count(tile) - 1;
  const bool is_own = range.slot < 0;
  const std::int32_t* table = args.step.page_table + tile.entry.table_base +
                              args.heads.table_offset[tile.head] + tile.state.read_entry;
  const std::int64_t own_row =
      tile.entry.first_row + (range.first_pos - tile.entry.length) + walk.done;
  const int first_slot = range.slot + walk.done;
  const int kv_head = args.heads.kv_head[tile.head];
  for (int i = static_cast<int>(threadIdx.x); i < kPrefillKeys * kChunks; i += kThreads) {
    const int row = i / kChunks;
    const int column = i % kChunks * 8;
    const int key = min(row, last);
    const std::uint16_t* from_k = nullptr;
    const std::uint16_t* from_v = nullptr;
    if (is_own) {
      from_k = row_at(args.k, own_row + key, kv_head) + column;
      from_v = row_at(args.v, own_row + key, kv_head) + column;
    } else {
      const int slot = first_slot + key;
      from_k = reinterpret_cast<const std::uint16_t*>(
                   args.step.pages +
                   static_cast<std::size_t>(table[slot / kPageTokens]) * args.step.page_bytes) +
               slot % kPageTokens * kDim + column;
      from_v = from_k + kPageTokens * kDim;
    }
    const std::uint32_t at = to + static_cast<std::uint32_t>(row * kPaddedDim<kDim> + column) * 2;
    copy_async_16(at, from_k);
    copy_async_16(at + kPrefillKeys * kPaddedDim<kDim> * 2, from_v);
  }
}

/// A warp's query rows and their softmax. Lane 4g + t has rows g and g + 8 of each tile of 16.
template <class Row, int kDim>
class PrefillState {
 public:
  static constexpr int kTiles = prefill_row_tiles(kDim);

  /// @param pos  positions of the lane's rows, [tile][row g, row g + 8].
  __device__ explicit PrefillState(const std::int32_t (&pos)[kTiles][2]) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        pos_[m][r] = pos[m][r];
        max_[m][r] = kMasked;
        sum_[m][r] = 0.0F;
      }
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) out_[m][n][i] = 0.0F;
      }
    }
  }

  /// Adds keys of positions [first, first + count), count <= kPrefillKeys.
  /// @param q, k  shared-memory addresses of the warp's query rows and of the keys; V behind K.
  /// @param needs_mask  whether some row does not see some key.
  __device__ void add(std::uint32_t q, std::uint32_t k, int first, int count, bool needs_mask,
                      const ClassState& state, float scale_log2) {
    float score[kTiles][kPrefillKeys / 8][4] = {};
    multiply_keys(q, k, score);
    if (needs_mask) mask(first, count, state, score);
    softmax(scale_log2, score);
    multiply_values(k + kPrefillKeys * kRowBytes, score);
  }

  /// Writes the rows' outputs over the warp's query rows in shared memory.
  __device__ void store(std::uint16_t* rows) {
    const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float sum = sum_[m][r];
        sum += __shfl_xor_sync(kWholeWarp, sum, 1);
        sum += __shfl_xor_sync(kWholeWarp, sum, 2);
        const float inverse = sum > 0.0F ? 1.0F / sum : 0.0F;
        std::uint16_t* row = rows + (m * 16 + lane / 4 + r * 8) * kPaddedDim<kDim> + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < kDim / 8; ++n) {
          *reinterpret_cast<std::uint32_t*>(row + n * 8) =
              TensorCore<Row>::pack(out_[m][n][2 * r] * inverse, out_[m][n][2 * r + 1] * inverse);
        }
      }
    }
  }

 private:
  static constexpr int kRowBytes = kPaddedDim<kDim> * 2;
  using Scores = float[kTiles][kPrefillKeys / 8][4];

  __device__ void multiply_keys(std::uint32_t q, std::uint32_t k, Scores& score) const {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const std::uint32_t q_at = q + (lane % 16) * kRowBytes + lane / 16 * 16;
    const std::uint32_t k_at = k + (lane % 8 + lane / 16 * 8) * kRowBytes + lane / 8 % 2 * 16;
#pragma unroll
    for (int b = 0; b < kDim / 16; ++b) {
      std::uint32_t rows[kTiles][4];
#pragma unroll
      for (int m = 0; m < kTiles; ++m) load_matrices(rows[m], q_at + m * 16 * kRowBytes + b * 32);
#pragma unroll
      for (int n = 0; n < kPrefillKeys / 16; ++n) {
        std::uint32_t keys[4];
        load_matrices(keys, k_at + n * 16 * kRowBytes + b * 32);
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          TensorCore<Row>::multiply(score[m][2 * n], rows[m], keys[0], keys[1]);
          TensorCore<Row>::multiply(score[m][2 * n + 1], rows[m], keys[2], keys[3]);
        }
      }
    }
  }

  __device__ void mask(int first, int count, const ClassState& state, Scores& score) const {
    const int lane = static_cast<int>(threadIdx.x % 32);
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
#pragma unroll
      for (int n = 0; n < kPrefillKeys / 8; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int key = n * 8 + lane % 4 * 2 + i % 2;
          const int pos = first + key;
          const int query = pos_[m][i / 2];
          const bool sees =
              key < count && pos <= query && (pos < state.sink || query - pos < state.recent);
          if (!sees) score[m][n][i] = kMasked;
        }
      }
    }
  }

  /// Scores become weights, in units of exp2; the rows' earlier results are rescaled where a new
  /// maximum asks for it.
  __device__ void softmax(float scale_log2, Scores& score) {
#pragma unroll
    for (int m = 0; m < kTiles; ++m) {
      float top[2] = {max_[m][0], max_[m][1]};
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int n = 0; n < kPrefillKeys / 8; ++n) {
          top[r] = fmaxf(top[r], fmaxf(score[m][n][2 * r], score[m][n][2 * r + 1]));
        }
        top[r] = fmaxf(top[r], __shfl_xor_sync(kWholeWarp, top[r], 1));
        top[r] = fmaxf(top[r], __shfl_xor_sync(kWholeWarp, top[r], 2));
      }
      if (__any_sync(kWholeWarp, top[0] > max_[m][0] || top[1] > max_[m][1])) {
        rescale(m, top, scale_log2);
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        // A row that has seen nothing yet must not take masked keys for its maximum: weight 0.
        const float offset = max_[m][r] <= kMasked ? 0.0F : max_[m][r] * scale_log2;
#pragma unroll
        for (int n = 0; n < kPrefillKeys / 8; ++n) {
#pragma unroll
          for (int i = 2 * r; i < 2 * r + 2; ++i) {
            score[m][n][i] = exp2_fast(fmaf(score[m][n][i], scale_log2, -offset));
            sum_[m][r] += score[m][n][i];
          }
        }
      }
    }
  }

  __device__ void rescale(int m, const float (&top)[2], float scale_log2) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float factor = exp2_fast((max_[m][r] - top[r]) * scale_log2);
      max_[m][r] = top[r];
      sum_[m][r] *= factor;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        out_[m][n][2 * r] *= factor;
        out_[m][n][2 * r + 1] *= factor;
      }
    }
  }

  __device__ void multiply_values(std::uint32_t v, const Scores& weight) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const std::uint32_t v_at = v + (lane % 16) * kRowBytes + lane / 16 * 16;
#pragma unroll
    for (int k = 0; k < kPrefillKeys / 16; ++k) {
      std::uint32_t rows[kTiles][4];
#pragma unroll
      for (int m = 0; m < kTiles; ++m) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float* pair = &weight[m][2 * k + i / 2][i % 2 * 2];
          rows[m][i] = TensorCore<Row>::pack(pair[0], pair[1]);
        }
      }
#pragma unroll
      for (int n = 0; n < kDim / 16; ++n) {
        std::uint32_t values[4];
        load_matrices_transposed(values, v_at + k * 16 * kRowBytes + n * 32);
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
          TensorCore<Row>::multiply(out_[m][2 * n], rows[m], values[0], values[1]);
          TensorCore<Row>::multiply(out_[m][2 * n + 1], rows[m], values[2], values[3]);
        }
      }
    }
  }

  std::int32_t pos_[kTiles][2];
  float max_[kTiles][2];  // of the scores before scaling
  float sum_[kTiles][2];
  float out_[kTiles][kDim / 8][4];
};

/// One block a tile of tokens and KV head; the tile's rows are (token, query head of the group).
///
/// Cost: a tile reads the keys that any of its tokens sees, so a streaming head costs O(n x
/// window). Aims at mma.sync's rate; published kernels of this class run 260-350 TFLOP/s on an
/// H200.
template <class Row, int kDim>
__global__ void __launch_bounds__(kPrefillWarps * 32, kDim <= 128 ? 2 : 1)
    prefill_kernel(const __grid_constant__ PrefillArgs args) {
  extern __shared__ __align__(128) std::uint16_t memory[];
  __shared__ PrefillTile tile;
  constexpr int kTiles = prefill_row_tiles(kDim);
  constexpr int kRows = prefill_rows(kDim);
  constexpr int kStageElements = 2 * kPrefillKeys * kPaddedDim<kDim>;
  const int tile_tokens = kRows / args.group_size;
  if (threadIdx.x < 32) {
    // The last tokens see most: they start first.
    const ChunkTile chunk =
        find_chunk(args.step, static_cast<int>(gridDim.x - 1 - blockIdx.x), tile_tokens);
    if (threadIdx.x == 0) {
      describe(args, chunk, static_cast<int>(blockIdx.y), tile_tokens, tile);
    }
  }
  __syncthreads();
  if (tile.num_tokens == 0) return;

  std::uint16_t* q_rows = memory;
  std::uint16_t* stages = memory + kRows * kPaddedDim<kDim>;
  const std::int64_t first_row = tile.entry.first_row + tile.first_token;
  const int first_head = args.heads.kv_head[tile.head] * args.group_size;
  const int num_rows = tile.num_tokens * args.group_size;
  constexpr int kChunks = kDim / 8;
  for (int i = static_cast<int>(threadIdx.x); i < kRows * kChunks; i += kPrefillWarps * 32) {
    const int row = i / kChunks;
    const int column = i % kChunks * 8;
    const bool exists = row < num_rows;
    const int used = exists ? row : 0;
    copy_async_16(
        shared_address(q_rows + row * kPaddedDim<kDim> + column),
        row_at(args.q, first_row + used / args.group_size, first_head + used % args.group_size) +
            column,
        exists);
  }
  KeyWalk copied;
  const auto copy_next = [&](int stage) {
    if (!copied.at_end(tile)) {
      copy_keys<kDim>(args, tile, copied, shared_address(stages + stage * kStageElements));
      copied.advance(tile);
    }
    commit_copies();
  };
  for (int i = 0; i < kPrefillStages - 1; ++i) copy_next(i);

  const int lane = static_cast<int>(threadIdx.x % 32);
  const int warp_row = static_cast<int>(threadIdx.x / 32) * 16 * kTiles;
  const auto pos_of = [&](int row) {
    const int token = min(row, num_rows - 1) / args.group_size;
    return static_cast<std::int32_t>(tile.entry.length) + tile.first_token + token;
  };
  std::int32_t pos[kTiles][2];
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
    pos[m][0] = pos_of(warp_row + m * 16 + lane / 4);
    pos[m][1] = pos_of(warp_row + m * 16 + lane / 4 + 8);
  }
  const int oldest = pos_of(warp_row);
  const int newest = pos_of(warp_row + 16 * kTiles - 1);
  PrefillState<Row, kDim> state(pos);

  const std::uint32_t q_at = shared_address(q_rows + warp_row * kPaddedDim<kDim>);
  int stage = 0;
  for (KeyWalk walk; !walk.at_end(tile); walk.advance(tile)) {
    wait_copies<kPrefillStages - 2>();
    __syncthreads();  // all threads' copies have landed; the stage before is no longer read
    copy_next(stage == 0 ? kPrefillStages - 1 : stage - 1);
    const int first = tile.ranges[walk.range].first_pos + walk.done;
    const int count = walk.count(tile);
    const int last = first + count - 1;
    const ClassState& rule = tile.state;
    const bool all_seen = count == kPrefillKeys && last <= oldest &&
                          (last < rule.sink || newest - first < rule.recent);
    // Whether any row of this warp sees any of the keys.
    const bool some_seen = first <= newest && (first < rule.sink || oldest - last < rule.recent);
    if (some_seen) {
      state.add(q_at, shared_address(stages + stage * kStageElements), first, count, !all_seen,
                rule, args.scale_log2);
    }
    stage = stage + 1 == kPrefillStages ? 0 : stage + 1;
  }

  // Through shared memory, so that rows leave in 16-byte pieces.
  std::uint16_t* rows = q_rows + warp_row * kPaddedDim<kDim>;
  __syncwarp();
  state.store(rows);
  __syncwarp();
  for (int i = lane; i < 16 * kTiles * kChunks; i += 32) {
    const int row = i / kChunks;
    if (warp_row + row >= num_rows) break;
    const int column = i % kChunks * 8;
    const int token = (warp_row + row) / args.group_size;
    const int head = first_head + (warp_row + row) % args.group_size;
    *reinterpret_cast<uint4*>(row_at(args.out, first_row + token, head) + column) =
        *reinterpret_cast<const uint4*>(rows + row * kPaddedDim<kDim> + column);
  }
}

}  // namespace detail

/// Tiles of a chunk; single tokens are decode's.
inline std::int64_t prefill_tiles(std::int64_t num_tokens, int group_size, int dim) {
  const std::int64_t tokens = detail::prefill_rows(dim) / group_size;
  return num_tokens > 1 ? (num_tokens + tokens - 1) / tokens : 0;
}

/// Lets the kernel for `dim` use its shared memory; once, at set-up.
/// @return cudaErrorInvalidValue where `dim` is not one of Dims.
template <DeviceRow Row, class Dims = AllHeadDims>
cudaError_t prepare_prefill(int dim) {
  return with_head_dim(Dims{}, dim, [&](auto d) {
    constexpr int kDim = decltype(d)::value;
    return cudaFuncSetAttribute(detail::prefill_kernel<Row, kDim>,
                                cudaFuncAttributeMaxDynamicSharedMemorySize,
                                static_cast<int>(detail::prefill_bytes(kDim)));
  });
}

/// Attends one layer's chunks, whichever prefill mode the step was begun in, over the rows stored
/// before the step and the step's own.
/// @param num_tiles  the sum of prefill_tiles() over the step's chunks.
/// @pre group_size <= 64; q, k, v and out are 16-byte aligned, their strides multiples of 8
/// elements.
template <DeviceRow Row, class Dims = AllHeadDims>
cudaError_t prefill(const PrefillArgs& args, int dim, std::int64_t num_tiles, cudaStream_t stream) {
  if (num_tiles == 0 || args.heads.num_heads == 0) return cudaSuccess;
  return with_head_dim(Dims{}, dim, [&](auto d) {
    constexpr int kDim = decltype(d)::value;
    detail::prefill_kernel<Row, kDim>
        <<<dim3(static_cast<unsigned>(num_tiles), static_cast<unsigned>(args.heads.num_heads)),
           detail::kPrefillWarps * 32, detail::prefill_bytes(kDim), stream>>>(args);
    return cudaGetLastError();
  });
}

}  // namespace headwise::inline v0::cuda
