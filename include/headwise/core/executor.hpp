// SPDX-License-Identifier: MIT
/// @file executor.hpp
/// Threads belong to the engine: what attention asks of them, and adapters for the usual pools.
#pragma once

#include <algorithm>
#include <atomic>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <type_traits>
#include <utility>

#include "headwise/core/config.hpp"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace headwise::inline v0 {

/// Runs `fn(task, thread)` once for every task in [0, num_tasks) and returns when all are done.
/// `thread` is in [0, num_threads()) and no two calls run at once with the same one.
///
/// If a call throws, no further task is begun, and for_each throws the first exception once every
/// call that had begun has returned: nothing of it runs afterwards. (attend()'s own tasks never
/// throw.)
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

namespace detail {

/// The first exception of several threads' calls, carried to the thread that waits for them.
class FirstException {
 public:
  /// Runs `work()`; what it throws is kept if nothing was before. Any thread.
  /// @return whether it threw
  template <class Work>
  bool keep_from(Work&& work) noexcept {
#if HEADWISE_HAS_EXCEPTIONS
    try {
      work();
    } catch (...) {
      if (!thrown_.exchange(true, std::memory_order_relaxed)) first_ = std::current_exception();
      return true;
    }
#else
    work();
#endif
    return false;
  }

  /// Whether anything was thrown so far; a hint while others still run.
  bool any() const { return thrown_.load(std::memory_order_relaxed); }

  /// Throws what was kept, and keeps it no longer. After all calls have returned.
  void rethrow() {
    if (!any()) return;
    thrown_.store(false, std::memory_order_relaxed);
    std::rethrow_exception(std::exchange(first_, nullptr));
  }

 private:
  std::atomic<bool> thrown_{false};
  std::exception_ptr first_;
};

/// One for_each of a PoolExecutor, as its helpers see it. It outlives the call: a helper that the
/// pool starts later finds the round closed, or a later one open, and touches nothing of the
/// caller's.
class PoolRound {
 public:
  /// Most helpers of a round.
  static constexpr std::size_t kMaxHelpers = 0xffff;

  /// Opens the round; helpers may join from now on.
  /// @param call  calls `fn(task, thread)`
  void open(void (*call)(const void* fn, std::size_t task, std::size_t thread), const void* fn,
            std::size_t num_tasks) {
    call_ = call;
    fn_ = fn;
    num_tasks_ = num_tasks;
    next_.store(0, std::memory_order_relaxed);
    state_.fetch_add(kOneTurn, std::memory_order_release);
  }
  /// Names the open round to a helper: joins nothing else.
  std::uint64_t ticket(std::size_t thread) const {
    return (state_.load(std::memory_order_relaxed) & ~kHelpers) | thread;
  }

  /// Works tasks until none is left; after an exception none is.
  void work(std::size_t thread) noexcept {
    const bool threw = exception_.keep_from([&] {
      for (std::size_t task; (task = next_.fetch_add(1, std::memory_order_relaxed)) < num_tasks_;) {
        call_(fn_, task, thread);
      }
    });
    if (threw) next_.store(num_tasks_, std::memory_order_relaxed);
  }

  /// Lets no helper in any more, waits for those who are, and throws what any call has thrown.
  void close() {
    std::uint64_t state = state_.fetch_add(kOneTurn, std::memory_order_acq_rel) + kOneTurn;
    while ((state & kHelpers) != 0) {
      state_.wait(state, std::memory_order_acquire);
      state = state_.load(std::memory_order_acquire);
    }
    exception_.rethrow();
  }

  /// What a helper runs: works if the round that its ticket names is still open. Gives one share
  /// of the round up.
  void help(std::uint64_t ticket) noexcept {
    std::uint64_t state = state_.load(std::memory_order_relaxed);
    while ((state & ~kHelpers) == (ticket & ~kHelpers)) {
      if (!state_.compare_exchange_weak(state, state + 1, std::memory_order_acquire,
                                        std::memory_order_relaxed)) {
        continue;
      }
      work(static_cast<std::size_t>(ticket & kHelpers));
      state_.fetch_sub(1, std::memory_order_release);
      state_.notify_one();
      break;
    }
    give_up();
  }

  /// One owner more. Each must give_up().
  void share() { owners_.fetch_add(1, std::memory_order_relaxed); }
  /// The last one frees the round.
  void give_up() {
    if (owners_.fetch_sub(1, std::memory_order_acq_rel) == 1) delete this;
  }

