// SPDX-License-Identifier: MIT
#include "headwise/core/executor.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <future>
#include <memory>
#include <new>
#include <thread>
#include <unsupported/Eigen/CXX11/ThreadPool>
#include <utility>
#include <vector>

namespace headwise {
namespace {

/// Runs rounds of several sizes; every task once, no thread index twice at a time.
template <Executor E>
void expect_each_task_once(E& executor) {
  const std::size_t threads = executor.num_threads();
  ASSERT_GE(threads, 1U);
  for (const std::size_t num_tasks : {0UL, 1UL, 2UL, 3UL, 7UL, 64UL, 1000UL}) {
    for (int round = 0; round < 5; ++round) {
      std::vector<std::atomic<int>> runs(num_tasks);
      std::vector<std::atomic<int>> busy(threads);
      std::atomic<int> faults = 0;
      executor.for_each(num_tasks, [&](std::size_t task, std::size_t thread) {
        if (task >= num_tasks || thread >= threads) {
          ++faults;
          return;
        }
        if (busy[thread].fetch_add(1) != 0) ++faults;
        ++runs[task];
        if (task % 16 == 0) std::this_thread::yield();
        busy[thread].fetch_sub(1);
      });
      ASSERT_EQ(faults.load(), 0) << num_tasks;
      for (std::size_t task = 0; task < num_tasks; ++task) {
        ASSERT_EQ(runs[task].load(), 1) << "task " << task << " of " << num_tasks;
      }
    }
  }
}

/// What for_each has done is visible to the caller: plain memory, no atomics.
template <Executor E>
void expect_results_visible(E& executor) {
  for (int round = 0; round < 50; ++round) {
    std::vector<int> out(97, -1);
    executor.for_each(out.size(), [&](std::size_t task, std::size_t) {
      out[task] = static_cast<int>(task) + round;
    });
    for (std::size_t i = 0; i < out.size(); ++i) ASSERT_EQ(out[i], static_cast<int>(i) + round);
  }
}

TEST(Executor, SerialRunsInOrderOnTheCallingThread) {
  SerialExecutor executor;
  static_assert(SerialExecutor::num_threads() == 1);
  std::vector<std::size_t> order;
  const std::thread::id caller = std::this_thread::get_id();
  executor.for_each(5, [&](std::size_t task, std::size_t thread) {
    EXPECT_EQ(thread, 0U);
    EXPECT_EQ(std::this_thread::get_id(), caller);
    order.push_back(task);
  });
  EXPECT_EQ(order, (std::vector<std::size_t>{0, 1, 2, 3, 4}));
  expect_each_task_once(executor);
}

TEST(Executor, PoolRunsEachTaskOnce) {
  for (const int threads : {1, 2, 5}) {
    Eigen::ThreadPool pool(threads);
    PoolExecutor executor(pool);
    static_assert(Executor<decltype(executor)>);
    EXPECT_EQ(executor.num_threads(), static_cast<std::size_t>(threads) + 1);
    expect_each_task_once(executor);
    expect_results_visible(executor);
  }
}

TEST(Executor, PoolTakesEigensInterface) {
  const std::unique_ptr<Eigen::ThreadPoolInterface> pool = std::make_unique<Eigen::ThreadPool>(2);
  PoolExecutor executor(*pool);
  expect_each_task_once(executor);
}

/// A pool whose helpers come late: after the caller has done everything.
struct LatePool {
  std::vector<std::thread> threads;
  static constexpr int NumThreads() { return 3; }
  void Schedule(std::function<void()> fn) {
    threads.emplace_back([fn = std::move(fn)] {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
      fn();
    });
  }
  ~LatePool() {
    for (std::thread& thread : threads) thread.join();
  }
};

TEST(Executor, PoolDoesNotWaitForHelpersThatComeLate) {
  LatePool pool;
  std::atomic<int> runs = 0;
  {
    PoolExecutor executor(pool);
    for (int round = 0; round < 3; ++round) {
      auto gone = std::make_unique<std::atomic<int>*>(&runs);  // the sanitizer's business, if late
      executor.for_each(4, [&](std::size_t, std::size_t) { ++**gone; });
    }
  }  // and the helpers outlive the executor
  EXPECT_EQ(runs.load(), 12);
  EXPECT_EQ(pool.threads.size(), 9U);  // three helpers a round, the caller is the fourth
}

TEST(Executor, PoolLeavesOneTaskToTheCaller) {
  LatePool pool;
  PoolExecutor executor(pool);
  executor.for_each(1, [](std::size_t, std::size_t thread) { EXPECT_EQ(thread, 0U); });
  executor.for_each(0, [](std::size_t, std::size_t) { FAIL(); });
  EXPECT_TRUE(pool.threads.empty());
}

/// Runs `work` on one of the pool's threads and waits for it, but not for ever.
template <class Pool, class Work>
bool finishes_inside(Pool& pool, Work work) {
  auto done = std::make_shared<std::promise<void>>();
  std::future<void> finished = done->get_future();
  pool.Schedule([done, work]() mutable {
    work();
    done->set_value();
  });
  return finished.wait_for(std::chrono::seconds(20)) == std::future_status::ready;
}

TEST(Executor, PoolMayBeCalledFromItsOwnThreads) {
  for (const int threads : {1, 2, 4}) {
    Eigen::ThreadPool pool(threads);
    PoolExecutor executor(pool);
    const bool finished = finishes_inside(pool, [&] {
      expect_each_task_once(executor);
      expect_results_visible(executor);
    });
    if (!finished) {
      std::fputs("a call from inside the pool waits for a helper that cannot start\n", stderr);
      std::abort();  // its thread would be joined for ever
    }
  }
}

TEST(Executor, PoolMayBeCalledFromItsOwnTasks) {
  for (const int threads : {1, 3}) {
    Eigen::ThreadPool pool(threads);
    PoolExecutor executor(pool);
    std::vector<std::atomic<int>> runs(6 * 5 * 4);
    executor.for_each(6, [&](std::size_t i, std::size_t) {
      executor.for_each(5, [&](std::size_t j, std::size_t) {
        executor.for_each(4, [&](std::size_t k, std::size_t) { ++runs[(i * 5 + j) * 4 + k]; });
      });
    });
    for (const std::atomic<int>& count : runs) ASSERT_EQ(count.load(), 1);
  }
}

TEST(Executor, PoolMayBeCalledFromSeveralThreadsAtOnce) {
  Eigen::ThreadPool pool(2);
  PoolExecutor executor(pool);
  std::vector<std::thread> callers;
  for (int i = 0; i < 3; ++i) {
    callers.emplace_back([&] {
      expect_each_task_once(executor);
      expect_results_visible(executor);
    });
  }
  for (std::thread& caller : callers) caller.join();
}

/// Threads that are all busy until open() is called.
class FullPool {
 public:
  explicit FullPool(int threads) : pool_(threads) {
    for (int i = 0; i < threads; ++i) {
      pool_.Schedule([this] { opened_.wait(false); });
    }
  }
  ~FullPool() { open(); }
  void open() {
    opened_ = true;
    opened_.notify_all();
  }
  int NumThreads() const { return pool_.NumThreads(); }
  void Schedule(std::function<void()> fn) { pool_.Schedule(std::move(fn)); }

