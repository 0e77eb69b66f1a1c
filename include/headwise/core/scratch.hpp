// SPDX-License-Identifier: MIT
/// @file scratch.hpp
/// Scratch: memory that a step's tasks share, kept from step to step.
#pragma once

#include <cstddef>
#include <memory>
#include <new>

namespace headwise::inline v0 {

/// Aligned bytes. Grows by reserve() only, so that a step allocates nothing.
class Scratch {
 public:
  static constexpr std::size_t kAlignment = 64;  ///< a cache line, an AVX-512 register

  /// Grows to at least `bytes`, in one allocation. What was there is lost where it grows.
  void reserve(std::size_t bytes) {
    if (bytes <= num_bytes_) return;
    bytes_.reset();  // the old bytes first: both at once may be more than there is
    num_bytes_ = 0;
    bytes_.reset(static_cast<std::byte*>(::operator new (bytes, std::align_val_t{kAlignment})));
    num_bytes_ = bytes;
  }

  /// [num_bytes()], aligned to kAlignment; null while there are none.
  std::byte* bytes() const { return bytes_.get(); }
  /// Bytes there are.
  std::size_t num_bytes() const { return num_bytes_; }

 private:
  struct Free {
    void operator()(std::byte* bytes) const {
      ::operator delete (bytes, std::align_val_t{kAlignment});
    }
  };

  std::unique_ptr<std::byte[], Free> bytes_;
  std::size_t num_bytes_ = 0;
};

}  // namespace headwise::inline v0
