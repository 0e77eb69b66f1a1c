// SPDX-License-Identifier: MIT
/// @file tasks.hpp
/// AttendTasks: one layer of a step, cut into tasks that any threads may run in any order.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <variant>

#include "headwise/attention/cpu/decode.hpp"
#include "headwise/attention/cpu/prefill.hpp"
#include "headwise/attention/problem.hpp"
#include "headwise/cache/kv_cache.hpp"
#include "headwise/core/tensor_view.hpp"
#include "headwise/simd/simd.hpp"

namespace headwise::inline v0 {

/// Past rows that one decode task reads: long enough that a merge of partial results is noise
/// beside it, short enough that heads of unequal length spread evenly over a few threads.
inline constexpr std::int64_t kSplitRows = 2048;

/// Query rows (tokens x group) up to which a step reads K and V in splits, as decode does; with
/// more, queries are tiled instead, as prefill does.
inline constexpr std::int64_t kMaxDecodeRows = 64;

/// Floats that one thread's tasks of a layer need, whichever way its heads are cut.
constexpr std::size_t thread_scratch_floats(const LayerShape& layer) {
  return std::max(decode_scratch_floats(kMaxDecodeRows, layer.k_dim, layer.v_dim),
                  prefill_scratch_floats(layer.group_size, layer.k_dim, layer.v_dim));
}

/// How one head of one sequence is cut; a function of that sequence's step alone, never of the
/// threads or of the other sequences, so that neither changes a result's bits.
struct HeadCut {
  bool splits_past = false;    ///< decode: parts are spans of past rows; else tiles of queries
  std::int64_t num_parts = 0;  ///< 0 for a sequence without new tokens
  std::int64_t part_size = 0;  ///< past rows or queries

  /// @param past_rows  stored rows that some query of the step may see
  static constexpr HeadCut of(std::int64_t num_queries, int group_size, std::int64_t past_rows) {
    if (num_queries == 0) return {};
    if (num_queries * group_size <= kMaxDecodeRows) {
      return {true, std::max<std::int64_t>(1, ceil_div(past_rows, kSplitRows)), kSplitRows};
    }
    const std::int64_t tile = prefill_tile_queries(group_size);
    return {false, ceil_div(num_queries, tile), tile};
  }
};

/// Attention of one layer over an open step: `size()` independent tasks.
///
/// The last task to finish a head merges that head's partial results in order, writes its output
/// and stores its K and V rows; there is no barrier and no serial part. An engine with its own
/// threads deals the tasks itself: `for (t = ith; t < tasks.size(); t += nth) tasks.run(t, ith)`.
///
/// @tparam Isa  simd tag; part of the type, so that every ISA has its own code.
/// @tparam Rows  KvCache's.
template <class Isa, class Rows>
class AttendTasks {
  using Format = FormatOf<Rows>;

 public:
  /// Cheap: every thread may make its own.
  /// @param q    [rows, num_qo_heads, k_dim], rows in the order of the step's chunks
  /// @param k,v  [rows, num_kv_heads, k_dim], [rows, num_kv_heads, v_dim]; keys after RoPE
  /// @param out  [rows, num_qo_heads, v_dim], written; must not overlap the others
  /// @pre the step is open, and its scratch holds this layer: see reserve_scratch (scratch.hpp).
  AttendTasks(const KvCache<Rows>& cache, const Step& step, int layer, TensorView<const float> q,
              TensorView<const float> k, TensorView<const float> v, TensorView<float> out)
      : cache_(cache),
        step_(step),
        layer_(layer),
        place_(cache.geometry().layers()[static_cast<std::size_t>(layer)]),
        q_(q),
        k_(k),
        v_(v),
        out_(out) {
    HEADWISE_ASSERT(cache.is_open(step), "attend needs an open step");
    std::int64_t partial_rows = 0;
    for (const StepEntry& entry : step.entries()) {
      for (const ClassRun& run : place_.runs) {
        const HeadCut cut = cut_of(entry, run.class_idx);
        num_tasks_ += run.num_heads * cut.num_parts;
        if (cut.splits_past) {
          partial_rows = std::max(partial_rows, entry.num_tokens() * place_.shape.group_size);
        }
      }
    }
    partial_floats_ = decode_partial_floats(partial_rows, place_.shape.v_dim);
    thread_floats_ = thread_scratch_floats(place_.shape);
  }

  /// Number of tasks.
  std::size_t size() const { return static_cast<std::size_t>(num_tasks_); }

