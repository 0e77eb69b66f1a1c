// SPDX-License-Identifier: MIT
/// @file decode_merge.cuh
/// Puts together what several warps, or several blocks, have of one item.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "headwise/attention/cuda/decode_args.cuh"
#include "headwise/attention/cuda/decode_state.cuh"
#include "headwise/attention/cuda/decode_work.cuh"
#include "headwise/attention/cuda/tensor_core.cuh"
#include "headwise/cache/cuda/device.cuh"

namespace headwise::inline v0::cuda::detail {

/// What a block's warps leave over at their two ends, in line order: slot 2w is the end of an item
/// that began before warp w, slot 2w + 1 the beginning of one that goes on. In shared memory.
struct BlockParts {
  static constexpr int kSlots = 32;  // 16 warps at most
  const Piece* piece[kSlots];
  const float* part[kSlots];  ///< partial results
  std::int32_t item[kSlots];  ///< -1: none

  __device__ void clear(int slot) { item[slot] = -1; }
  __device__ void set(int slot, const Piece& left, const float* partial) {
    piece[slot] = &left;
    part[slot] = partial;
    item[slot] = left.item;
  }
};

/// A softmax over some of an item's keys, as one thread merges it: 4 columns of one query.
struct MergedColumns {
  float top = kMasked;
  float sum = 0.0F;
  float4 out = make_float4(0.0F, 0.0F, 0.0F, 0.0F);

  /// Adds partial results; a state of (kMasked, 0) with zeros is none.
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

  template <class Row>
  __device__ void store(std::uint16_t* to) const {
    const float inverse = sum > 0.0F ? 1.0F / sum : 0.0F;
    *reinterpret_cast<uint2*>(to) =
        make_uint2(TensorCore<Row>::pack(out.x * inverse, out.y * inverse),
                   TensorCore<Row>::pack(out.z * inverse, out.w * inverse));
  }
};

/// Half of a block's warps. After the last tile little is left to do, one dependent instruction
/// after the other: two items, or two halves of one, are merged side by side.
struct MergeTeam {
  int num_teams = 2;  ///< 1 where the block is a single warp
  int team = 0;       ///< no team where it is not below num_teams
  int num_threads = 0;
  int thread = 0;

