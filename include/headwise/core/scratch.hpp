// SPDX-License-Identifier: MIT
/// @file scratch.hpp
/// Scratch: memory that a step's tasks share, kept from step to step.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>

namespace headwise::inline v0 {

/// Aligned bytes and counters. Grows by reserve() only, so that a step allocates nothing.
class Scratch {
 public:
  static constexpr std::size_t kAlignment = 64;  ///< a cache line, an AVX-512 register

  /// Grows to at least `bytes` and `num_counters`; counters start at 0. What was there is lost.
  void reserve(std::size_t bytes, std::size_t num_counters) {
    if (bytes > num_bytes_) {
      bytes_.reset(static_cast<std::byte*>(::operator new (bytes, std::align_val_t{kAlignment})));
      num_bytes_ = bytes;
    }
    if (num_counters > num_counters_) {
      counters_ = std::make_unique<std::atomic<std::int64_t>[]>(num_counters);
      num_counters_ = num_counters;
    }
  }

  /// [num_bytes()], aligned to kAlignment; null while there are none.
  std::byte* bytes() const { return bytes_.get(); }
  /// Bytes there are.
  std::size_t num_bytes() const { return num_bytes_; }
  /// Counters there are.
  std::size_t num_counters() const { return num_counters_; }
  /// Counter `i`, in [0, num_counters()).
  std::atomic<std::int64_t>& counter(std::size_t i) const { return counters_[i]; }

  /// Sets every counter to 0.
  void clear_counters() {
    for (std::size_t i = 0; i < num_counters_; ++i) {
      counters_[i].store(0, std::memory_order_relaxed);
    }
  }

 private:
  struct Free {
    void operator()(std::byte* bytes) const {
      ::operator delete (bytes, std::align_val_t{kAlignment});
    }
  };

  std::unique_ptr<std::byte[], Free> bytes_;
  std::size_t num_bytes_ = 0;
  std::unique_ptr<std::atomic<std::int64_t>[]> counters_;
  std::size_t num_counters_ = 0;
};

}  // namespace headwise::inline v0
