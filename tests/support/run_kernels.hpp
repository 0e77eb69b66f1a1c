// SPDX-License-Identifier: MIT
/// @file run_kernels.hpp
/// Both CPU kernels as functions of a whole problem. They are compiled once, in run_kernels.cpp:
/// every ISA times every format takes half a minute.
#pragma once

#include <cstdint>
#include <string_view>
#include <utility>
#include <vector>

#include "headwise/attention/cpu/decode.hpp"
#include "headwise/attention/problem.hpp"
#include "headwise/simd/simd.hpp"

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

}  // namespace headwise::test
