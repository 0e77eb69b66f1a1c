// SPDX-License-Identifier: MIT
/// @file append.cuh
/// Stores a step's K and V rows of one layer into pages and ring slots.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "headwise/cache/cuda/device.cuh"
#include "headwise/cache/cuda/elements.cuh"
#include "headwise/cache/cuda/step_state.cuh"
#include "headwise/core/tensor_view.hpp"

namespace headwise::inline v0::cuda {

/// Where one stored row comes from and goes to.
struct RowMove {
  std::int64_t token = -1;     ///< of the step; -1: the row is carried over from `from_slot`
  std::int32_t from_slot = 0;  ///< on the first ring
  std::int32_t slot = 0;       ///< where the row goes
  bool needed = false;         ///< false: there is no such row
};

/// The `row`-th row that a head has to store.
///
/// In place: the step's tokens, less those of a ring that the same step overwrites. On a second
/// ring: every slot of it once, from the step or from the first ring, so that no row is written
/// twice and nobody's order matters.
__device__ inline RowMove row_move(const ClassState& state, std::int64_t length,
                                   std::int64_t num_tokens, std::int64_t row) {
  const std::int64_t next = length + num_tokens;
  const SlotMap map = append_map(state);
  if (state.append_entry == state.read_entry) {
    const Pos pos{length + row};
    return {row, 0, static_cast<std::int32_t>(map.slot(pos).value),
            row < num_tokens && map.keeps(pos, next)};
  }
  if (row >= map.sink + map.turn || row >= next) return {};
  std::int64_t pos = row;  // the newest position that lies in slot `row`
  if (row >= map.sink) pos += (next - 1 - row) / map.turn * map.turn;
  return {pos >= length ? pos - length : -1, static_cast<std::int32_t>(row),
          static_cast<std::int32_t>(row), true};
}

/// One warp a row and head: `row_chunks` 16-byte chunks of K, then of V.
/// Traffic: every row is read once and written once.
/// @param k,v  [rows, num_kv_heads, dim]; rows of 16-byte chunks.
/// @param overflows  counts elements that were finite in k or v and are infinite as stored.
template <DeviceRow Row, DeviceIo Io>
__global__ void __launch_bounds__(256)
    append_kernel(const __grid_constant__ DeviceStep step, const __grid_constant__ LayerHeads heads,
                  TensorView<const Bits<Io>> k, TensorView<const Bits<Io>> v, int dim,
                  std::int64_t most_rows, unsigned long long* overflows) {
  wait_for_previous();
  release_next();
  const int lane = static_cast<int>(threadIdx.x % 32);
  const std::int64_t num_warps = static_cast<std::int64_t>(gridDim.x) * (blockDim.x / 32);
  const std::int64_t entries = step.header->num_entries;
  const std::int64_t num_moves = entries * most_rows * heads.num_heads;
  for (std::int64_t i = blockIdx.x * static_cast<std::int64_t>(blockDim.x / 32) + threadIdx.x / 32;
       i < num_moves; i += num_warps) {
    const int h = static_cast<int>(i % heads.num_heads);
    const std::int64_t row = i / heads.num_heads % most_rows;
    const std::int64_t e = i / heads.num_heads / most_rows;
    const ChunkState chunk = step.entries[e];
    const ClassState state = step.classes[e * step.num_classes + heads.class_idx[h]];
    const RowMove move = row_move(state, chunk.length, chunk.num_tokens, row);
    if (!move.needed || chunk.num_tokens == 0) continue;

    const std::int32_t* table = table_of(step, state, heads.idx_in_class[h]);
    const auto rows_of = [&](int first_entry, int slot) {
      std::byte* page =
          step.pages +
          static_cast<std::size_t>(table[first_entry + slot / kPageTokens]) * step.page_stride;
      return reinterpret_cast<std::uint16_t*>(page) + slot % kPageTokens * dim;
    };
    std::uint16_t* to_k = rows_of(state.append_entry, move.slot);
    std::uint16_t* to_v = to_k + kPageTokens * dim;
    const int chunks = dim / 8;
    const auto copy_to = [&](auto copy, const auto* from_k, const auto* from_v) {
      int lost = 0;
      for (int c = lane; c < 2 * chunks; c += 32) {
        const bool is_k = c < chunks;
        const int at = (is_k ? c : c - chunks) * 8;
        lost += copy((is_k ? to_k : to_v) + at, (is_k ? from_k : from_v) + at);
      }
      return lost;
    };
    const auto as_stored = [](auto* to, const auto* from) {
      return copy_eight<Row, Row>(to, from);
    };
    const std::uint16_t* stored_k =
        move.token >= 0 ? nullptr : rows_of(state.read_entry, move.from_slot);
    if constexpr (std::same_as<Row, Io>) {
      const std::uint16_t* stored_v = stored_k + kPageTokens * dim;
      const bool is_new = move.token >= 0;
      const std::int64_t token = chunk.first_row + move.token;
      copy_to(as_stored, is_new ? row_at(k, token, heads.kv_head[h]) : stored_k,
              is_new ? row_at(v, token, heads.kv_head[h]) : stored_v);
    } else if (move.token < 0) {
      copy_to(as_stored, stored_k, stored_k + kPageTokens * dim);
    } else {
      const std::int64_t token = chunk.first_row + move.token;
      const int lost =
          copy_to([](auto* to, const auto* from) { return copy_eight<Row, Io>(to, from); },
                  row_at(k, token, heads.kv_head[h]), row_at(v, token, heads.kv_head[h]));
      if (lost > 0) atomicAdd(overflows, static_cast<unsigned long long>(lost));
    }
  }
}

/// Scatters the step's rows of one layer.
/// @param most_rows  the most rows that one head of one sequence stores; 1 for decode.
/// @param max_entries  the most sequences that a replay of this launch may meet.
/// @pre k and v are 16-byte aligned, their strides multiples of 16 bytes.
template <DeviceRow Row, DeviceIo Io>
cudaError_t append(const DeviceStep& step, const LayerHeads& heads, TensorView<const Bits<Io>> k,
                   TensorView<const Bits<Io>> v, int dim, std::int64_t most_rows,
                   std::int64_t max_entries, unsigned long long* overflows, bool chains_launches,
                   cudaStream_t stream) {
  constexpr std::int64_t kWarps = 8;
  constexpr std::int64_t kMaxBlocks = 4096;  // a few rows a warp on the longest prompts
  const std::int64_t moves = max_entries * most_rows * heads.num_heads;
  if (moves == 0) return cudaSuccess;
  const auto blocks = static_cast<unsigned>(std::min((moves + kWarps - 1) / kWarps, kMaxBlocks));
  return launch_chained(append_kernel<Row, Io>, dim3(blocks), dim3(kWarps * 32), 0, stream,
                        chains_launches, step, heads, k, v, dim, most_rows, overflows);
}

}  // namespace headwise::inline v0::cuda
