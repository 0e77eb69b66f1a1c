// SPDX-License-Identifier: MIT
/// @file run_kernels.hpp
/// Both CPU kernels as functions of a whole problem, and as those of a head whose types are
/// forgotten. They are compiled once, in run_kernels.cpp: every ISA times every format takes half a
/// minute.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <ostream>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "headwise/attention/cpu/decode.hpp"
#include "headwise/attention/problem.hpp"
#include "headwise/simd/simd.hpp"
#include "support/attention_cases.hpp"

namespace headwise::test {

/// One ISA's kernels over one format.
template <class Format>
struct Kernels {
  void (*decode_in_splits)(const HeadProblem<Format>&, std::vector<std::int64_t> cuts) = nullptr;
  void (*prefill_in_tiles)(const HeadProblem<Format>&, std::int64_t tile) = nullptr;
  void (*decode_one_split)(const HeadProblem<Format>&, DecodeSplit, float* partial,
                           float* scratch) noexcept = nullptr;
};

/// @param isa  simd::isa_name of one that this build has
template <class Format>
Kernels<Format> kernels_on(std::string_view isa);

/// Decodes a problem in splits that begin at `cuts`; the last does the own rows.
template <class Isa, class Format>
void decode_in_splits(const HeadProblem<Format>& problem, std::vector<std::int64_t> cuts = {0}) {
  kernels_on<Format>(simd::isa_name<Isa>()).decode_in_splits(problem, std::move(cuts));
}

/// decode_split alone.
template <class Isa, class Format>
void decode_one_split(const HeadProblem<Format>& problem, DecodeSplit split, float* partial,
                      float* scratch) {
  kernels_on<Format>(simd::isa_name<Isa>()).decode_one_split(problem, split, partial, scratch);
}

/// Prefills a problem in tiles of `tile` queries.
template <class Isa, class Format>
void prefill_in_tiles(const HeadProblem<Format>& problem, std::int64_t tile) {
  kernels_on<Format>(simd::isa_name<Isa>()).prefill_in_tiles(problem, tile);
}

/// A PagedHead of one format and one ISA's kernels over it: tests over all of them are compiled
/// once, not thirty times.
class KernelHead {
 public:
  virtual ~KernelHead() = default;

  /// As decode_in_splits.
  virtual void decode(std::vector<std::int64_t> cuts = {0}) = 0;
  virtual void decode_one_split(DecodeSplit split, float* partial, float* scratch) = 0;
  /// As prefill_in_tiles.
  virtual void prefill(std::int64_t tile) = 0;
  /// The oracle's outputs.
  virtual std::vector<double> truth() = 0;
  virtual const std::vector<float>& out() const = 0;
  /// Stored rows.
  virtual std::int64_t num_rows() = 0;

  virtual void set_row(std::int64_t pos, float k, float v) = 0;
  virtual void set_q(float q) = 0;
  /// Instead of the case's own.
  virtual void set_compensation(CompensationRow row) = 0;
  virtual void set_sinks(const float* sinks) = 0;
  /// An element as the format stores it.
  virtual float stored(float v) const = 0;
};

/// An ISA that this build has, and a format.
struct KernelPair {
  std::string name;  ///< "avx512_f16_tiled"
  std::unique_ptr<KernelHead> (*make)(const AttentionCase&);

  std::unique_ptr<KernelHead> head(const AttentionCase& c) const { return make(c); }
  friend void PrintTo(const KernelPair& pair, std::ostream* os) { *os << pair.name; }
};
std::vector<KernelPair> all_kernels();

/// A format with every ISA: for tests whose oracle takes longer than the kernels, and is the same.
struct KernelFormat {
  std::string name;  ///< "f16_tiled"
  std::vector<KernelPair> isas;

  friend void PrintTo(const KernelFormat& format, std::ostream* os) { *os << format.name; }
};
std::vector<KernelFormat> all_formats();

/// @tparam Pair  KernelPair or KernelFormat
template <class Pair>
std::string name_of_kernels(const ::testing::TestParamInfo<Pair>& info) {
  return info.param.name;
}

}  // namespace headwise::test
