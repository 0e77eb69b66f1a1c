// SPDX-License-Identifier: MIT
/// @file attend.hpp
/// attend(): one layer of a step over all sequences and heads, prompt or decode.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iterator>

#include "headwise/attention/scratch.hpp"
#include "headwise/attention/tasks.hpp"
#include "headwise/attention/work.hpp"
#include "headwise/cache/kv_cache.hpp"
#include "headwise/core/check.hpp"
#include "headwise/core/executor.hpp"
#include "headwise/core/io_view.hpp"
#include "headwise/simd/simd.hpp"

namespace headwise::inline v0 {

/// Cuts an open step's work for all of its layers, on one thread. attend() does it by itself;
/// engines that deal shares to their own threads call it after begin, and once more before they
/// repeat a layer that some of its shares never attended.
/// @param num_threads  that will share a layer, at most
/// @return kStale unless the step is the cache's open one
/// Allocates only when the step's scratch is too small: reserve_scratch() beforehand.
/// Cost: O(sequences x classes of heads + tasks) for each kind of layer.
template <class Rows>
StepStatus plan_work(const KvCache<Rows>& cache, Step& step, std::size_t num_threads) {
  if (!cache.is_open(step)) return StepStatus::kStale;
  StepWork::cut(cache, step, num_threads);
  return StepStatus::kOk;
}

namespace detail {

template <class Isa, class Rows, class E>
StepStatus attend_layer(const KvCache<Rows>& cache, Step& step, int layer, InputView q, InputView k,
                        InputView v, OutputView out, E& executor, OwnRows own_rows) {
  if (!cache.is_open(step)) return StepStatus::kStale;
  HEADWISE_ASSERT(layer >= 0 && layer < std::ssize(cache.geometry().layers()), "no such layer");
  const bool stores = own_rows == OwnRows::kStored;
  if (stores && cache.is_attended(step, layer)) return StepStatus::kAttended;
  const auto num_threads = static_cast<std::size_t>(executor.num_threads());
  if (step.planned_threads() < num_threads) StepWork::cut(cache, step, num_threads);
  if (stores) StepWork::in(step.scratch()).take_shares(layer);
  const std::uint32_t attempt = stores ? step.start_layer(layer) : step.next_attempt();
  const AttendTasks<Isa, Rows> tasks(cache, step, layer, q, k, v, out, own_rows, attempt);
  executor.for_each(tasks.size(), tasks);
  return StepStatus::kOk;
}

}  // namespace detail

/// Attends the step's queries over everything each head may see, and stores the step's K and V.
///
/// Call it once for every layer between begin and commit. Rows follow the order of the step's
/// chunks. A layer that reads another's K and V (LayerShape::kv_layer) takes that one's k and v of
/// this step, before it or after it, and stores nothing. K and V pass through the cache's row
/// format before they are attended. If the executor throws, the layer may be attended again;
/// kAttended then says that it threw after the last task, and `out` is whole.
///
/// @param q    [rows, num_qo_heads, k_dim]; query head h reads KV head h / group_size
/// @param k,v  [rows, num_kv_heads, k_dim], [rows, num_kv_heads, v_dim]; keys after RoPE at the
///             tokens' absolute positions
/// @param out  [rows, num_qo_heads, v_dim]; must not overlap q, k or v. Each of the four is a
///             TensorView of f32, f16 or bf16, whatever the cache's rows are made of
/// @param executor  the engine's threads (core/executor.hpp); the default is the calling one.
/// @return kStale unless the step is the cache's open one; kAttended where the layer was attended
///   already (see attend_shared). Either way nothing is written.
/// Traffic: each stored row that is seen is read once for all query heads of its group.
/// Allocates only when the step's scratch is too small: reserve_scratch() beforehand.
template <class Isa = simd::BestIsa, class Rows, Executor E = SerialExecutor>
StepStatus attend(const KvCache<Rows>& cache, Step& step, int layer, InputView q, InputView k,
                  InputView v, OutputView out, E&& executor = E{}) {
  return detail::attend_layer<Isa>(cache, step, layer, q, k, v, out, executor, OwnRows::kStored);
}

/// Attends other queries over a layer's K and V, and stores nothing; a model's layers that share
/// them have LayerShape::kv_layer. Any number of times in a step, before the layer's own attend()
/// or after it, with the same k and v.
/// @param q,k,v,out,executor  as attend()
/// @return kStale unless the step is the cache's open one; then nothing is written.
template <class Isa = simd::BestIsa, class Rows, Executor E = SerialExecutor>
StepStatus attend_shared(const KvCache<Rows>& cache, Step& step, int layer, InputView q,
                         InputView k, InputView v, OutputView out, E&& executor = E{}) {
  return detail::attend_layer<Isa>(cache, step, layer, q, k, v, out, executor, OwnRows::kShared);
}

/// Thread `ith`'s share of attend(), where `nth` threads of the engine each take one. All of them
/// call it, with the same arguments but `ith`; the layer is done once the engine's own barrier
/// after it is passed. plan_work() comes first, once a step.
/// @param ith  in [0, nth)
/// @return kStale, kNotPlanned, kTooManyThreads or kAttended; then this share has written nothing.
///   All threads get the same answer, except that kAttended may be kOk for a thread whose share is
///   empty. kNotPlanned also answers a share that was attended already while others of its layer
///   were not, and one of a layer that attend() began and left: plan_work() lets it begin anew.
template <class Isa = simd::BestIsa, class Rows>
StepStatus attend_share(const KvCache<Rows>& cache, const Step& step, int layer, InputView q,
                        InputView k, InputView v, OutputView out, std::size_t ith,
                        std::size_t nth) {
  if (!cache.is_open(step)) return StepStatus::kStale;
  if (step.planned_threads() == 0) return StepStatus::kNotPlanned;
  if (nth > step.planned_threads() || ith >= nth) return StepStatus::kTooManyThreads;
  const AttendTasks<Isa, Rows> tasks(cache, step, layer, q, k, v, out, OwnRows::kStored, 0);
  if (ith >= tasks.size()) return StepStatus::kOk;  // others may be done with the whole layer
  if (cache.is_attended(step, layer)) return StepStatus::kAttended;
  if (!StepWork::in(step.scratch()).begins_share(layer, ith)) return StepStatus::kNotPlanned;
  for (std::size_t task = ith; task < tasks.size(); task += nth) tasks.run(task, ith);
  return StepStatus::kOk;
}

}  // namespace headwise::inline v0
