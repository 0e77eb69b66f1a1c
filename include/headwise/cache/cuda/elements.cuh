// SPDX-License-Identifier: MIT
/// @file elements.cuh
/// Element types on a device: what rows are stored as, what a caller's tensors hold, and the way
/// from one to the other, two elements or eight at a time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <concepts>
#include <cstdint>
#include <type_traits>

#include "headwise/core/dtype.hpp"

namespace headwise::inline v0::cuda {

/// What a device page can be made of: tensor cores multiply two-byte elements.
template <class Row>
concept DeviceRow = std::same_as<Row, f16> || std::same_as<Row, bf16>;

/// What a caller's q, k, v and out may be made of, whatever the pages are.
template <class Io>
concept DeviceIo = DeviceRow<Io> || std::same_as<Io, f32>;

/// How kernels see an element.
template <DeviceIo T>
using Bits = std::conditional_t<std::same_as<T, f32>, float, std::uint16_t>;

/// Where a tensor's rows lie, for a kernel that knows what they are made of; strides in elements.
template <class Pointer>
struct RowsAt {
  Pointer data = nullptr;     ///< of row (0, 0), a pointer to void
  std::int64_t stride_n = 0;  ///< from one token to the next
  std::int64_t stride_h = 0;  ///< from one head to the next
};

/// Two two-byte elements in a register, the first one in the lower half.
template <DeviceRow T>
struct Pair;

/// f16 elements.
template <>
struct Pair<f16> {
  /// No finite float from here on is a finite element.
  static constexpr float kOverflow = 65520.0F;
  /// Rounds to nearest even; what is too large becomes infinity.
  static __device__ __forceinline__ std::uint32_t pack(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const std::uint32_t*>(&pair);
  }
  /// The way back.
  static __device__ __forceinline__ float2 unpack(std::uint32_t pair) {
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
  }
};

/// bf16 elements.
template <>
struct Pair<bf16> {
  /// No finite float from here on is a finite element.
  static constexpr float kOverflow = 0x1.FFp127F;
  /// Rounds to nearest even; what is too large becomes infinity.
  static __device__ __forceinline__ std::uint32_t pack(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const std::uint32_t*>(&pair);
  }
  /// The way back.
  static __device__ __forceinline__ float2 unpack(std::uint32_t pair) {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000U));
  }
};

/// Two elements of type From as a pair of To.
template <DeviceRow To, DeviceIo From>
__device__ __forceinline__ std::uint32_t load_pair(const Bits<From>* from) {
  if constexpr (std::same_as<From, f32>) {
    const float2 x = *reinterpret_cast<const float2*>(from);
    return Pair<To>::pack(x.x, x.y);
  } else {
    const std::uint32_t pair = *reinterpret_cast<const std::uint32_t*>(from);
    if constexpr (std::same_as<To, From>) return pair;
    const float2 x = Pair<From>::unpack(pair);
    return Pair<To>::pack(x.x, x.y);
  }
}

/// Copies eight elements, 16 bytes of a two-byte type on either side.
/// @return how many of them were finite and are no longer.
template <DeviceIo To, DeviceIo From>
__device__ __forceinline__ int copy_eight(Bits<To>* to, const Bits<From>* from) {
  if constexpr (std::same_as<To, From>) {
    static_assert(DeviceRow<To>);
    *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
    return 0;
  } else {
    float x[8];
    if constexpr (std::same_as<From, f32>) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float4 four = reinterpret_cast<const float4*>(from)[i];
        x[4 * i] = four.x;
        x[4 * i + 1] = four.y;
        x[4 * i + 2] = four.z;
        x[4 * i + 3] = four.w;
      }
    } else {
      const uint4 pairs = *reinterpret_cast<const uint4*>(from);
      const std::uint32_t pair[4] = {pairs.x, pairs.y, pairs.z, pairs.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 two = Pair<From>::unpack(pair[i]);
        x[2 * i] = two.x;
        x[2 * i + 1] = two.y;
      }
    }
    if constexpr (std::same_as<To, f32>) {
      reinterpret_cast<float4*>(to)[0] = make_float4(x[0], x[1], x[2], x[3]);
      reinterpret_cast<float4*>(to)[1] = make_float4(x[4], x[5], x[6], x[7]);
      return 0;
    } else {
      *reinterpret_cast<uint4*>(to) =
          make_uint4(Pair<To>::pack(x[0], x[1]), Pair<To>::pack(x[2], x[3]),
                     Pair<To>::pack(x[4], x[5]), Pair<To>::pack(x[6], x[7]));
      int overflows = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        overflows += fabsf(x[i]) >= Pair<To>::kOverflow && !isinf(x[i]) ? 1 : 0;
      }
      return overflows;
    }
  }
}

/// One block a row of tokens, all heads: from one type to another. `to` is dense.
/// @param width  elements of a head, a multiple of 8.
template <DeviceIo To, DeviceIo From>
__global__ void __launch_bounds__(256)
    convert_rows_kernel(RowsAt<void*> to, RowsAt<const void*> from, int heads, int width) {
  const std::int64_t token = blockIdx.x;
  const int chunks = width / 8;
  for (int i = static_cast<int>(threadIdx.x); i < heads * chunks; i += 256) {
    const int head = i / chunks;
    const int at = i % chunks * 8;
    copy_eight<To, From>(
        static_cast<Bits<To>*>(to.data) + token * to.stride_n + head * to.stride_h + at,
        static_cast<const Bits<From>*>(from.data) + token * from.stride_n + head * from.stride_h +
            at);
  }
}

/// Converts `rows` tokens' rows of `heads` heads.
template <DeviceIo To, DeviceIo From>
cudaError_t convert_rows(RowsAt<void*> to, RowsAt<const void*> from, std::int64_t rows, int heads,
                         int width, cudaStream_t stream) {
  if (rows == 0) return cudaSuccess;
  convert_rows_kernel<To, From>
      <<<static_cast<unsigned>(rows), 256, 0, stream>>>(to, from, heads, width);
  return cudaGetLastError();
}

}  // namespace headwise::inline v0::cuda
