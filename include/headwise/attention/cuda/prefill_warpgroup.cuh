// SPDX-License-Identifier: MIT
/// @file prefill_warpgroup.cuh
/// The prefill kernel of warpgroup products (wgmma): head widths 64 and 128, code for sm_90a.
///
/// A block stays on its multiprocessor and draws tiles until there are none. One warpgroup copies:
/// it runs ahead through a ring of key blocks, into the next tile where this one's keys have all
/// been fetched. Two warpgroups multiply, 64 query rows each; the scores of the next keys are under
/// way while a warpgroup turns the present ones into weights.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "headwise/attention/cuda/prefill_softmax.cuh"
#include "headwise/attention/cuda/prefill_tile.cuh"
#include "headwise/attention/cuda/tensor_core.cuh"
#include "headwise/attention/cuda/warpgroup.cuh"

namespace headwise::inline v0::cuda::detail {

/// Whether the kernel exists for a head width: operands are whole rows of 64 elements, and width
/// 256 leaves no registers for scores.
__host__ __device__ constexpr bool has_warpgroup_kernel(int dim) { return dim == 64 || dim == 128; }

/// Keys handled at once. 128 would ask for more registers than there are.
inline constexpr int kGroupKeys = 64;
/// Key blocks under way: 256 keys of width 128 are 128 KiB with their values.
inline constexpr int kGroupStages = 4;
inline constexpr int kGroupRows = 128;     // of queries: two warpgroups' 64
inline constexpr int kGroupThreads = 384;  // those two and the one that copies
/// Eight swizzled rows, which begin at a multiple of this.
inline constexpr std::uint32_t kSwizzleBytes = 1024;
/// Tiles that are described at a time: one that is written, one whose scores have begun, one that
/// is copied, the next.
inline constexpr int kGroupTiles = 4;
/// A warp's rows of a key block, each warp of the copying warpgroup a quarter.
inline constexpr int kGroupShare = kGroupKeys / 4;

__host__ __device__ constexpr std::size_t group_bytes(int dim) {
  const auto row = static_cast<std::size_t>(dim) * 2;
  return kSwizzleBytes + kGroupStages * 2 * kGroupKeys * row + 2 * kGroupRows * (row + 16);
}

/// The ring of key blocks: slot 2s holds keys, slot 2s + 1 values of stage s. A slot is [dim / 64]
/// times [kGroupKeys] swizzled rows of 64 elements.
struct KeyRing {
  static constexpr unsigned kSlots = 2 * kGroupStages;
  std::uint64_t full[kSlots];   ///< arrivals of the copying warps
  std::uint64_t empty[kSlots];  ///< arrivals of the multiplying warps
  std::uint64_t queries_read;   ///< the same, for the tile's query rows
};

/// One copying warp's side of the ring. Copies are announced in the order of their start, when
/// they have landed.
class RingFiller {
 public:
  __device__ explicit RingFiller(KeyRing& ring) : ring_(ring) {}

  /// Waits for multiplying warps to be done with something. They may be waiting themselves for what
  /// was copied last: it is announced first.
  __device__ void wait(const std::uint64_t& barrier, unsigned parity) {
    if (!__all_sync(kWholeWarp, has_ended(shared_address(&barrier), parity))) {
      announce_all();
      wait_for(shared_address(&barrier), parity);
    }
  }
  /// Waits until the next slot may be overwritten. @return its number.
  __device__ unsigned acquire() {
    const unsigned slot = issued_ % KeyRing::kSlots;
    wait(ring_.empty[slot], (issued_ / KeyRing::kSlots + 1) % 2);  // a fresh ring is empty
    return slot;
  }
  /// The slot's copies have been started.
  __device__ void issue() {
    commit_copies();
    ++issued_;
    if (issued_ - announced_ > kUnderWay) {
      wait_copies<kUnderWay>();
      announce(announced_ + 1);
    }
  }
  __device__ void announce_all() {
    wait_copies<0>();
    announce(issued_);
  }

 private:
  static constexpr unsigned kUnderWay = 2;  // and the slot that is being issued

  __device__ void announce(unsigned end) {
    fence_for_products();
    __syncwarp();
    for (; announced_ != end; ++announced_) {
      if (threadIdx.x % 32 == 0) arrive(shared_address(&ring_.full[announced_ % KeyRing::kSlots]));
    }
  }

