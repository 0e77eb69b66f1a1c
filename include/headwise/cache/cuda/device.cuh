// SPDX-License-Identifier: MIT
/// @file device.cuh
/// What every CUDA part needs: errors at set-up, owned device and pinned memory, chained launches.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <utility>

#include "headwise/core/check.hpp"
#include "headwise/core/tensor_view.hpp"

namespace headwise::inline v0 {

/// A CUDA call failed at set-up; what() names the call's purpose and CUDA's reason.
class CudaError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

namespace cuda {

/// @throws CudaError unless `error` is cudaSuccess.
inline void require(cudaError_t error, const char* what) {
  if (error != cudaSuccess) fail<CudaError>(what, ": ", cudaGetErrorString(error));
}

/// Device memory, freed on destruction. 256-byte aligned, as cudaMalloc gives it.
class DeviceMemory {
 public:
  DeviceMemory() = default;
  /// @throws CudaError when the device has not as much.
  explicit DeviceMemory(std::size_t bytes) : bytes_(bytes) {
    if (bytes != 0) require(cudaMalloc(&data_, bytes), "cudaMalloc");
  }
  ~DeviceMemory() { cudaFree(data_); }
  /// Takes the memory over.
  DeviceMemory(DeviceMemory&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  /// Swaps.
  DeviceMemory& operator=(DeviceMemory&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }

  /// A device address; null where there are no bytes.
  std::byte* data() const { return static_cast<std::byte*>(data_); }
  /// Bytes there are.
  std::size_t num_bytes() const { return bytes_; }

 private:
  void* data_ = nullptr;
  std::size_t bytes_ = 0;
};

/// Page-locked host memory, so that a copy from it is asynchronous.
class PinnedMemory {
 public:
  /// @throws CudaError when the host has not as much.
  explicit PinnedMemory(std::size_t bytes) {
    require(cudaMallocHost(&data_, bytes), "cudaMallocHost");
  }
  ~PinnedMemory() { cudaFreeHost(data_); }
  /// Takes the memory over.
  PinnedMemory(PinnedMemory&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  PinnedMemory& operator=(PinnedMemory&&) = delete;

  /// A host address.
  std::byte* data() const { return static_cast<std::byte*>(data_); }

 private:
  void* data_ = nullptr;
};

/// An event that marks when a copy has left its host memory.
class Event {
 public:
  Event() { require(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "cudaEventCreate"); }
  ~Event() {
    if (event_ != nullptr) cudaEventDestroy(event_);
  }
  /// Takes the event over.
  Event(Event&& other) noexcept : event_(std::exchange(other.event_, nullptr)) {}
  Event& operator=(Event&&) = delete;

  /// As CUDA calls take it.
  cudaEvent_t get() const { return event_; }

 private:
  cudaEvent_t event_ = nullptr;
};

/// What a launch depends on; read once, at set-up.
struct DeviceLimits {
  int num_sms = 0;               ///< multiprocessors
  int smem_per_block = 0;        ///< bytes that a block may ask for
  bool chains_launches = false;  ///< programmatic dependent launch: compute capability 9.0 and up

  /// Of the current device.
  /// @throws CudaError without a device.
  static DeviceLimits current() {
    DeviceLimits limits;
    int device = 0;
    int major = 0;
    require(cudaGetDevice(&device), "cudaGetDevice");
    require(cudaDeviceGetAttribute(&limits.num_sms, cudaDevAttrMultiProcessorCount, device),
            "multiprocessor count");
    require(cudaDeviceGetAttribute(&limits.smem_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin,
                                   device),
            "shared memory per block");
    require(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device),
            "compute capability");
    limits.chains_launches = major >= 9;
    return limits;
  }
};

/// Launches a kernel that begins with wait_for_previous(): its blocks may be set up while the
/// stream's former kernel drains, which saves about a microsecond a launch.
template <class... Params, class... Args>
cudaError_t launch_chained(void (*kernel)(Params...), dim3 grid, dim3 block, std::size_t smem_bytes,
                           cudaStream_t stream, bool chains_launches, Args&&... args) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = smem_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = chains_launches ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Params>(std::forward<Args>(args))...);
}

#ifdef __CUDACC__

/// Everything that earlier kernels of the stream wrote is visible from here on.
__device__ __forceinline__ void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

/// Lets the stream's next kernel be set up as blocks of this one finish.
__device__ __forceinline__ void release_next() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/// TensorView::row for kernels.
template <class T>
__device__ __forceinline__ T* row_at(const TensorView<T>& view, std::int64_t token,
                                     std::int64_t head) {
  return view.data + token * view.stride_n + head * view.stride_h;
}

#endif  // __CUDACC__

}  // namespace cuda
}  // namespace headwise::inline v0
