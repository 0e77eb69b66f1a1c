// SPDX-License-Identifier: MIT
/// @file merge.cuh
/// Puts together what several warps, or several blocks, have of one item.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "headwise/attention/cuda/decode/args.cuh"
#include "headwise/attention/cuda/decode/state.cuh"
#include "headwise/attention/cuda/decode/tile.cuh"
#include "headwise/attention/cuda/decode/work.cuh"
#include "headwise/attention/cuda/ptx/barrier.cuh"
#include "headwise/attention/cuda/ptx/tensor_core.cuh"
#include "headwise/cache/cuda/device.cuh"
#include "headwise/cache/cuda/elements.cuh"

namespace headwise::inline v0::cuda::detail {

/// Where worker warps leave partial results for the merge, behind the rings of their tiles.
template <int kDim>
class PartialMemory {
 public:
  /// Of a worker: ring and partial result.
  static constexpr int kWarpBytes =
      TileLayout<kDim>::kRingBytes + partial_floats(kDim) * static_cast<int>(sizeof(float));

  __device__ explicit PartialMemory(std::byte* memory) : memory_(memory) {}
  /// Of any wide piece but the last: the ring is still in use.
  __device__ float* of_warp(int warp) const {
    return reinterpret_cast<float*>(memory_ + num_workers() * TileLayout<kDim>::kRingBytes) +
           warp * partial_floats(kDim);
  }
  /// Of the last piece.
  __device__ float* last_of_warp(int warp) const {
    return reinterpret_cast<float*>(memory_ + warp * TileLayout<kDim>::kRingBytes);
  }

 private:
  std::byte* memory_;
};

/// What a block's worker warps and merging warps tell each other. In shared memory.
class MergeMemory {
 public:
  /// One thread, before the block's threads meet.
  __device__ void begin() {
    begin_barrier(shared_address(&handed_over_), num_workers() * 32);
    begin_barrier(shared_address(&merged_), kMergeWarps * 32);
  }
  /// A worker's thread, before it stores what it has of wide piece `index`.
  __device__ void wait_for_room(int index) {
    if (index > 0) wait_for(shared_address(&merged_), static_cast<unsigned>(index - 1) % 2);
  }
  /// A worker's thread, after that.
  __device__ void hand_over() { arrive(shared_address(&handed_over_)); }
  /// A merging thread, before it reads what the workers have of wide piece `index`.
  __device__ void wait_for_parts(int index) {
    wait_for(shared_address(&handed_over_), static_cast<unsigned>(index) % 2);
  }
  /// A merging thread, after that.
  __device__ void give_room() { arrive(shared_address(&merged_)); }

  /// What one half of the merging warps hands to the other.
  struct Exchange {
    float4 columns[kMergeWarps * 16];
    float2 states[kMergeWarps * 16];
  };
  Exchange exchange;
  /// Whether the block is the last one of its team's item; the merging warps', the workers'.
  bool finishes[2];

 private:
  std::uint64_t handed_over_;  // a phase a wide piece
  std::uint64_t merged_;
};

/// A softmax over some of an item's keys, as one thread merges it: 4 columns of one query.
struct MergedColumns {
  float top = kLowest;
  float sum = 0.0F;
  float4 out = make_float4(0.0F, 0.0F, 0.0F, 0.0F);

  /// Adds partial results; a state of (kLowest, 0) with zeros is none.
  template <int kCount>
  __device__ void add(const float2 (&state)[kCount], const float4 (&x)[kCount]) {
    const float old_top = top;
#pragma unroll
    for (int i = 0; i < kCount; ++i) top = fmaxf(top, state[i].x);
    const float factor = exp2_fast(old_top - top);
    sum *= factor;
    out = make_float4(out.x * factor, out.y * factor, out.z * factor, out.w * factor);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float weight = exp2_fast(state[i].x - top);
      sum += weight * state[i].y;
      out.x += weight * x[i].x;
      out.y += weight * x[i].y;
      out.z += weight * x[i].z;
      out.w += weight * x[i].w;
    }
  }