  KeyRing& ring_;
  unsigned issued_ = 0;
  unsigned announced_ = 0;
};

/// One multiplying warp's side of the ring: blocks are numbered through all tiles.
class RingReader {
 public:
  __device__ explicit RingReader(KeyRing& ring) : ring_(ring) {}
  __device__ __forceinline__ void wait_keys(unsigned block) const { wait(2 * block); }
  __device__ __forceinline__ void wait_values(unsigned block) const { wait(2 * block + 1); }
  __device__ __forceinline__ void release_keys(unsigned block) const { release(2 * block); }
  __device__ __forceinline__ void release_values(unsigned block) const { release(2 * block + 1); }

 private:
  __device__ __forceinline__ void wait(unsigned slot) const {
    wait_for(shared_address(&ring_.full[slot % KeyRing::kSlots]), slot / KeyRing::kSlots % 2);
  }
  __device__ __forceinline__ void release(unsigned slot) const {
    if (threadIdx.x % 32 == 0) arrive(shared_address(&ring_.empty[slot % KeyRing::kSlots]));
  }

  KeyRing& ring_;
};

/// Draws the next tile of the launch: head by head, the last tokens first, as they see most. Each
/// block draws once in vain, after which the counter is 0 again. One warp.
__device__ inline void draw_tile(const PrefillArgs& args, unsigned num_tiles, PrefillTile& tile) {
  const unsigned all_tiles = num_tiles * static_cast<unsigned>(args.heads.num_heads);
  const int lane = static_cast<int>(threadIdx.x % 32);
  unsigned drawn = 0;
  if (lane == 0) drawn = atomicInc(args.next_tile, all_tiles + gridDim.x - 1);
  drawn = __shfl_sync(kWholeWarp, drawn, 0);
  const int tile_tokens = kGroupRows / args.group_size;
  ChunkTile chunk;
  if (drawn < all_tiles) {
    const int index = static_cast<int>(num_tiles - 1 - drawn % num_tiles);
    chunk = find_chunk(args.step, index, tile_tokens);
  }
  if (lane == 0) describe(args, chunk, static_cast<int>(drawn / num_tiles), tile_tokens, tile);
}

/// A multiplying warp's queries, weights and results.
template <class Row, int kDim>
class GroupRows {
 public:
  using Scores = float[kGroupKeys / 8][4];

  /// @param rows  shared-memory address of the warp's 16 padded query rows.
  __device__ __forceinline__ void load_queries(std::uint32_t rows) {
    const int lane = static_cast<int>(threadIdx.x % 32);
    const std::uint32_t at = rows + (lane % 16) * kPaddedDim<kDim> * 2 + lane / 16 * 16;
#pragma unroll
    for (int b = 0; b < kDim / 16; ++b) load_matrices(query_[b], at + b * 32);
  }
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) out_[n][i] = 0.0F;
    }
  }

  /// Starts score = queries x keys.
  __device__ __forceinline__ void multiply_keys(std::uint32_t keys, Scores& score) const {
    const std::uint64_t first = operand(keys);
    begin_products();
#pragma unroll
    for (int n = 0; n < kGroupKeys / 64; ++n) {
#pragma unroll
      for (int b = 0; b < kDim / 16; ++b) {
        // Rows n, column 16 b of rows of 64 elements.
        constexpr int kPart = kGroupKeys * 128;
        WarpgroupCore<Row>::template multiply<0>(
            eight(score, n), query_[b], first + (b / 4 * kPart + n * 64 * 128 + b % 4 * 32) / 16,
            b > 0 ? 1 : 0);
      }
    }
    commit_products();
  }

  /// Takes the scores as the next weights.
  __device__ __forceinline__ void set_weights(const Scores& score) {
#pragma unroll
    for (int k = 0; k < kGroupKeys / 16; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* pair = &score[2 * k + i / 2][i % 2 * 2];
        weight_[k][i] = TensorCore<Row>::pack(pair[0], pair[1]);
      }
    }
  }

  /// Starts results += weights x values.
  __device__ __forceinline__ void multiply_values(std::uint32_t values) {
    const std::uint64_t first = operand(values);
    begin_products();
#pragma unroll
    for (int k = 0; k < kGroupKeys / 16; ++k) {
#pragma unroll
      for (int n = 0; n < kDim / 64; ++n) {
        WarpgroupCore<Row>::template multiply<1>(eight(out_, n), weight_[k],
                                                 first + (n * kGroupKeys + k * 16) * 128 / 16, 1);
      }
    }
    commit_products();
  }
  /// Waits for the results.
  __device__ __forceinline__ void wait() {
    wait_products<0>();
    pin_registers(out_);
  }
  __device__ __forceinline__ void scale(const float (&factor)[2]) { scale_rows(factor, out_); }
  __device__ __forceinline__ void store(const RowSoftmax& softmax, std::uint16_t* rows) const {
    softmax.store<Row, kDim>(out_, rows);
  }

 private:
  template <int kBlocks>
  static __device__ __forceinline__ float (&eight(float (&x)[kBlocks][4], int n))[8][4] {
    return reinterpret_cast<float(&)[8][4]>(x[n * 8]);
  }

  std::uint32_t query_[kDim / 16][4];
  std::uint32_t weight_[kGroupKeys / 16][4];
  float out_[kDim / 8][4];
};