  __device__ MergeTeam() {
    const int num_warps = static_cast<int>(blockDim.x / 32);
    num_teams = num_warps > 1 ? 2 : 1;
    num_threads = max(num_warps / 2, 1) * 32;
    const int mine = static_cast<int>(threadIdx.x);
    team = mine < num_threads ? 0 : mine < 2 * num_threads ? 1 : 2;
    thread = mine - team * num_threads;
  }
};

/// Merges the parts in `slots`, all that the block's warps left of one item: into the output, or
/// into block_partials where other blocks share the item.
template <class Row, int kDim>
__device__ void merge_parts(const DecodeArgs& args, const MergeTeam& team, const BlockParts& parts,
                            unsigned slots) {
  constexpr int kVectors = kDim / 4;
  constexpr int kMost = decode_max_warps(kDim);
  const Piece& piece = *parts.piece[__ffs(static_cast<int>(slots)) - 1];
  const ItemRows rows = rows_of(args, piece);
  const int place = 2 * piece.block_rank + (piece.block_rank == piece.first_rank ? 1 : 0);
  float* to = args.scratch.block_partials + static_cast<std::int64_t>(place) * partial_floats(kDim);
#pragma unroll 1
  for (int i = team.thread; i < rows.count * kVectors; i += team.num_threads) {
    const int query = i / kVectors;
    const int column = i % kVectors * 4;
    // All loads before any use.
    float2 state[kMost];
    float4 x[kMost];
    unsigned left = slots;
#pragma unroll
    for (int p = 0; p < kMost; ++p, left &= left - 1) {
      state[p] = make_float2(kMasked, 0.0F);
      x[p] = make_float4(0.0F, 0.0F, 0.0F, 0.0F);
      if (left != 0) {
        const float* part = parts.part[__ffs(static_cast<int>(left)) - 1];
        state[p] = *reinterpret_cast<const float2*>(part + 2 * query);
        x[p] = *reinterpret_cast<const float4*>(part + partial_row<kDim>(query) + column);
      }
    }
    MergedColumns merged;
    merged.add(state, x);
    if (piece.num_blocks == 1) {
      merged.store<Row>(row_at(args.out, rows.row, rows.first_head + query) + column);
    } else {
      if (column == 0) {
        *reinterpret_cast<float2*>(to + 2 * query) = make_float2(merged.top, merged.sum);
      }
      *reinterpret_cast<float4*>(to + partial_row<kDim>(query) + column) = merged.out;
    }
  }
}

/// Merges an item whose `num_blocks` partial results all lie in block_partials. The first of them
/// is in its block's second place, all others in their block's first.
/// @param part, num_parts  every num_parts-th partial result is this team's business; part 0 adds
///   what the others have and stores the output.
/// @param shared  the block's tiles, no longer in use. All threads of the block come here together.
template <class Row, int kDim>
__device__ void merge_blocks(const DecodeArgs& args, const MergeTeam& team, const Piece& piece,
                             int part, int num_parts, float* shared) {
  constexpr int kVectors = kDim / 4;
  // Loads on their way at once: 33 blocks share one of 4 long heads on 132 multiprocessors, and
  // each team merges half of them.
  constexpr int kBatch = 17;
  const ItemRows rows = rows_of(args, piece);
  const int count = piece.num_blocks;
  const float* partials = args.scratch.block_partials +
                          static_cast<std::int64_t>(2 * piece.first_rank) * partial_floats(kDim);
  const int most_vectors = min(args.group_size, kItemQueries) * kVectors;  // of any item
#pragma unroll 1
  for (int begin = 0; begin < most_vectors; begin += team.num_threads) {
    const int i = begin + team.thread;
    const int query = i / kVectors;
    const int column = i % kVectors * 4;
    const bool works = team.team < team.num_teams && query < rows.count;
    MergedColumns merged;
#pragma unroll 1
    for (int first = part; works && first < count; first += kBatch * num_parts) {
      float2 state[kBatch];
      float4 x[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        const int p = first + b * num_parts;
        state[b] = make_float2(kMasked, 0.0F);
        x[b] = make_float4(0.0F, 0.0F, 0.0F, 0.0F);
        if (p < count) {
          const float* from = partials + (p == 0 ? 1 : 2 * p) * partial_floats(kDim);
          state[b] = __ldcg(reinterpret_cast<const float2*>(from) + query);
          x[b] = __ldcg(reinterpret_cast<const float4*>(from + partial_row<kDim>(query) + column));
        }
      }
      merged.add(state, x);
    }
    auto* columns = reinterpret_cast<float4*>(shared);
    auto* states = reinterpret_cast<float2*>(columns + team.num_threads);
    if (works && part == 1) {
      columns[team.thread] = merged.out;
      states[team.thread] = make_float2(merged.top, merged.sum);
    }
    __syncthreads();
    if (works && part == 0) {
      if (num_parts == 2) {
        const float2 state[1] = {states[team.thread]};
        const float4 x[1] = {columns[team.thread]};
        merged.add(state, x);
      }
      merged.store<Row>(row_at(args.out, rows.row, rows.first_head + query) + column);
    }
    __syncthreads();
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

/// Merges what the block's warps left over, and finishes what other blocks have left to it.
template <class Row, int kDim>
__device__ void merge_warps(const DecodeArgs& args, const BlockParts& parts, float* shared) {
  __shared__ bool finishes[2];
  const MergeTeam team;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int num_slots = 2 * static_cast<int>(blockDim.x / 32);
  const int item = lane < num_slots ? parts.item[lane] : -1;
  const Piece* handed_on[2] = {};  // only a block's first and last items can be shared
  int turn = 0;
#pragma unroll 1
  for (unsigned left = __ballot_sync(kWholeWarp, item >= 0); left != 0;) {
    const int slot = __ffs(static_cast<int>(left)) - 1;
    const unsigned same =
        __ballot_sync(kWholeWarp, item == __shfl_sync(kWholeWarp, item, slot)) & left;
    if (turn == team.team) merge_parts<Row, kDim>(args, team, parts, same);
    turn = turn + 1 == team.num_teams ? 0 : turn + 1;
    if (parts.piece[slot]->num_blocks > 1) {
      (handed_on[0] == nullptr ? handed_on[0] : handed_on[1]) = parts.piece[slot];
    }
    left &= ~same;
  }
  if (handed_on[0] == nullptr) return;

  __syncthreads();  // the block's partials are written, its shared memory is free
  if (threadIdx.x < 2) {
    const Piece* mine = threadIdx.x == 0 ? handed_on[0] : handed_on[1];
    finishes[threadIdx.x] =
        mine != nullptr && arrives_last(args.scratch.arrived + mine->first_rank,
                                        static_cast<unsigned>(mine->num_blocks));
  }
  __syncthreads();
  const bool side_by_side = finishes[0] && finishes[1] && team.num_teams == 2;
#pragma unroll 1
  for (int i = 0; i < 2; ++i) {
    if (side_by_side ? i > 0 : !finishes[i]) continue;
    const int mine = side_by_side ? team.team : i;
    merge_blocks<Row, kDim>(args, team, mine == 0 ? *handed_on[0] : *handed_on[1],
                            side_by_side ? 0 : team.team, side_by_side ? 1 : team.num_teams,
                            shared);
  }
}

}  // namespace headwise::inline v0::cuda::detail