  template <DeviceIo Io>
  __device__ void store(Bits<Io>* to) const {
    const float inverse = sum > 0.0F ? 1.0F / sum : 0.0F;
    if constexpr (std::same_as<Io, f32>) {
      *reinterpret_cast<float4*>(to) =
          make_float4(out.x * inverse, out.y * inverse, out.z * inverse, out.w * inverse);
    } else {
      *reinterpret_cast<uint2*>(to) = make_uint2(Pair<Io>::pack(out.x * inverse, out.y * inverse),
                                                 Pair<Io>::pack(out.z * inverse, out.w * inverse));
    }
  }
};

/// The threads that merge a piece: the block's workers, or its merging warps.
class MergeTeam {
 public:
  __device__ explicit MergeTeam(bool of_workers)
      : num_threads((of_workers ? num_workers() : kMergeWarps) * 32),
        thread(static_cast<int>(threadIdx.x) - (of_workers ? 0 : num_workers() * 32)),
        barrier_(of_workers ? 1 : 2) {}

  int num_threads;
  int thread;  ///< of the team

  /// The team's threads meet.
  __device__ void meet() const {
    asm volatile("bar.sync %0, %1;" ::"r"(barrier_), "r"(num_threads) : "memory");
  }

 private:
  int barrier_;  // 0 is __syncthreads'
};

/// Merges what all workers have of a piece: into the output, or into block_partials where other
/// blocks share the item.
/// @param partials  those of worker 0; the next one's `stride` floats on.
template <DeviceIo Io, int kDim>
__device__ void merge_parts(const DecodeArgs& args, const MergeTeam& team, const Piece& piece,
                            const float* partials, int stride) {
  constexpr int kVectors = kDim / 4;
  constexpr int kMost = decode_max_workers(kDim);
  const PieceRows rows = rows_of(args, piece);
  const int place = 2 * piece.block_rank + (piece.block_rank == piece.first_rank ? 1 : 0);
  float* to = args.scratch.block_partials + static_cast<std::int64_t>(place) * partial_floats(kDim);
#pragma unroll 1
  for (int i = team.thread; i < rows.count * kVectors; i += team.num_threads) {
    const int query = i / kVectors;
    const int column = i % kVectors * 4;
    // All loads before any use.
    float2 state[kMost];
    float4 x[kMost];
#pragma unroll
    for (int p = 0; p < kMost; ++p) {
      state[p] = make_float2(kLowest, 0.0F);
      x[p] = make_float4(0.0F, 0.0F, 0.0F, 0.0F);
      if (p < num_workers()) {
        const float* part = partials + p * stride;
        state[p] = *reinterpret_cast<const float2*>(part + 2 * query);
        x[p] = *reinterpret_cast<const float4*>(part + partial_row<kDim>(query) + column);
      }
    }
    MergedColumns merged;
    merged.add(state, x);
    if (piece.num_blocks == 1) {
      merged.store<Io>(output_at<Io>(args, rows.row, rows.first_head + query) + column);
    } else {
      if (column == 0) {
        *reinterpret_cast<float2*>(to + 2 * query) = make_float2(merged.top, merged.sum);
      }
      *reinterpret_cast<float4*>(to + partial_row<kDim>(query) + column) = merged.out;
    }
  }
}