/// What the copying warpgroup does.
template <int kDim>
__device__ __forceinline__ void copy_tiles(const PrefillArgs& args, unsigned num_tiles,
                                           KeyRing& ring, PrefillTile (&tiles)[kGroupTiles],
                                           std::uint32_t stages, std::uint32_t query_rows) {
  constexpr int kSlotBytes = kGroupKeys * kDim * 2;
  const int thread = static_cast<int>(threadIdx.x) % kWarpgroupThreads;
  const int warp = thread / 32;
  const QueryGroup group(args.group_size);
  RingFiller filler(ring);
  if (warp == 0) draw_tile(args, num_tiles, tiles[0]);
  for (unsigned t = 0;; ++t) {
    filler.wait(ring.queries_read, (t + 1) % 2);
    asm volatile("bar.sync 1, 128;" ::: "memory");  // the first warp has described the tile
    const PrefillTile& tile = tiles[t % kGroupTiles];
    if (tile.num_tokens == 0) break;
    copy_queries<kDim>(args, tile, group, kGroupRows, query_rows, thread, kWarpgroupThreads);
    for (int first = 0; first < tile.keys.count; first += kGroupKeys) {
      const int own = warp * kGroupShare;
      const int lane = thread % 32;
      const KeyRows rows = find_key<kDim>(args, tile, first + own + lane % kGroupShare);
      for (const std::uint16_t* row_of_lane : {rows.k, rows.v}) {
        const std::uint32_t slot = stages + filler.acquire() * kSlotBytes;
        copy_rows<kDim, kGroupShare>(row_of_lane, [&](int row, int chunk) {
          return slot + static_cast<std::uint32_t>(chunk / 8 * kGroupKeys * 128) +
                 swizzled(own + row, chunk % 8);
        });
        filler.issue();
      }
      // While the others copy on. Whoever multiplies has read the queries of tile t - 1, so it has
      // written tile t - 3, whose description this one replaces.
      if (first == 0 && warp == 0) draw_tile(args, num_tiles, tiles[(t + 1) % kGroupTiles]);
    }
  }
  (void)filler.acquire();
  filler.issue();  // keys of a tile without tokens: the end
  filler.announce_all();
}

