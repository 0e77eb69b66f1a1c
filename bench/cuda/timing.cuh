// SPDX-License-Identifier: MIT
/// @file timing.cuh
/// Times launches as a decode step makes them: graphs of back-to-back calls over fresh memory.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "headwise/cache/cuda/device.cuh"

namespace headwise::bench {

/// Microseconds a call of `launch(i)`, i counting up: a graph of enough calls for 2 ms, two replays
/// to warm up, the median of nine. The gap between two kernels is part of it, as in a model.
template <class Launch>
double microseconds(cudaStream_t stream, double guess_us, Launch launch) {
  const int calls = std::clamp(static_cast<int>(2000.0 / guess_us), 4, 400);
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t exec = nullptr;
  cuda::require(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capture");
  for (int i = 0; i < calls; ++i) cuda::require(launch(i), "launch");
  cuda::require(cudaStreamEndCapture(stream, &graph), "capture");
  cuda::require(cudaGraphInstantiate(&exec, graph, 0), "instantiate");
  cudaEvent_t start = nullptr;
  cudaEvent_t stop = nullptr;
  cuda::require(cudaEventCreate(&start), "event");
  cuda::require(cudaEventCreate(&stop), "event");
  std::vector<double> times;
  for (int i = 0; i < 11; ++i) {
    cuda::require(cudaEventRecord(start, stream), "event");
    cuda::require(cudaGraphLaunch(exec, stream), "launch");
    cuda::require(cudaEventRecord(stop, stream), "event");
    cuda::require(cudaEventSynchronize(stop), "synchronize");
    float ms = 0.0F;
    cuda::require(cudaEventElapsedTime(&ms, start, stop), "elapsed");
    if (i >= 2) times.push_back(1000.0 * static_cast<double>(ms) / calls);
  }
  std::sort(times.begin(), times.end());
  cudaGraphExecDestroy(exec);
  cudaGraphDestroy(graph);
  cudaEventDestroy(start);
  cudaEventDestroy(stop);
  return times[times.size() / 2];
}

/// Fills memory with two-byte numbers in (-1, 1) that differ everywhere: f16 where kIsBf16 is
/// false.
template <bool kIsBf16>
__global__ void fill_random(std::uint16_t* data, std::size_t count, unsigned seed) {
  for (std::size_t i = blockIdx.x * static_cast<std::size_t>(blockDim.x) + threadIdx.x; i < count;
       i += static_cast<std::size_t>(gridDim.x) * blockDim.x) {
    unsigned x = static_cast<unsigned>(i) * 2654435761U + static_cast<unsigned>(i >> 32) + seed;
    x ^= x >> 16;
    x *= 2246822519U;
    x ^= x >> 13;
    x *= 3266489917U;
    x ^= x >> 16;
    // A sign, an exponent of 2^-1 or 2^-2, and mantissa bits.
    data[i] = kIsBf16 ? static_cast<std::uint16_t>((x & 0x8000U) | 0x3E80U | (x & 0xFFU))
                      : static_cast<std::uint16_t>((x & 0x8000U) | 0x3400U | (x & 0x7FFU));
  }
}
template <bool kIsBf16>
void fill(void* data, std::size_t bytes, unsigned seed) {
  fill_random<kIsBf16><<<2048, 256>>>(static_cast<std::uint16_t*>(data), bytes / 2, seed);
  cuda::require(cudaDeviceSynchronize(), "fill");
}

}  // namespace headwise::bench