/// Merges an item whose `num_blocks` partial results all lie in block_partials. The first of them
/// is in its block's second place, all others in their block's first. Each half of the team adds up
/// every second of them.
/// @param columns, states  shared memory: [num_threads / 2] each
template <DeviceIo Io, int kDim>
__device__ void merge_blocks(const DecodeArgs& args, const MergeTeam& team, const Piece& piece,
                             float4* columns, float2* states) {
  constexpr int kVectors = kDim / 4;
  // Loads on their way at once: 33 blocks share one of 4 long heads on 132 multiprocessors, and
  // each half merges half of them.
  constexpr int kBatch = 17;
  const PieceRows rows = rows_of(args, piece);
  const int count = piece.num_blocks;
  const float* partials = args.scratch.block_partials +
                          static_cast<std::int64_t>(2 * piece.first_rank) * partial_floats(kDim);
  const int per_half = team.num_threads / 2;
  const int half = team.thread / per_half;
  const int thread = team.thread % per_half;
#pragma unroll 1
  for (int begin = 0; begin < rows.count * kVectors; begin += per_half) {
    const int i = begin + thread;
    const int query = i / kVectors;
    const int column = i % kVectors * 4;
    const bool works = query < rows.count;
    MergedColumns merged;
#pragma unroll 1
    for (int first = half; works && first < count; first += 2 * kBatch) {
      float2 state[kBatch];
      float4 x[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int p = first + 2 * b;
        state[b] = make_float2(kLowest, 0.0F);
        x[b] = make_float4(0.0F, 0.0F, 0.0F, 0.0F);
        if (p < count) {
          const float* from = partials + (p == 0 ? 1 : 2 * p) * partial_floats(kDim);
          state[b] = __ldcg(reinterpret_cast<const float2*>(from) + query);
          x[b] = __ldcg(reinterpret_cast<const float4*>(from + partial_row<kDim>(query) + column));
        }
      }
      merged.add(state, x);
    }
    if (works && half == 1) {
      columns[thread] = merged.out;
      states[thread] = make_float2(merged.top, merged.sum);
    }
    team.meet();
    if (works && half == 0) {
      const float2 state[1] = {states[thread]};
      const float4 x[1] = {columns[thread]};
      merged.add(state, x);
      merged.store<Io>(output_at<Io>(args, rows.row, rows.first_head + query) + column);
    }
    team.meet();
  }
}

/// Orders what a thread wrote and read before against what it does after, for the whole device:
/// all that an arrival needs, at a lower price than __threadfence's total order.
__device__ __forceinline__ void fence_device() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

/// Counts an arrival, wrapping to 0 with the last of them: what this block wrote is visible to the
/// last one, and what the others wrote is visible to this block if it is the last.
__device__ inline bool arrives_last(unsigned* arrived, unsigned num_blocks) {
  fence_device();
  const unsigned before = atomicInc(arrived, num_blocks - 1);
  fence_device();
  return before == num_blocks - 1;
}

/// Merges the block's wide pieces, and finishes those items whose other blocks were earlier.
/// @param last  the workers' call: the last wide piece. Null for the merging warps, which take all
///   others, each when every worker has handed it over.
template <DeviceIo Io, int kDim>
__device__ void merge_pieces(const DecodeArgs& args, const WarpWork& work, const Piece* last,
                             const PartialMemory<kDim>& partials, MergeMemory& memory) {
  const bool is_last = last != nullptr;
  const MergeTeam team(is_last);
  const int end = is_last ? work.num_wide : work.num_wide - 1;
  if (!is_last && end > 0) wait_for_previous();
#pragma unroll 1
  for (int index = is_last ? end - 1 : 0; index < end; ++index) {
    const Piece piece = is_last ? *last : args.work.pieces[work.first_wide + index];
    if (is_last) {
      team.meet();
    } else {
      memory.wait_for_parts(index);
    }
    merge_parts<Io, kDim>(args, team, piece,
                          is_last ? partials.last_of_warp(0) : partials.of_warp(0),
                          is_last ? TileLayout<kDim>::kRingBytes / static_cast<int>(sizeof(float))
                                  : partial_floats(kDim));
    if (!is_last) memory.give_room();
    if (piece.num_blocks == 1) continue;
    bool& finishes = memory.finishes[is_last ? 1 : 0];
    team.meet();  // the team's partial result is written
    if (team.thread == 0) {
      finishes = arrives_last(args.scratch.arrived + piece.first_rank,
                              static_cast<unsigned>(piece.num_blocks));
    }
    team.meet();
    if (finishes) {
      // After the last piece the workers' rings are free.
      auto* columns =
          is_last ? reinterpret_cast<float4*>(partials.last_of_warp(0)) : memory.exchange.columns;
      auto* states = is_last ? reinterpret_cast<float2*>(columns + team.num_threads / 2)
                             : memory.exchange.states;
      merge_blocks<Io, kDim>(args, team, piece, columns, states);
    }
  }
}

}  // namespace headwise::inline v0::cuda::detail