/// What a multiplying warp does: one pipeline through the key blocks of all its tiles. While block
/// b's values are multiplied, the scores of block b + 1 are, too, and become weights; b + 1 may be
/// the first of the next tile.
template <class Row, int kDim>
__device__ __forceinline__ void multiply_tiles(const PrefillArgs& args, KeyRing& ring,
                                               const PrefillTile (&tiles)[kGroupTiles],
                                               std::uint32_t stages, std::uint32_t query_rows,
                                               std::uint16_t* out_rows) {
  constexpr int kSlotBytes = kGroupKeys * kDim * 2;
  const QueryGroup group(args.group_size);
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int first_row = static_cast<int>(threadIdx.x / 32) * 16;
  query_rows += static_cast<std::uint32_t>(first_row * kPaddedDim<kDim> * 2);
  out_rows += first_row * kPaddedDim<kDim>;
  const RingReader reader(ring);
  const auto keys_of = [&](unsigned block) {
    return stages + block % kGroupStages * (2 * kSlotBytes);
  };
  GroupRows<Row, kDim> rows;
  RowSoftmax softmax;
  SeenByAll seen_by_all;
  const auto begin = [&](const PrefillTile& tile) {
    rows.load_queries(query_rows);
    __syncwarp();
    if (lane == 0) arrive(shared_address(&ring.queries_read));
    softmax.begin(tile, group, first_row + lane / 4);
    seen_by_all = SeenByAll(tile.keys, tile.state, tile.pos_of(first_row, group),
                            tile.pos_of(first_row + 15, group));
  };
  const auto write = [&](const PrefillTile& tile, const RowSoftmax& done) {
    __syncwarp();
    rows.store(done, out_rows);  // so that rows leave in 16-byte pieces
    __syncwarp();
    write_outputs<kDim>(args, tile, group, out_rows, first_row, 16);
  };

  unsigned block = 0;
  unsigned t = 0;
  reader.wait_keys(block);  // and the tile's description, and its queries
  if (tiles[t].num_tokens == 0) return;
  typename GroupRows<Row, kDim>::Scores score = {};
  float factor[2];
  begin(tiles[t]);
  rows.multiply_keys(keys_of(block), score);
  wait_products<0>();
  pin_registers(score);
  reader.release_keys(block);
  if (!seen_by_all.contains(0, kGroupKeys)) softmax.mask(0, score);
  (void)softmax.add(args.scale_log2, score, factor);
  rows.set_weights(score);
  rows.clear();
  int first = 0;  // of the block's keys in the tile's list
  while (true) {
    const PrefillTile& tile = tiles[t % kGroupTiles];
    const RowSoftmax done = softmax;
    first += kGroupKeys;
    const bool is_last = first >= tile.keys.count;
    reader.wait_keys(block + 1);
    if (is_last) {
      const PrefillTile& next = tiles[++t % kGroupTiles];
      if (next.num_tokens == 0) break;
      begin(next);
      first = 0;
    }
    rows.multiply_keys(keys_of(block + 1), score);
    reader.wait_values(block);
    rows.multiply_values(keys_of(block) + kSlotBytes);
    wait_products<1>();
    pin_registers(score);
    reader.release_keys(block + 1);
    if (!seen_by_all.contains(first, kGroupKeys)) softmax.mask(first, score);
    const bool changed = softmax.add(args.scale_log2, score, factor);
    rows.wait();
    reader.release_values(block);
    if (is_last) {
      write(tile, done);
      rows.clear();
    } else if (changed) {
      rows.scale(factor);
    }
    rows.set_weights(score);
    ++block;
  }
  reader.wait_values(block);
  rows.multiply_values(keys_of(block) + kSlotBytes);
  rows.wait();
  reader.release_values(block);
  write(tiles[(t - 1) % kGroupTiles], softmax);
}

/// One block a multiprocessor; see the top of the file.
/// @param num_tiles  of all chunks, for one head.
///
/// Cost: a tile reads the keys that any of its tokens sees, so a streaming head costs O(n x
/// window). Its code is there in builds for sm_90a alone; elsewhere the kernel is empty and has no
/// static shared memory, by which has_warpgroup_code() knows. Aims at
/// cuDNN's 600 TFLOP/s on an H200; reaches 460 (bench/results).
template <class Row, int kDim>
__global__ void __launch_bounds__(kGroupThreads, 1)
    prefill_warpgroup_kernel(const __grid_constant__ PrefillArgs args, unsigned num_tiles) {
  if constexpr (kWarpgroupCode) {
    extern __shared__ __align__(16) std::uint16_t group_memory[];
    __shared__ KeyRing ring;
    __shared__ PrefillTile tiles[kGroupTiles];
    // What begins behind static memory is less aligned than swizzling asks.
    const std::uint32_t begin = shared_address(group_memory);
    std::uint16_t* stages = group_memory + (kSwizzleBytes - begin % kSwizzleBytes) / 2;
    std::uint16_t* query_rows = stages + kGroupStages * 2 * kGroupKeys * kDim;
    std::uint16_t* out_rows = query_rows + kGroupRows * kPaddedDim<kDim>;
    if (threadIdx.x == 0) {
      constexpr int kMultiplyingWarps = kGroupRows / 16;
      for (std::uint64_t& barrier : ring.full) begin_barrier(shared_address(&barrier), 4);
      for (std::uint64_t& barrier : ring.empty) {
        begin_barrier(shared_address(&barrier), kMultiplyingWarps);
      }
      begin_barrier(shared_address(&ring.queries_read), kMultiplyingWarps);
    }
    __syncthreads();
    // Of 65536 registers: 2 x 128 threads with 224, 128 with 56.
    if (threadIdx.x >= kGroupThreads - kWarpgroupThreads) {
      give_up_registers<56>();
      copy_tiles<kDim>(args, num_tiles, ring, tiles, shared_address(stages),
                       shared_address(query_rows));
    } else {
      take_registers<224>();
      multiply_tiles<Row, kDim>(args, ring, tiles, shared_address(stages),
                                shared_address(query_rows), out_rows);
    }
  }
}

/// Whether the build has the kernel's code for the current device.
inline bool has_warpgroup_code(void (*kernel)(PrefillArgs, unsigned)) {
  cudaFuncAttributes attributes{};
  return cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess &&
         attributes.sharedSizeBytes > 0;
}

}  // namespace headwise::inline v0::cuda::detail
