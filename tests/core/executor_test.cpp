// SPDX-License-Identifier: MIT
#include "headwise/core/executor.hpp"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <cstddef>
#include <functional>
#include <memory>
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

TEST(Executor, PoolWaitsForHelpersThatComeLate) {
  LatePool pool;
  PoolExecutor executor(pool);
  std::atomic<int> runs = 0;
  for (int round = 0; round < 3; ++round) {
    executor.for_each(4, [&](std::size_t, std::size_t) { ++runs; });
  }
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
