// SPDX-License-Identifier: MIT
/// @file barrier.cuh
/// Barriers in shared memory, at which some threads arrive and others wait: a phase ends when as
/// many have arrived as begin_barrier() said. Phases have parities 0, 1, 0, ...
///
/// What a thread did before it arrived is visible to those that have waited for the phase.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace headwise::inline v0::cuda {

/// Makes a barrier for `arrivals` arrivals a phase; one thread, before the block's threads meet.
__device__ __forceinline__ void begin_barrier(std::uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
/// What this thread did before is visible to those that wait for the phase.
__device__ __forceinline__ void arrive(std::uint32_t barrier) {
  asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
/// Arrives when all copies that this thread has started so far have landed; the barrier counts it
/// as any arrival.
__device__ __forceinline__ void arrive_after_copies(std::uint32_t barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory");
}
/// Whether the phase of this parity has ended; from compute capability 9.0 on this waits a moment
/// for it.
__device__ __forceinline__ bool has_ended(std::uint32_t barrier, unsigned parity) {
  std::uint32_t ended;
  asm volatile(
      "{\n.reg .pred p;\n"
#if __CUDA_ARCH__ >= 900
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
#else
      "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
#endif
      "selp.u32 %0, 1, 0, p;\n}"
      : "=r"(ended)
      : "r"(barrier), "r"(parity)
      : "memory");
  return ended != 0;
}
/// Waits for the end of the phase of this parity.
__device__ __forceinline__ void wait_for(std::uint32_t barrier, unsigned parity) {
  while (!has_ended(barrier, parity)) {
#if __CUDA_ARCH__ < 900
    __nanosleep(100);  // leaves the issue slots to those that work
#endif
  }
}

}  // namespace headwise::inline v0::cuda
