// SPDX-License-Identifier: MIT
/// @file pinned_threads.hpp
/// An executor whose threads stay on their CPUs: two threads on one CPU would measure the
/// scheduler.
#pragma once

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <thread>
#include <type_traits>
#include <vector>

#include "headwise/core/executor.hpp"

namespace headwise::bench {

inline void pin_to_cpu(std::size_t cpu) {
  cpu_set_t cpus;
  CPU_ZERO(&cpus);
  CPU_SET(cpu, &cpus);
  pthread_setaffinity_np(pthread_self(), sizeof cpus, &cpus);
}

/// The calling thread on CPU 0, helpers on CPUs 1, 2, ...; tasks are dealt as threads come free.
class PinnedThreads {
 public:
  explicit PinnedThreads(std::size_t num_threads) {
    pin_to_cpu(0);
    for (std::size_t i = 1; i < num_threads; ++i) {
      helpers_.emplace_back([this, i] { help(i); });
    }
  }
  ~PinnedThreads() {
    run_ = nullptr;
    start_round();
    for (std::thread& helper : helpers_) helper.join();
  }
  PinnedThreads(const PinnedThreads&) = delete;
  PinnedThreads& operator=(const PinnedThreads&) = delete;

  std::size_t num_threads() const { return helpers_.size() + 1; }

  template <class Fn>
  void for_each(std::size_t num_tasks, Fn&& fn) {
    context_ = const_cast<void*>(static_cast<const void*>(&fn));
    run_ = [](void* context, std::size_t task, std::size_t thread) {
      (*static_cast<std::remove_reference_t<Fn>*>(context))(task, thread);
    };
    num_tasks_ = num_tasks;
    next_.store(0, std::memory_order_relaxed);
    working_.store(helpers_.size(), std::memory_order_relaxed);
    start_round();
    work(0);
    while (working_.load(std::memory_order_acquire) != 0) {
    }
  }

 private:
  void start_round() {
    round_.fetch_add(1, std::memory_order_release);
    round_.notify_all();
  }
  void work(std::size_t thread) {
    for (std::size_t task; (task = next_.fetch_add(1, std::memory_order_relaxed)) < num_tasks_;) {
      run_(context_, task, thread);
    }
  }
  void help(std::size_t thread) {
    pin_to_cpu(thread);
    for (std::uint64_t seen = 0;;) {
      round_.wait(seen, std::memory_order_acquire);
      seen = round_.load(std::memory_order_acquire);
      if (run_ == nullptr) return;
      work(thread);
      working_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::vector<std::thread> helpers_;
  std::atomic<std::uint64_t> round_{0};
  std::atomic<std::size_t> next_{0};
  std::atomic<std::size_t> working_{0};
  std::size_t num_tasks_ = 0;
  void* context_ = nullptr;
  void (*run_)(void*, std::size_t, std::size_t) = nullptr;
};
static_assert(Executor<PinnedThreads>);

}  // namespace headwise::bench