  /// Runs one task; each exactly once, in any order, at once on different threads.
  /// @param thread  in [0, threads that scratch was reserved for); no two at once the same.
  void run(std::size_t task, std::size_t thread) const noexcept {
    HEADWISE_ASSERT(scratch_bytes(thread + 1) <= step_.scratch().num_bytes() &&
                        num_counters() <= step_.scratch().num_counters(),
                    "scratch was not reserved");
    const Part part = locate(static_cast<std::int64_t>(task));
    const HeadProblem<Format> problem = problem_of(*part.entry, part.kv_head);
    if (part.cut.splits_past) {
      const std::int64_t past_rows = problem.past.num_rows();
      const std::int64_t begin = part.index * part.cut.part_size;
      const bool last = part.index + 1 == part.cut.num_parts;
      decode_split<Isa>(problem, {begin, std::min(past_rows, begin + part.cut.part_size), last},
                        partial(static_cast<std::int64_t>(task)), thread_scratch(thread));
    } else {
      const std::int64_t begin = part.index * part.cut.part_size;
      prefill_tile<Isa>(problem, begin, std::min(problem.num_queries, begin + part.cut.part_size),
                        thread_scratch(thread));
    }
    if (!arrives_last(part)) return;
    if (part.cut.splits_past) {
      merge_splits<Isa>(problem, partial(static_cast<std::int64_t>(task) - part.index),
                        partial_floats_, part.cut.num_parts);
    }
    cache_.template append<Isa>(*part.entry, layer_, part.kv_head, problem.own_k, problem.own_v);
    step_.note_head_done(layer_);
  }

  /// As an executor calls it.
  void operator()(std::size_t task, std::size_t thread) const noexcept { run(task, thread); }

  /// Bytes of scratch that this layer needs on `num_threads` threads.
  std::size_t scratch_bytes(std::size_t num_threads) const {
    return (size() * partial_floats_ + num_threads * thread_floats_) * sizeof(float);
  }
  /// Counters that this layer needs: one a head and sequence.
  std::size_t num_counters() const {
    return step_.entries().size() * static_cast<std::size_t>(place_.shape.num_kv_heads);
  }

 private:
  struct Part {
    const StepEntry* entry = nullptr;
    std::size_t entry_idx = 0;
    int kv_head = 0;
    std::int64_t index = 0;
    HeadCut cut;
  };

  HeadCut cut_of(const StepEntry& entry, int class_idx) const {
    const HeadStore& store = cache_.geometry().classes()[static_cast<std::size_t>(class_idx)].store;
    return HeadCut::of(entry.num_tokens(), place_.shape.group_size, cache_.rows_seen(store, entry));
  }

  Part locate(std::int64_t task) const {
    const auto entries = step_.entries();
    for (std::size_t e = 0; e < entries.size(); ++e) {
      std::size_t first = 0;  // of the run's heads in task order
      for (const ClassRun& run : place_.runs) {
        const HeadCut cut = cut_of(entries[e], run.class_idx);
        const std::int64_t count = run.num_heads * cut.num_parts;
        if (task < count) {
          const auto head = static_cast<std::size_t>(task / cut.num_parts);
          return {&entries[e], e, place_.task_order[first + head], task % cut.num_parts, cut};
        }
        task -= count;
        first += static_cast<std::size_t>(run.num_heads);
      }
    }
    HEADWISE_ASSERT(false, "task out of range");
    return {};
  }

  HeadProblem<Format> problem_of(const StepEntry& entry, int kv_head) const {
    const LayerShape& shape = place_.shape;
    const std::int64_t row = entry.first_row;
    const std::int64_t qo_head = std::int64_t{kv_head} * shape.group_size;
    auto [view, window] = cache_.seen(entry, step_.phase(), layer_, kv_head);
    return {view,
            window,
            Pos{entry.lengths.length},
            entry.num_tokens(),
            shape.group_size,
            shape.scale(),
            {q_.row(row, qo_head), q_.stride_n, q_.stride_h},
            {k_.row(row, kv_head), k_.stride_n, k_.stride_h},
            {v_.row(row, kv_head), v_.stride_n, v_.stride_h},
            {out_.row(row, qo_head), out_.stride_n, out_.stride_h}};
  }

  /// Whether this was the head's last part; if so everything the others wrote is visible.
  bool arrives_last(const Part& part) const {
    std::atomic<std::int64_t>& arrived = step_.scratch().counter(
        part.entry_idx * static_cast<std::size_t>(place_.shape.num_kv_heads) +
        static_cast<std::size_t>(part.kv_head));
    if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 < part.cut.num_parts) return false;
    arrived.store(0, std::memory_order_relaxed);  // ready for the next layer
    return true;
  }

  // Partials grow from the front of the scratch, the threads' shares from its end.
  float* partial(std::int64_t task) const {
    return floats() + static_cast<std::size_t>(task) * partial_floats_;
  }
  float* thread_scratch(std::size_t thread) const {
    return floats() + step_.scratch().num_bytes() / sizeof(float) - (thread + 1) * thread_floats_;
  }
  float* floats() const { return reinterpret_cast<float*>(step_.scratch().bytes()); }

  const KvCache<Rows>& cache_;
  const Step& step_;
  int layer_;
  const LayerPlace& place_;
  TensorView<const float> q_, k_, v_;
  TensorView<float> out_;
  std::int64_t num_tasks_ = 0;
  std::size_t partial_floats_ = 0;
  std::size_t thread_floats_ = 0;
};

}  // namespace headwise::inline v0
