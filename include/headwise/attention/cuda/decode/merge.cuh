// SPDX-License-Identifier: MIT
/// @file merge.cuh
/// Puts together what several warps, or several blocks, have of one item.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "headwise/attention/cuda/compensation.cuh"
#include "headwise/attention/cuda/decode/args.cuh"
#include "headwise/attention/cuda/decode/state.cuh"
#include "headwise/attention/cuda/decode/tile.cuh"
#include "headwise/attention/cuda/decode/work.cuh"
#include "headwise/attention/cuda/ptx/barrier.cuh"
#include "headwise/attention/cuda/ptx/tensor_core.cuh"
#include "headwise/cache/cuda/device.cuh"
#include "headwise/cache/cuda/elements.cuh"

namespace headwise::inline v0::cuda::detail {

/// Where workers leave partial results for the merge: those of the last wide piece in the rings of
/// their tiles, which are free then, others behind the rings or, where there is no room for them,
/// in global memory.
template <int kDim, class Size>
class PartialMemory {
 public:
  static constexpr int kFloats = partial_floats(kDim, Size::kRows);  ///< of a partial result
  static constexpr int kRingBytes = TileLayout<kDim, Size::kTileRows>::kRingBytes;
  static constexpr bool kInShared = !Size::kChunks;
  /// Of shared memory, of a worker.
  static constexpr int kWorkerBytes =
      kRingBytes + (kInShared ? kFloats * static_cast<int>(sizeof(float)) : 0);
  static_assert(kRingBytes >= kFloats * static_cast<int>(sizeof(float)));

  __device__ PartialMemory(std::byte* memory, const DecodeScratch& scratch)
      : memory_(memory), worker_partials_(scratch.worker_partials) {}
  /// Of any wide piece but the last: the ring is still in use.
  __device__ float* of_worker(int worker) const {
    if constexpr (kInShared) {
      return reinterpret_cast<float*>(memory_ + Size::num_workers() * kRingBytes) +
             worker * kFloats;
    } else {
      const auto first = static_cast<std::int64_t>(blockIdx.x) * Size::num_workers();
      float* partial = worker_partials_ + (first + worker) * kFloats;
      // Or all addresses are computed before the tiles, and spilled.
      asm volatile("" : "+l"(partial));
      return partial;
    }
  }
  /// Of the last piece.
  __device__ float* last_of_worker(int worker) const {
    return reinterpret_cast<float*>(memory_ + worker * kRingBytes);
  }

