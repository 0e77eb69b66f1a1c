// SPDX-License-Identifier: MIT
/// @file run_kernels.hpp
/// Both CPU kernels as functions of a whole problem.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "headwise/attention/cpu/decode.hpp"
#include "headwise/attention/cpu/prefill.hpp"
#include "support/attention_cases.hpp"

namespace headwise::test {

/// Decodes a problem in splits that begin at `cuts`; the last does the own rows.
template <class Isa, class Format>
void decode_in_splits(const HeadProblem<Format>& problem, std::vector<std::int64_t> cuts = {0}) {
  const auto& past = problem.past;
  const std::int64_t rows = problem.num_queries * problem.group_size;
  const std::size_t stride = decode_partial_floats(rows, past.shape.v_dim);
  AlignedFloats partials(stride * cuts.size());
  AlignedFloats scratch(decode_scratch_floats(rows, past.shape.k_dim, past.shape.v_dim));
  cuts.push_back(past.num_rows());
  for (std::size_t i = 0; i + 1 < cuts.size(); ++i) {
    decode_split<Isa>(problem, {cuts[i], cuts[i + 1], i + 2 == cuts.size()},
                      partials.data() + i * stride, scratch.data());
  }
  merge_splits<Isa>(problem, partials.data(), stride, static_cast<std::int64_t>(cuts.size()) - 1);
}

/// Prefills a problem in tiles of `tile` queries.
template <class Isa, class Format>
void prefill_in_tiles(const HeadProblem<Format>& problem, std::int64_t tile) {
  AlignedFloats scratch(prefill_scratch_floats(problem.group_size, problem.past.shape.k_dim,
                                               problem.past.shape.v_dim));
  for (std::int64_t begin = 0; begin < problem.num_queries; begin += tile) {
    prefill_tile<Isa>(problem, begin, std::min(begin + tile, problem.num_queries), scratch.data());
  }
}

}  // namespace headwise::test
