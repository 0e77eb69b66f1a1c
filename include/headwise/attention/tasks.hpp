// SPDX-License-Identifier: MIT
/// @file tasks.hpp
/// AttendTasks: one layer of a step as tasks that any threads may run in any order.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "headwise/attention/cpu/decode.hpp"
#include "headwise/attention/cpu/own_rows.hpp"
#include "headwise/attention/cpu/prefill.hpp"
#include "headwise/attention/problem.hpp"
#include "headwise/attention/work.hpp"
#include "headwise/cache/kv_cache.hpp"
#include "headwise/core/io_view.hpp"
#include "headwise/simd/simd.hpp"

namespace headwise::inline v0 {

/// What becomes of a step's K and V once a head's queries have been attended.
enum class OwnRows : std::uint8_t {
  kStored,  ///< in the head's pages: the layer's own attend
  kShared,  ///< nothing: another layer's queries over the same K and V
};

/// Attention of one layer over an open step: `size()` independent tasks, as StepWork cut them.
///
/// The last task to finish a head merges that head's partial results in order, writes its output
/// and stores its K and V rows; there is no barrier and no serial part. attend() and attend_share()
/// (attend.hpp) make these and check first what is a precondition here.
///
/// @tparam Isa  simd tag; part of the type, so that every ISA has its own code.
/// @tparam Rows  KvCache's.
template <class Isa, class Rows>
class AttendTasks {
 public:
  /// O(1): every thread may make its own.
  /// @param q    [rows, num_qo_heads, k_dim], rows in the order of the step's chunks
  /// @param k,v  [rows, num_kv_heads, k_dim], [rows, num_kv_heads, v_dim]; keys after RoPE
  /// @param out  [rows, num_qo_heads, v_dim], written; must not overlap the others; each of the
  /// four
  ///   of floats, f16 or bf16
  /// @param attempt  the same for all tasks of one pass over the layer, and unlike that of a pass
  ///   that was cut short (Step::start_layer); 0 where none can have been since plan_work()
  /// @pre the step is open and its work is planned.
  AttendTasks(const KvCache<Rows>& cache, const Step& step, int layer, InputView q, InputView k,
              InputView v, OutputView out, OwnRows own_rows, std::uint32_t attempt)
      : cache_(cache),
        step_(step),
        layer_(layer),
        geometry_(cache.geometry().layers()[static_cast<std::size_t>(layer)]),
        work_(StepWork::in(step.scratch())),
        tasks_(work_.of_kind(geometry_.kind)),
        q_(q),
        k_(k),
        v_(v),
        out_(out),
        own_rows_(own_rows),
        attempt_(attempt) {
    HEADWISE_ASSERT(cache.is_open(step) && step.planned_threads() > 0,
                    "tasks need an open step whose work is planned");
  }

  /// Number of tasks.
  std::size_t size() const { return static_cast<std::size_t>(tasks_.num_tasks); }

  /// Runs one task; each exactly once, in any order, at once on different threads.
  /// @param thread  in [0, threads that the step was planned for); no two at once the same.
  void run(std::size_t task, std::size_t thread) const noexcept;

  /// As an executor calls it.
  void operator()(std::size_t task, std::size_t thread) const noexcept { run(task, thread); }

 private:
  /// A task of a head whose rows are Format's.
  /// @param of_item  the task, counted within its item
  template <class Format>
  void run_as(const WorkItem& item, const StepChunk& chunk, int kv_head, std::int64_t of_item,
              std::size_t thread) const noexcept;
  /// Part `tile x splits + split`: its partial result, or its output where there is one split.
  template <class Format>
  static void run_part(const HeadProblem<Format>& problem, const HeadCut& cut, std::int64_t part,
                       float* partials, float* scratch) noexcept;
  template <class Format>
  static void merge_tiles(const HeadProblem<Format>& problem, const HeadCut& cut,
                          float* partials) noexcept;
  template <class Format>
  HeadProblem<Format> problem_of(const StepChunk& chunk, int kv_head) const;