 private:
  std::byte* memory_;
  float* worker_partials_;
};

/// What a block's workers and merging warps tell each other. In shared memory.
template <class Size>
class MergeMemory {
 public:
  /// One thread, before the block's threads meet.
  __device__ void begin() {
    begin_barrier(shared_address(&handed_over_), Size::num_worker_threads());
    begin_barrier(shared_address(&merged_), Size::kMergeWarps * 32);
    begin_barrier(team_barrier(true), Size::num_worker_threads());
    begin_barrier(team_barrier(false), Size::kMergeWarps * 32);
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

  /// Where the workers meet to merge, or the merging warps.
  __device__ std::uint32_t team_barrier(bool of_workers) {
    return shared_address(teams_ + (of_workers ? 1 : 0));
  }

  /// What one half of the merging warps hands to the other.
  struct Exchange {
    float4 columns[Size::kMergeWarps * 16];
    float2 states[Size::kMergeWarps * 16];
  };
  Exchange exchange;
  /// What the first thread of a team has found out for the others; the merging warps', the
  /// workers'.
  int answers[2];

 private:
  std::uint64_t handed_over_;  // a phase a wide piece
  std::uint64_t merged_;
  std::uint64_t teams_[2];  // a phase a meeting
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

  /// Adds the row that stands for those that the head has dropped; after all others.
  template <DeviceRow Row, DeviceIo Io, int kDim>
  __device__ void add_mean(const DecodeArgs& args, const MeanRow& mean, const Bits<Io>* q,
                           int column) {
    if (!mean.exists()) return;
    const float dot = dot_with_mean<Row, Io>(q, mean.k, 0, 1, kDim / 2);
    const JoiningRow joining(top, mean.logit(dot, args.scale_log2, args.softmax),
                             TensorCore<Row>::kHeadroom);
    top = joining.top;
    sum = sum * joining.factor + joining.weight;
    const float* value = mean.v + column;
    out = make_float4(joining.joined(out.x, value), joining.joined(out.y, value + 1),
                      joining.joined(out.z, value + 2), joining.joined(out.w, value + 3));
  }

  /// As if the query's sink were one more key, without a value; after all others.
  template <DeviceRow Row, class Size>
  __device__ void add_sink(const DecodeArgs& args, const PieceRows& rows, int query) {
    if constexpr (Size::Softmax::kHasSinks) {
      sum += args.softmax.sink_weight(rows.head_of(query), top + TensorCore<Row>::kHeadroom);
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
  template <class Size>
  __device__ MergeTeam(bool of_workers, MergeMemory<Size>& memory)
      : num_threads(of_workers ? Size::num_worker_threads() : Size::kMergeWarps * 32),
        thread(static_cast<int>(threadIdx.x) - (of_workers ? 0 : Size::num_worker_threads())),
        barrier_(memory.team_barrier(of_workers)) {}

  int num_threads;
  int thread;  ///< of the team

  /// The team's threads meet.
  __device__ void meet() {
    arrive(barrier_);
    wait_for(barrier_, parity_);
    parity_ ^= 1U;
  }

 private:
  // No named barrier: racecheck does not see all of them while others are in use.
  std::uint32_t barrier_;
  unsigned parity_ = 0;
};

/// Merges what all workers have of a piece: into the output, or into block_partials where other
/// blocks share the item.
/// @param partials  those of worker 0; the next one's `stride` floats on.
template <DeviceRow Row, DeviceIo Io, int kDim, class Size>
__device__ void merge_parts(const DecodeArgs& args, const MergeTeam& team, const Piece& piece,
                            const float* partials, int stride) {
  constexpr int kVectors = kDim / 4;
  constexpr int kMost = decode_max_workers(kDim, Size::kIndex);
  const PieceRows rows = rows_of<Size>(args, piece);
  const int place = 2 * piece.block_rank + (piece.block_rank == piece.first_rank ? 1 : 0);
  [[maybe_unused]] const MeanRow mean = mean_of<kDim, Size>(args, piece);
  float* to = args.scratch.block_partials +
              static_cast<std::int64_t>(place) * partial_floats(kDim, Size::kRows);
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
      if (p < Size::num_workers()) {
        const float* part = partials + p * stride;
        state[p] = *reinterpret_cast<const float2*>(part + 2 * query);
        x[p] = *reinterpret_cast<const float4*>(part + partial_row<kDim, Size>(query) + column);
      }
    }
    MergedColumns merged;
    merged.add(state, x);
    if (piece.num_blocks == 1) {
      if constexpr (Size::Softmax::kHasCompensation) {
        merged.add_mean<Row, Io, kDim>(args, mean, rows.query<Io>(args, query), column);
      }
      merged.add_sink<Row, Size>(args, rows, query);
      merged.store<Io>(rows.output<Io>(args, query) + column);
    } else {
      if (column == 0) {
        *reinterpret_cast<float2*>(to + 2 * query) = make_float2(merged.top, merged.sum);
      }
      *reinterpret_cast<float4*>(to + partial_row<kDim, Size>(query) + column) = merged.out;
    }
  }
}

/// Merges vectors [begin, end) of 4 columns of an item whose `num_blocks` partial results all lie
/// in block_partials. The first of them is in its block's second place, all others in their block's
/// first. Each half of the team adds up every second of them.
/// @param columns, states  shared memory: [num_threads / 2] each
template <DeviceRow Row, DeviceIo Io, int kDim, class Size>
__device__ void merge_blocks(const DecodeArgs& args, MergeTeam& team, const Piece& piece, int begin,
                             int end, float4* columns, float2* states) {
  constexpr int kVectors = kDim / 4;
  // Loads on their way at once: 33 blocks share one of 4 long heads on 132 multiprocessors, and
  // each half merges half of them.
  constexpr int kBatch = 17;
  const PieceRows rows = rows_of<Size>(args, piece);
  [[maybe_unused]] const MeanRow mean = mean_of<kDim, Size>(args, piece);
  const int count = piece.num_blocks;
  const float* partials =
      args.scratch.block_partials +
      static_cast<std::int64_t>(2 * piece.first_rank) * partial_floats(kDim, Size::kRows);
  const int per_half = team.num_threads / 2;
  const int half = team.thread / per_half;
  const int thread = team.thread % per_half;
#pragma unroll 1
  for (; begin < end; begin += per_half) {
    const int i = begin + thread;
    const int query = i / kVectors;
    const int column = i % kVectors * 4;
    const bool works = i < end;
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
          const float* from = partials + (p == 0 ? 1 : 2 * p) * partial_floats(kDim, Size::kRows);
          state[b] = __ldcg(reinterpret_cast<const float2*>(from) + query);
          x[b] = __ldcg(
              reinterpret_cast<const float4*>(from + partial_row<kDim, Size>(query) + column));
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
      if constexpr (Size::Softmax::kHasCompensation) {
        merged.add_mean<Row, Io, kDim>(args, mean, rows.query<Io>(args, query), column);
      }
      merged.add_sink<Row, Size>(args, rows, query);
      merged.store<Io>(rows.output<Io>(args, query) + column);
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

/// Waits for `num_blocks` arrivals, but not for long.
/// @return whether they have come: what they wrote before is visible.
__device__ inline bool all_arrive(const unsigned* arrived, unsigned num_blocks) {
  // Cycles, some 20 us: blocks of equal shares end a few us apart, unless they wait for a
  // multiprocessor that another kernel has. That one may be waiting for this block.
  constexpr long long kPatience = 1 << 15;
  const long long begin = clock64();
  for (;;) {
    unsigned count = 0;
    asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(count) : "l"(arrived) : "memory");
    if (count == num_blocks) return true;
    if (clock64() - begin > kPatience) return false;
  }
}

/// A block's part in an item that other blocks share.
///
/// Few rows are merged by the last block to arrive, and nobody waits. Many rows would take it
/// longer than all that comes before the merge is apart: there the merge is cut into slices, one
/// for each block. A block that has nothing else to do waits until all have arrived, a while, and
/// claims one; the last to arrive claims whatever the others have not.
template <DeviceRow Row, DeviceIo Io, int kDim, class Size>
class SharedItem {
 public:
  __device__ SharedItem(const DecodeArgs& args, MergeTeam& team, int& answer, float4* columns,
                        float2* states)
      : args_(args), team_(team), answer_(answer), columns_(columns), states_(states) {}

  /// The team's partial result is on its way to block_partials.
  __device__ void arrive(const Piece& piece) {
    team_.meet();  // it is written
    const auto num_blocks = static_cast<unsigned>(piece.num_blocks);
    if constexpr (Size::kSharesMerges) {
      if (team_.thread == 0) {
        fence_device();
        is_last_ = atomicAdd(counters(piece), 1U) == num_blocks - 1;
      }
      piece_ = piece;
    } else {
      if (team_.thread == 0) answer_ = arrives_last(counters(piece), num_blocks) ? 1 : 0;
      team_.meet();
      if (answer_ != 0) merge(piece, 0, rows_of<Size>(args_, piece).count * (kDim / 4));
    }
  }
  /// After all else.
  __device__ void finish() {
    if constexpr (Size::kSharesMerges) {
      const int num_slices = piece_.num_blocks;
      if (num_slices == 1) return;
      unsigned* arrived = counters(piece_);
      unsigned* claimed = arrived + 1;
      unsigned* left = arrived + 2;
      const auto num_blocks = static_cast<unsigned>(num_slices);
      const int vectors = rows_of<Size>(args_, piece_).count * (kDim / 4);
      bool claims = team_.thread == 0 && all_arrive(arrived, num_blocks);
#pragma unroll 1
      for (;;) {
        if (team_.thread == 0) {
          answer_ = claims ? static_cast<int>(atomicAdd(claimed, 1U)) : num_slices;
          claims = is_last_;
        }
        team_.meet();
        const int slice = answer_;
        team_.meet();
        if (slice >= num_slices) break;
        merge(piece_, vectors * slice / num_slices, vectors * (slice + 1) / num_slices);
      }
      if (team_.thread == 0 && atomicAdd(left, 1U) == num_blocks - 1) {
        *arrived = 0;
        *claimed = 0;
        *left = 0;
      }
    }
  }

 private:
  __device__ unsigned* counters(const Piece& piece) const {
    return args_.scratch.arrived + kItemCounters * piece.first_rank;
  }
  __device__ void merge(const Piece& piece, int begin, int end) const {
    merge_blocks<Row, Io, kDim, Size>(args_, team_, piece, begin, end, columns_, states_);
  }

  const DecodeArgs& args_;
  MergeTeam& team_;
  int& answer_;
  float4* columns_;
  float2* states_;
  Piece piece_;
  bool is_last_ = false;  // the first thread's
};

/// Merges the block's wide pieces, and its part of those items that other blocks share: the first
/// and the last.
/// @param last  the workers' call: the last wide piece. Null for the merging warps, which take all
///   others, each when every worker has handed it over.
template <DeviceRow Row, DeviceIo Io, int kDim, class Size>
__device__ void merge_pieces(const DecodeArgs& args, const WorkerWork& work, const Piece* last,
                             const PartialMemory<kDim, Size>& partials, MergeMemory<Size>& memory) {
  const bool is_last = last != nullptr;
  MergeTeam team(is_last, memory);
  using Memory = PartialMemory<kDim, Size>;
  const float* parts = is_last ? partials.last_of_worker(0) : partials.of_worker(0);
  const int stride =
      is_last ? Memory::kRingBytes / static_cast<int>(sizeof(float)) : Memory::kFloats;
  // After the last piece the workers' rings are free.
  auto* columns =
      is_last ? reinterpret_cast<float4*>(partials.last_of_worker(0)) : memory.exchange.columns;
  auto* states =
      is_last ? reinterpret_cast<float2*>(columns + team.num_threads / 2) : memory.exchange.states;
  SharedItem<Row, Io, kDim, Size> shared(args, team, memory.answers[is_last ? 1 : 0], columns,
                                         states);
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
    merge_parts<Row, Io, kDim, Size>(args, team, piece, parts, stride);
    if (!is_last) memory.give_room();
    if (piece.num_blocks > 1) shared.arrive(piece);
  }
  shared.finish();
}

}  // namespace headwise::inline v0::cuda::detail
