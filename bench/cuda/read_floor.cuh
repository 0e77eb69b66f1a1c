// SPDX-License-Identifier: MIT
/// @file read_floor.cuh
/// Kernels that only read: what nobody can beat over the same bytes on the same machine.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "timing.cuh"

namespace headwise::bench {

/// Plain 16-byte loads, kUnroll of them in flight a thread.
template <int kUnroll>
__global__ void __launch_bounds__(256)
    read_loads(const uint4* data, std::size_t count, unsigned* sink) {
  unsigned seen = 0;
  const std::size_t tile = 256 * kUnroll;
  for (std::size_t begin = blockIdx.x * tile; begin < count; begin += gridDim.x * tile) {
    uint4 x[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const std::size_t at = begin + static_cast<std::size_t>(i) * 256 + threadIdx.x;
      x[i] = at < count ? __ldcs(data + at) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) seen ^= x[i].x ^ x[i].y ^ x[i].z ^ x[i].w;
  }
  if (seen == 0x12345678U) *sink = seen;
}

/// The bulk copy engine: one thread keeps a ring of kStages copies of kBytes in flight.
/// @param contiguous  each block reads one piece of memory instead of every gridDim.x-th chunk.
template <int kBytes, int kStages>
__global__ void __launch_bounds__(32)
    read_bulk(const char* data, std::size_t num_bytes, bool contiguous) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) char ring[];
  __shared__ __align__(8) std::uint64_t barriers[kStages];
  if (threadIdx.x != 0) return;
  const auto ring_at = static_cast<std::uint32_t>(__cvta_generic_to_shared(ring));
  const auto barrier_at = static_cast<std::uint32_t>(__cvta_generic_to_shared(barriers));
  for (int i = 0; i < kStages; ++i) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier_at + 8 * i));
  }
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  const std::size_t chunks = num_bytes / kBytes;
  const std::size_t each = (chunks + gridDim.x - 1) / gridDim.x;
  const std::size_t first = contiguous ? blockIdx.x * each : blockIdx.x;
  const std::size_t stride = contiguous ? 1 : gridDim.x;
  std::size_t mine = 0;
  if (first < chunks) {
    mine = contiguous ? min(each, chunks - first) : (chunks - first + stride - 1) / stride;
  }
  const auto start = [&](std::size_t i) {
    const auto stage = static_cast<std::uint32_t>(i % kStages);
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier_at + 8 * stage),
        "r"(kBytes)
        : "memory");
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(ring_at + stage * kBytes),
        "l"(data + (first + i * stride) * kBytes), "r"(kBytes), "r"(barrier_at + 8 * stage)
        : "memory");
  };
  for (std::size_t i = 0; i < kStages && i < mine; ++i) start(i);
  for (std::size_t i = 0; i < mine; ++i) {
    asm volatile(
        "{\n.reg .pred p;\nW%=: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n@p bra "
        "D%=;\nbra W%=;\nD%=:\n}" ::"r"(barrier_at + 8 * static_cast<std::uint32_t>(i % kStages)),
        "r"(static_cast<std::uint32_t>(i / kStages & 1))
        : "memory");
    if (i + kStages < mine) start(i + kStages);
  }
#endif
}

/// Microseconds to read `num_bytes`, the next ones at each call, out of `pool_bytes`.
struct ReadFloor {
  double best = 0.0;
  double loads = 0.0;
  double bulk = 0.0;
  double bulk_contiguous = 0.0;
};
inline ReadFloor read_floor(cudaStream_t stream, const std::byte* pool, std::size_t pool_bytes,
                            std::size_t num_bytes, int num_sms) {
  constexpr int kBytes = 16384;
  constexpr int kStages = 13;
  num_bytes = num_bytes / kBytes * kBytes;
  const std::size_t sets = std::max<std::size_t>(1, pool_bytes / num_bytes);
  static cuda::DeviceMemory sink(256);
  cuda::require(cudaFuncSetAttribute(read_bulk<kBytes, kStages>,
                                     cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes * kStages),
                "read_bulk");
  const double guess = 2.0 + static_cast<double>(num_bytes) / 4.6e6;
  const auto set = [&](int i) { return pool + static_cast<std::size_t>(i) % sets * num_bytes; };
  const auto bulk = [&](bool contiguous) {
    return microseconds(stream, guess, [&](int i) {
      read_bulk<kBytes, kStages><<<num_sms, 32, kBytes * kStages, stream>>>(
          reinterpret_cast<const char*>(set(i)), num_bytes, contiguous);
      return cudaGetLastError();
    });
  };
  ReadFloor floor;
  floor.bulk = bulk(false);
  floor.bulk_contiguous = bulk(true);
  floor.loads = 1e30;
  for (const int blocks_per_sm : {2, 4, 8}) {
    floor.loads = std::min(floor.loads, microseconds(stream, guess, [&](int i) {
                             read_loads<8><<<num_sms * blocks_per_sm, 256, 0, stream>>>(
                                 reinterpret_cast<const uint4*>(set(i)), num_bytes / 16,
                                 reinterpret_cast<unsigned*>(sink.data()));
                             return cudaGetLastError();
                           }));
  }
  floor.best = std::min({floor.bulk, floor.bulk_contiguous, floor.loads});
  return floor;
}

}  // namespace headwise::bench
