// SPDX-License-Identifier: MIT
/// @file tensor_core.cuh
/// The instructions that attention is made of: asynchronous copies, matrix loads and products.
///
/// Fragment shapes are those of mma.m16n8k16 (PTX ISA, "Matrix Fragments for mma.m16n8k16"): lane
/// 4g + t holds rows g and g + 8, columns 2t and 2t + 1 (and 8 more) of its operands.
#pragma once

#include <cstdint>
#include <limits>

#include "headwise/core/dtype.hpp"

namespace headwise::inline v0::cuda {

/// All 32 lanes, as the shuffle and vote instructions name them.
inline constexpr unsigned kWholeWarp = 0xFFFFFFFFU;
/// log2(e): softmax is computed with powers of two.
inline constexpr float kLog2E = 1.4426950408889634F;
/// The score of a key that a query does not see: its weight is 0, whatever the query sees.
inline constexpr float kHidden = -std::numeric_limits<float>::infinity();
/// The greatest score of no keys. Finite: kHidden less this is kHidden, and this less itself is 0,
/// so no weight is ever computed from infinity less infinity. No finite score lies below it.
inline constexpr float kLowest = std::numeric_limits<float>::lowest();

/// A shared-memory address as instructions take it.
__device__ __forceinline__ std::uint32_t shared_address(const void* p) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
}

/// The way back: what lies at a shared-memory address.
template <class T>
__device__ __forceinline__ T* shared_pointer(std::uint32_t address) {
  return static_cast<T*>(__cvta_shared_to_generic(address));
}

/// Copies 16 bytes past the registers and the L1 cache. Plain loads stop at 4.3 TB/s where these
/// reach 4.6 on an H200 (bench/results).
__device__ __forceinline__ void copy_async_16(std::uint32_t to, const void* from) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from)
               : "memory");
}
/// What copy_async_16_once takes: lines that the L2 cache drops first.
__device__ __forceinline__ std::uint64_t read_once_policy() {
  std::uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
/// As copy_async_16, for bytes that nobody reads again soon: work lists, page tables, partial
/// results and the layer's other data stay in the L2 cache.
__device__ __forceinline__ void copy_async_16_once(std::uint32_t to, const void* from,
                                                   std::uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2;" ::"r"(to),
               "l"(from), "l"(policy)
               : "memory");
}
/// Copies 4 bytes.
__device__ __forceinline__ void copy_async_4(std::uint32_t to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}
/// Makes the copies since the last call one group.
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
/// Waits until at most `kPending` of the committed groups are under way.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

/// Four 8x8 matrices; lane 8i + r gives the address of row r of matrix i.
__device__ __forceinline__ void load_matrices(std::uint32_t (&m)[4], std::uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(address)
               : "memory");
}
/// As load_matrices, each matrix transposed.
__device__ __forceinline__ void load_matrices_transposed(std::uint32_t (&m)[4],
                                                         std::uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(address)
               : "memory");
}
/// The way back of load_matrices, compute capability 9.0 and up.
__device__ __forceinline__ void store_matrices(const std::uint32_t (&m)[4], std::uint32_t address) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(address),
               "r"(m[0]), "r"(m[1]), "r"(m[2]), "r"(m[3])
               : "memory");
}
/// An 8x8 matrix of two-byte elements held by a warp, transposed.
__device__ __forceinline__ std::uint32_t transposed(std::uint32_t matrix) {
  std::uint32_t out;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(matrix));
  return out;
}

/// 2^x in one approximate instruction; subnormal results are 0.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// 1 / x in one approximate instruction, for x whose inverse is a normal number.
__device__ __forceinline__ float inverse_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// Products of one element type, accumulated in f32.
template <class Row>
struct TensorCore;

/// f16 operands.
template <>
struct TensorCore<f16> {
  static constexpr char kName[] = "f16";  ///< in instructions
  /// Powers of two that weights stay below 1, so that 2^31 rows' weighted sum is no overflow: none,
  /// the greatest element is 65504.
  static constexpr float kHeadroom = 0.0F;
  /// c += a b: a [16][16], b [16][8], c [16][8], each lane with its fragments.
  static __device__ __forceinline__ void multiply(float (&c)[4], const std::uint32_t (&a)[4],
                                                  std::uint32_t b0, std::uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
  /// Adds 0 times two elements: `zeros` stays two zeros while all of them are finite.
  static __device__ __forceinline__ void note(std::uint32_t pair, std::uint32_t& zeros) {
    asm("fma.rn.f16x2 %0, %1, %2, %0;" : "+r"(zeros) : "r"(pair), "r"(0));
  }
};

/// bf16 operands.
template <>
struct TensorCore<bf16> {
  static constexpr char kName[] = "bf16";  ///< in instructions
  /// Powers of two that weights stay below 1, so that 2^31 rows' weighted sum is no overflow:
  /// elements reach as far as the sums. Below 2^-93 a row's values lose bits for it.
  static constexpr float kHeadroom = 32.0F;
  /// c += a b: a [16][16], b [16][8], c [16][8], each lane with its fragments.
  static __device__ __forceinline__ void multiply(float (&c)[4], const std::uint32_t (&a)[4],
                                                  std::uint32_t b0, std::uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
  /// Adds 0 times two elements: `zeros` stays two zeros while all of them are finite.
  static __device__ __forceinline__ void note(std::uint32_t pair, std::uint32_t& zeros) {
    asm("fma.rn.bf16x2 %0, %1, %2, %0;" : "+r"(zeros) : "r"(pair), "r"(0));
  }
};

/// Whether what TensorCore::note() gave is still zeros, of either sign.
__device__ __forceinline__ bool are_zeros(std::uint32_t pair) { return (pair & 0x7FFF7FFFU) == 0; }

/// A tile's rows in shared memory: 8 elements of padding make a row an odd number of 16-byte
/// chunks, so that the eight rows of a matrix load lie in different banks, whatever the width.
template <int kDim>
inline constexpr int kPaddedDim = kDim + 8;

}  // namespace headwise::inline v0::cuda
