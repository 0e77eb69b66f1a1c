// SPDX-License-Identifier: MIT
/// @file executor.hpp
/// Threads belong to the engine: what attention asks of them, and adapters for the usual pools.
#pragma once

#include <algorithm>
#include <atomic>
#include <concepts>
#include <cstddef>
#include <type_traits>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace headwise::inline v0 {

/// Runs `fn(task, thread)` once for every task in [0, num_tasks) and returns when all are done.
/// `thread` is in [0, num_threads()) and no two calls run at once with the same one.
template <class E>
concept Executor = requires(E& executor, std::size_t num_tasks,
                            void (*fn)(std::size_t task, std::size_t thread)) {
  { executor.num_threads() } -> std::convertible_to<std::size_t>;
  executor.for_each(num_tasks, fn);
};

/// Everything on the calling thread; the default.
struct SerialExecutor {
  /// 1: the caller.
  static constexpr std::size_t num_threads() { return 1; }
  /// Tasks 0, 1, ... in order.
  template <class Fn>
  void for_each(std::size_t num_tasks, Fn&& fn) {
    for (std::size_t task = 0; task < num_tasks; ++task) fn(task, std::size_t{0});
  }
};
static_assert(Executor<SerialExecutor>);

/// A pool with `NumThreads()` and `Schedule(f)`: Eigen::ThreadPool, Eigen::ThreadPoolInterface or
/// one like them. The caller works too, as thread 0. Tasks are dealt as threads come free.
template <class Pool>
class PoolExecutor {
 public:
  /// @param pool  borrowed; must outlive the executor.
  explicit PoolExecutor(Pool& pool) : pool_(pool) {}

  /// The pool's threads and the caller.
  std::size_t num_threads() const { return static_cast<std::size_t>(pool_.NumThreads()) + 1; }

  /// Runs every task; allocates only where the pool's Schedule() does.
  template <class Fn>
  void for_each(std::size_t num_tasks, Fn&& fn) {
    Round<std::remove_reference_t<Fn>> round{fn, num_tasks};
    const std::size_t helpers = num_tasks < 2 ? 0 : std::min(num_threads(), num_tasks) - 1;
    round.working.store(helpers, std::memory_order_relaxed);
    for (std::size_t i = 0; i < helpers; ++i) {
      pool_.Schedule([r = &round, thread = i + 1] {  // two words: fits std::function, no allocation
        r->work(thread);
        r->leave();
      });
    }
    round.work(0);
    round.wait();
  }

 private:
  template <class Fn>
  struct Round {
    Fn& fn;
    std::size_t num_tasks;
    std::atomic<std::size_t> next{0};
    std::atomic<std::size_t> working{0};

    void work(std::size_t thread) {
      for (std::size_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < num_tasks;) {
        fn(task, thread);
      }
    }
    void leave() {
      // The notification is the last touch: the caller's frame may be gone right after it sees 0.
      if (working.fetch_sub(1, std::memory_order_acq_rel) == 1) working.notify_one();
    }
    void wait() {
      for (std::size_t left; (left = working.load(std::memory_order_acquire)) != 0;) {
        working.wait(left, std::memory_order_acquire);
      }
    }
  };

  Pool& pool_;
};

#ifdef _OPENMP
/// An OpenMP team of `num_threads` (0: the runtime's default); tasks are dealt dynamically.
class OpenMpExecutor {
 public:
  /// @param num_threads  of every team; 0: omp_get_max_threads() at this moment.
  explicit OpenMpExecutor(int num_threads = 0)
      : num_threads_(num_threads > 0 ? num_threads : omp_get_max_threads()) {}

  /// Threads of a team.
  std::size_t num_threads() const { return static_cast<std::size_t>(num_threads_); }

  /// One parallel region; returns when all tasks are done.
  template <class Fn>
  void for_each(std::size_t num_tasks, Fn&& fn) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(num_threads_)
    for (std::size_t task = 0; task < num_tasks; ++task) {
      fn(task, static_cast<std::size_t>(omp_get_thread_num()));
    }
  }

 private:
  int num_threads_;
};
#endif

}  // namespace headwise::inline v0