  const KvCache<Rows>& cache_;
  const Step& step_;
  int layer_;
  const LayerGeometry& geometry_;
  const StepWork& work_;
  const LayerWork& tasks_;
  InputView q_, k_, v_;
  OutputView out_;
  OwnRows own_rows_;
  std::uint32_t attempt_;
};

template <class Isa, class Rows>
void AttendTasks<Isa, Rows>::run(std::size_t task, std::size_t thread) const noexcept {
  HEADWISE_ASSERT(task < size() && thread < step_.planned_threads(), "no such task or thread");
  const WorkItem& item = tasks_.item(static_cast<std::int64_t>(task));
  const StepChunk& chunk = step_.chunks()[static_cast<std::size_t>(item.chunk)];
  const std::int64_t of_item = static_cast<std::int64_t>(task) - item.first_task;
  const std::int64_t head = of_item / item.cut.num_parts();
  const int kv_head = geometry_.task_order[static_cast<std::size_t>(item.first_head + head)];
  cache_.visit_format(layer_, kv_head, [&]<class Format>(std::type_identity<Format>) {
    run_as<Format>(item, chunk, kv_head, of_item, thread);
  });
}

template <class Isa, class Rows>
template <class Format>
void AttendTasks<Isa, Rows>::run_as(const WorkItem& item, const StepChunk& chunk, int kv_head,
                                    std::int64_t of_item, std::size_t thread) const noexcept {
  const std::int64_t num_parts = item.cut.num_parts();
  const std::int64_t head = of_item / num_parts;
  const HeadProblem<Format> problem = problem_of<Format>(chunk, kv_head);
  float* partials =
      work_.partials(item.first_partial + head * item.cut.partial_floats_of(
                                                     chunk.num_tokens(), geometry_.shape.group_size,
                                                     geometry_.shape.v_dim));
  run_part(problem, item.cut, of_item % num_parts, partials, work_.thread_scratch(thread));
  if (num_parts > 1 && !work_.arrives_last(item.first_counter + head, attempt_, num_parts)) return;

  if (item.cut.num_splits > 1) merge_tiles(problem, item.cut, partials);
  if (own_rows_ == OwnRows::kShared) return;
  const auto [k_dim, v_dim] = std::pair(problem.past.shape.k_dim, problem.past.shape.v_dim);
  float* const room = work_.thread_scratch(thread);  // the part is done with it
  cache_.template append<Isa>(step_, chunk, layer_, kv_head,
                              detail::FloatRows<Isa>{problem.own_k, k_dim, room},
                              detail::FloatRows<Isa>{problem.own_v, v_dim, room + k_dim});
  step_.note_head_done(layer_);
}

template <class Isa, class Rows>
template <class Format>
void AttendTasks<Isa, Rows>::run_part(const HeadProblem<Format>& problem, const HeadCut& cut,
                                      std::int64_t part, float* partials, float* scratch) noexcept {
  const auto [k_dim, v_dim] = std::pair(problem.past.shape.k_dim, problem.past.shape.v_dim);
  const std::int64_t tile = part / cut.num_splits;
  const std::int64_t index = part % cut.num_splits;
  const std::int64_t first_query = tile * cut.tile_queries;
  const std::int64_t num_queries = cut.queries_of(tile, problem.num_queries);
  const std::int64_t begin = index * cut.split_rows;
  const DecodeSplit split{begin, std::min(begin + cut.split_rows, problem.past.num_rows()),
                          index + 1 == cut.num_splits};
  const std::size_t stride = decode_partial_floats(num_queries * problem.group_size, v_dim);
  float* partial = partials + cut.partial_floats(tile, problem.group_size, v_dim) +
                   static_cast<std::size_t>(index) * stride;

  if (cut.decodes(problem.group_size)) {
    if (cut.num_splits == 1) {
      partial = scratch + decode_scratch_floats(num_queries * problem.group_size, k_dim, v_dim);
    }
    decode_split<Isa>(problem, split, partial, scratch);
    if (cut.num_splits == 1) merge_splits<Isa>(problem, partial, stride, 1);
  } else if (cut.num_splits > 1) {
    prefill_split<Isa>(problem, first_query, first_query + num_queries, split, partial, scratch);
  } else {
    prefill_tile<Isa>(problem, first_query, first_query + num_queries, scratch);
  }
}

template <class Isa, class Rows>
template <class Format>
void AttendTasks<Isa, Rows>::merge_tiles(const HeadProblem<Format>& problem, const HeadCut& cut,
                                         float* partials) noexcept {
  const int v_dim = problem.past.shape.v_dim;
  for (std::int64_t tile = 0; tile < cut.num_tiles; ++tile) {
    HeadProblem<Format> part = problem;  // its queries and outputs alone
    part.num_queries = cut.queries_of(tile, problem.num_queries);
    part.out = problem.out.from(tile * cut.tile_queries, 0);
    merge_splits<Isa>(part, partials + cut.partial_floats(tile, problem.group_size, v_dim),
                      decode_partial_floats(part.num_queries * problem.group_size, v_dim),
                      cut.num_splits);
  }
}

template <class Isa, class Rows>
template <class Format>
HeadProblem<Format> AttendTasks<Isa, Rows>::problem_of(const StepChunk& chunk, int kv_head) const {
  const LayerShape& shape = geometry_.shape;
  const std::int64_t row = chunk.first_row;
  const std::int64_t qo_head = std::int64_t{kv_head} * shape.group_size;
  auto [view, window] = cache_.template seen<Format>(chunk, layer_, kv_head);
  return {view,
          window,
          Pos{chunk.lengths.length},
          chunk.num_tokens(),
          shape.group_size,
          shape.scale(),
          HeadSoftmax::of(shape, kv_head),
          q_.from(row, qo_head),
          k_.from(row, kv_head),
          v_.from(row, kv_head),
          out_.from(row, qo_head)};
}

}  // namespace headwise::inline v0