 private:
  std::atomic<bool> opened_ = false;
  Eigen::ThreadPool pool_;
};

TEST(Executor, PoolThatIsBusyLeavesAllTasksToTheCaller) {
  FullPool pool(3);
  PoolExecutor executor(pool);
  std::vector<std::size_t> by(100, 99);
  const std::thread::id caller = std::this_thread::get_id();
  executor.for_each(by.size(), [&](std::size_t task, std::size_t thread) {
    EXPECT_EQ(std::this_thread::get_id(), caller);
    by[task] = thread;
  });
  EXPECT_EQ(by, std::vector<std::size_t>(100, 0));
  pool.open();  // helpers of a round that is over beside those of the next ones
  expect_each_task_once(executor);
}

/// A pool whose Schedule throws at its k-th call.
struct ThrowingPool {
  explicit ThrowingPool(int fails_at) : left(fails_at) {}
  int left;
  std::atomic<int> ran = 0;
  Eigen::ThreadPool pool{4};
  int NumThreads() const { return pool.NumThreads(); }
  void Schedule(std::function<void()> fn) {
    if (--left == 0) throw std::bad_alloc();
    pool.Schedule([this, fn = std::move(fn)] {
      fn();
      ++ran;
    });
  }
};

TEST(Executor, PoolWhoseScheduleThrowsRunsEachTaskOnceWithFewerHelpers) {
  for (int fails_at = 1; fails_at <= 5; ++fails_at) {
    ThrowingPool pool(fails_at);
    {
      PoolExecutor executor(pool);
      auto runs = std::make_unique<std::vector<std::atomic<int>>>(200);
      executor.for_each(runs->size(), [&](std::size_t task, std::size_t) { ++(*runs)[task]; });
      for (const std::atomic<int>& count : *runs) ASSERT_EQ(count.load(), 1) << fails_at;
    }
    while (pool.ran != std::min(fails_at - 1, 4)) std::this_thread::yield();
  }
}

struct Refusal {
  std::size_t task;
};

/// A throwing task ends the round: its exception comes out, and nothing runs afterwards.
template <class E>
void expect_exceptions_come_out(E& executor) {
  for (int round = 0; round < 20; ++round) {
    for (const std::size_t bad : {std::size_t{0}, std::size_t{7}, std::size_t{63}}) {
      auto busy = std::make_unique<std::atomic<int>>(0);
      std::atomic<std::size_t> begun = 0;
      bool thrown = false;
      try {
        executor.for_each(64, [&](std::size_t task, std::size_t) {
          ++begun;
          ++*busy;
          if (task % 8 == 3) std::this_thread::yield();
          --*busy;
          if (task >= bad) throw Refusal{task};
        });
      } catch (const Refusal& refusal) {
        thrown = true;
        EXPECT_GE(refusal.task, bad);
      }
      EXPECT_TRUE(thrown);
      EXPECT_EQ(busy->load(), 0) << "calls that had begun have returned";
      EXPECT_LE(begun.load(), bad + 2 * executor.num_threads()) << "no further task is begun";
      busy.reset();
    }
  }
  expect_each_task_once(executor);  // as if nothing had happened
}

TEST(Executor, SerialThrowsWhatATaskThrows) {
  SerialExecutor executor;
  expect_exceptions_come_out(executor);
}

TEST(Executor, PoolThrowsWhatATaskThrowsOnAnyThread) {
  for (const int threads : {1, 3}) {
    Eigen::ThreadPool pool(threads);
    PoolExecutor executor(pool);
    expect_exceptions_come_out(executor);
    EXPECT_TRUE(finishes_inside(pool, [&] { expect_exceptions_come_out(executor); }));
  }
}

#ifdef _OPENMP
TEST(Executor, OpenMpThrowsWhatATaskThrowsOnAnyThread) {
  for (const int threads : {1, 3}) {
    OpenMpExecutor executor(threads);
    expect_exceptions_come_out(executor);
  }
}
#endif

#ifdef _OPENMP
TEST(Executor, OpenMpRunsEachTaskOnce) {
  for (const int threads : {1, 2, 4}) {
    OpenMpExecutor executor(threads);
    static_assert(Executor<OpenMpExecutor>);
    EXPECT_EQ(executor.num_threads(), static_cast<std::size_t>(threads));
    expect_each_task_once(executor);
    expect_results_visible(executor);
  }
  EXPECT_GE(OpenMpExecutor().num_threads(), 1U);
}
#endif

struct NoThreads {
  void for_each(std::size_t, void (*)(std::size_t, std::size_t)) {}
};
struct NoForEach {
  std::size_t num_threads() { return 1; }
};

TEST(Executor, ConceptAsksForBothMembers) {
  static_assert(!Executor<NoThreads> && !Executor<NoForEach> && !Executor<int>);
}

}  // namespace
}  // namespace headwise