 private:
  static constexpr std::uint64_t kHelpers = kMaxHelpers;
  static constexpr std::uint64_t kOneTurn = kHelpers + 1;

  /// Low bits: helpers at work. The rest counts turns, odd while a round is open.
  std::atomic<std::uint64_t> state_{0};
  std::atomic<std::size_t> owners_{1};
  std::atomic<std::size_t> next_{0};
  std::size_t num_tasks_ = 0;
  void (*call_)(const void* fn, std::size_t task, std::size_t thread) = nullptr;
  const void* fn_ = nullptr;
  FirstException exception_;
};

}  // namespace detail

/// A pool with `NumThreads()` and `Schedule(f)`: Eigen::ThreadPool, Eigen::ThreadPoolInterface or
/// one like them. The caller works too, as thread 0. Tasks are dealt as threads come free.
///
/// It may be called from the pool's own threads, and while all of them are busy: the caller waits
/// only for those that have begun to help. A helper that the pool starts after that does nothing.
/// Where Schedule() throws (it must not have kept the function then) there are fewer helpers.
/// Several threads may call at once.
template <class Pool>
class PoolExecutor {
 public:
  /// @param pool  borrowed; must outlive the executor.
  explicit PoolExecutor(Pool& pool) : pool_(pool), idle_(new detail::PoolRound) {}
  PoolExecutor(const PoolExecutor&) = delete;
  PoolExecutor& operator=(const PoolExecutor&) = delete;
  /// Waits for nobody: a helper that comes later finds nothing to do.
  ~PoolExecutor() { idle_.load(std::memory_order_relaxed)->give_up(); }

  /// The pool's threads and the caller.
  std::size_t num_threads() const {
    return std::min(static_cast<std::size_t>(pool_.NumThreads()), detail::PoolRound::kMaxHelpers) +
           1;
  }

  /// Runs every task; allocates only where the pool's Schedule() does, and where it is called
  /// while another call has not returned.
  template <class Fn>
  void for_each(std::size_t num_tasks, Fn&& fn) {
    const std::size_t helpers = num_tasks < 2 ? 0 : std::min(num_threads(), num_tasks) - 1;
    if (helpers == 0) {
      for (std::size_t task = 0; task < num_tasks; ++task) fn(task, std::size_t{0});
      return;
    }
    const auto call = [&fn](std::size_t task, std::size_t thread) { fn(task, thread); };
    using Call = decltype(call);
    const Lease round(idle_);
    round->open([](const void* f, std::size_t task,
                   std::size_t thread) { (*static_cast<Call*>(f))(task, thread); },
                &call, num_tasks);
    for (std::size_t i = 0; i < helpers && schedule(*round, round->ticket(i + 1)); ++i) {
    }
    round->work(0);
    round->close();
  }

 private:
  /// The executor's round for the time of one call; a new one where it is in use.
  class Lease {
   public:
    explicit Lease(std::atomic<detail::PoolRound*>& idle)
        : idle_(idle), round_(idle.exchange(nullptr, std::memory_order_acquire)) {
      if (round_ == nullptr) round_ = new detail::PoolRound;
    }
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;
    ~Lease() {
      detail::PoolRound* const other = idle_.exchange(round_, std::memory_order_acq_rel);
      if (other != nullptr) other->give_up();
    }
    detail::PoolRound* operator->() const { return round_; }
    detail::PoolRound& operator*() const { return *round_; }

   private:
    std::atomic<detail::PoolRound*>& idle_;
    detail::PoolRound* round_;
  };

  /// @return whether the pool took the helper
  bool schedule(detail::PoolRound& round, std::uint64_t ticket) {
    const auto help = [r = &round, ticket] { r->help(ticket); };  // two words fit std::function
    round.share();
#if HEADWISE_HAS_EXCEPTIONS
    try {
      pool_.Schedule(help);
    } catch (...) {
      round.give_up();
      return false;
    }
#else
    pool_.Schedule(help);
#endif
    return true;
  }

  Pool& pool_;
  std::atomic<detail::PoolRound*> idle_;  // null while a call is using it
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
    detail::FirstException exception;  // none may leave a parallel region
#pragma omp parallel for schedule(dynamic, 1) num_threads(num_threads_)
    for (std::size_t task = 0; task < num_tasks; ++task) {
      if (exception.any()) continue;
      exception.keep_from([&] { fn(task, static_cast<std::size_t>(omp_get_thread_num())); });
    }
    exception.rethrow();
  }

 private:
  int num_threads_;
};
#endif

}  // namespace headwise::inline v0
