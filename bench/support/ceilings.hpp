// SPDX-License-Identifier: MIT
/// @file ceilings.hpp
/// What this machine can do at most, measured beside what is claimed to come close to it.
#pragma once

#include <sys/mman.h>
#include <sys/resource.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <type_traits>
#include <vector>

#include "headwise/simd/simd.hpp"
#include "support/pinned_threads.hpp"

namespace headwise::bench {

template <class Fn>
double seconds_of(Fn&& fn) {
  const auto begin = std::chrono::steady_clock::now();
  fn();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

/// Times or rates of one thing. The median is that of the samples in which nobody took a CPU away
/// from this process, where there are at least 5 such; else of all.
class Samples {
 public:
  /// Adds what `measure` returns.
  template <class Fn>
  void add(Fn&& measure) {
    const long before = preemptions();
    const double sample = measure();
    all_.push_back(sample);
    if (preemptions() == before) clean_.push_back(sample);
  }
  double median() const { return median_of(clean_.size() >= 5 ? clean_ : all_); }
  double num_clean() const { return static_cast<double>(clean_.size()); }

 private:
  static long preemptions() {
    rusage usage;
    getrusage(RUSAGE_SELF, &usage);
    return usage.ru_nivcsw;
  }
  static double median_of(std::vector<double> x) {
    if (x.empty()) return 0.0;
    const auto middle = x.begin() + static_cast<std::ptrdiff_t>(x.size() / 2);
    std::nth_element(x.begin(), middle, x.end());
    return *middle;
  }

  std::vector<double> all_, clean_;
};

/// Memory in huge pages, as the page pool has it, written once.
class HugeBuffer {
 public:
  explicit HugeBuffer(std::size_t bytes) {
    constexpr std::size_t kHugePage = std::size_t{2} << 20;
    bytes_ = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    data_.reset(static_cast<float*>(std::aligned_alloc(kHugePage, bytes_)));
    madvise(data_.get(), bytes_, MADV_HUGEPAGE);
    std::memset(data_.get(), 0, bytes_);
  }
  float* data() { return data_.get(); }
  const float* data() const { return data_.get(); }
  std::size_t num_bytes() const { return bytes_; }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> data_;
  std::size_t bytes_ = 0;
};

/// AVX2 where there is AVX2, so that figures of machines compare.
using ReadIsa = std::conditional_t<simd::CompiledIsa<simd::Avx2>, simd::Avx2, simd::BestIsa>;

/// Sums `count` floats read as `kStreams` streams, without software prefetch.
/// count is a multiple of 64 * kStreams.
template <int kStreams>
float sum_streams(const float* x, std::size_t count) {
  using O = simd::Ops<ReadIsa>;
  constexpr auto kWidth = static_cast<std::size_t>(O::kWidth);
  constexpr std::size_t kChains = 8;  // two adds a cycle, four cycles each
  constexpr std::size_t kStep = kChains / kStreams * kWidth;
  typename O::V sums[kChains];
  for (auto& sum : sums) sum = O::zero();
  const std::size_t share = count / kStreams;
  for (std::size_t i = 0; i + kStep <= share; i += kStep) {
#pragma GCC unroll 8
    for (std::size_t c = 0; c < kChains; ++c) {
      const std::size_t stream = c % kStreams;
      sums[c] = O::add(sums[c], O::load(x + stream * share + i + c / kStreams * kWidth));
    }
  }
  float total = 0.0F;
  for (const auto& sum : sums) total += O::reduce_add(sum);
  return total;
}

/// Seconds to read the buffer once, every thread an equal part of it.
template <int kStreams = 1>
double read_seconds(PinnedThreads& threads, const float* x, std::size_t bytes) {
  const std::size_t share = bytes / sizeof(float) / threads.num_threads() / 512 * 512;
  return seconds_of([&] {
    threads.for_each(threads.num_threads(), [&](std::size_t task, std::size_t) {
      volatile float sink = sum_streams<kStreams>(x + task * share, share);
      static_cast<void>(sink);
    });
  });
}

/// Multiply-adds a second, as flop: independent chains in registers, on every thread at once.
template <class Isa = simd::BestIsa>
double fma_flops(PinnedThreads& threads) {
  using O = simd::Ops<Isa>;
  constexpr int kChains = 12;      // more than 2 ports x 4 cycles, less than 16 registers
  constexpr int kSteps = 1 << 18;  // about 0.5 ms
  const double seconds = seconds_of([&] {
    threads.for_each(threads.num_threads(), [&](std::size_t, std::size_t) {
      typename O::V sums[kChains];
      for (auto& sum : sums) sum = O::broadcast(1.0F);
      const auto a = O::broadcast(0.999F);
      for (int i = 0; i < kSteps; ++i) {
#pragma GCC unroll 12
        for (int c = 0; c < kChains; ++c) sums[c] = O::fma(sums[c], a, a);
      }
      volatile float sink = 0.0F;
      for (const auto& sum : sums) sink = sink + O::reduce_add(sum);
    });
  });
  return 2.0 * kChains * kSteps * O::kWidth * static_cast<double>(threads.num_threads()) / seconds;
}

}  // namespace headwise::bench
