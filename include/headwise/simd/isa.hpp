// SPDX-License-Identifier: MIT
/// @file isa.hpp
/// Instruction sets as types: the tag that every function carries whose code depends on one.
///
/// Two translation units with different -march flags may be linked together. A function that both
/// instantiate under one name would be kept once, in either encoding: an illegal instruction on the
/// smaller machine. With the tag among the template arguments they are different functions.
///
/// What has no tag (page tables, plans, errors) uses no instruction set on purpose, but a compiler
/// may: compile what runs once per process with the flags of the smallest machine.
#pragma once

#include <concepts>

#include "headwise/core/config.hpp"

namespace headwise::inline v0::simd {

struct Scalar {};  ///< portable C++, one float at a time
struct Avx2 {};    ///< AVX2 + FMA + F16C
struct Avx512 {};  ///< AVX-512 F, BW, DQ, VL
struct Neon {};    ///< AArch64 Advanced SIMD

/// "scalar", "avx2", "avx512" or "neon".
template <class Isa>
constexpr const char* isa_name() {
  if constexpr (std::same_as<Isa, Scalar>) return "scalar";
  if constexpr (std::same_as<Isa, Avx2>) return "avx2";
  if constexpr (std::same_as<Isa, Avx512>) return "avx512";
  if constexpr (std::same_as<Isa, Neon>) return "neon";
}

/// The vector operations of one instruction set: a register type `V` of `kWidth` floats, and
///
///     load_int4(const uint8_t*, low, high)  kWidth bytes: the four-bit integers (two's complement)
///     in their low halves, and those in their high halves
///     zero()  broadcast(float)  load(const float* | f16* | bf16* | int8_t*)  store(float* | f16* |
///     bf16*, V) add(a, b)  sub(a, b)  mul(a, b)  div(a, b)  fma(a, b, c) = a * b + c  max(a, b)
///     reduce_add(v) reduce_max(v) any_above(a, b)        whether a > b in some lane round(v) to
///     the nearest integer, for |v| < 2^22 scale_by_exp2(v, n)    v * 2^n, v in [0.5, 2], n an
///     integer in [-126, 127] zero_below(v, x, low)  0 where x < low, v elsewhere (also where v is
///     not finite) round_to<Row>(v)       what a store to Row and a load back would give
///     transpose(rows)        kWidth registers as a square matrix, in place
///
/// Memory need not be aligned. Stores to two bytes round to nearest even, bit for bit like
/// core/dtype.hpp; a NaN stays a NaN, its payload may differ. Nothing here relies on infinities or
/// NaN obeying arithmetic, so a consumer's -ffast-math is safe.
template <class Isa>
struct Ops;  // complete only where this translation unit may use the instructions

/// What `Ops` of every instruction set offers.
template <class Isa>
concept CompiledIsa = requires(typename Ops<Isa>::V v, float* memory) {
  { Ops<Isa>::fma(v, v, v) } -> std::same_as<typename Ops<Isa>::V>;
  { Ops<Isa>::load(memory) } -> std::same_as<typename Ops<Isa>::V>;
  Ops<Isa>::store(memory, v);
};

}  // namespace headwise::inline v0::simd
