// SPDX-License-Identifier: MIT
/// @file attend.hpp
/// attend(): one layer of a step over all sequences and heads, prompt or decode.
#pragma once

#include <cstddef>

#include "headwise/attention/scratch.hpp"
#include "headwise/attention/tasks.hpp"
#include "headwise/cache/kv_cache.hpp"
#include "headwise/core/executor.hpp"
#include "headwise/core/tensor_view.hpp"
#include "headwise/simd/simd.hpp"

namespace headwise::inline v0 {

/// Attends the step's queries over everything each head may see, and stores the step's K and V.
///
/// Call it once for every layer between begin and commit. Rows follow the order of the step's
/// chunks. K and V pass through the cache's row format before they are attended.
///
/// @param q    [rows, num_qo_heads, k_dim]; query head h reads KV head h / group_size
/// @param k,v  [rows, num_kv_heads, k_dim], [rows, num_kv_heads, v_dim]; keys after RoPE at the
///             tokens' absolute positions
/// @param out  [rows, num_qo_heads, v_dim]; must not overlap q, k or v
/// @param executor  the engine's threads (core/executor.hpp); the default is the calling one.
/// Traffic: each stored row that is seen is read once for all query heads of its group.
/// Allocates only when the step's scratch is too small: reserve_scratch() beforehand.
template <class Isa = simd::BestIsa, class Rows, Executor E = SerialExecutor>
void attend(const KvCache<Rows>& cache, Step& step, int layer, TensorView<const float> q,
            TensorView<const float> k, TensorView<const float> v, TensorView<float> out,
            E&& executor = E{}) {
  const AttendTasks<Isa, Rows> tasks(cache, step, layer, q, k, v, out);
  step.scratch().reserve(tasks.scratch_bytes(executor.num_threads()), tasks.num_counters());
  executor.for_each(tasks.size(), tasks);
}

}  // namespace headwise::inline v0
