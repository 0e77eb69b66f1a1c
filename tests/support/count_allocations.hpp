// SPDX-License-Identifier: MIT
/// @file count_allocations.hpp
/// Counts what is allocated. Replaces the program's operator new: include it in one test file of a
/// program only.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <memory_resource>
#include <new>
#include <vector>

namespace headwise::test {

inline std::atomic<std::size_t> num_news{0};

/// Calls of operator new, of any form and thread, while `work` ran.
template <class Work>
std::size_t allocations_in(Work&& work) {
  const std::size_t before = num_news.load();
  work();
  return num_news.load() - before;
}

/// A memory resource that writes down every request.
class CountingResource : public std::pmr::memory_resource {
 public:
  struct Request {
    std::size_t bytes;
    std::size_t alignment;
  };
  std::vector<Request> requests;
  std::size_t live_bytes = 0;

 private:
  void* do_allocate(std::size_t bytes, std::size_t alignment) override {
    requests.push_back({bytes, alignment});
    live_bytes += bytes;
    return std::pmr::new_delete_resource()->allocate(bytes, alignment);
  }
  void do_deallocate(void* memory, std::size_t bytes, std::size_t alignment) override {
    live_bytes -= bytes;
    std::pmr::new_delete_resource()->deallocate(memory, bytes, alignment);
  }
  bool do_is_equal(const std::pmr::memory_resource& other) const noexcept override {
    return this == &other;
  }
};

namespace detail {

inline void* counted(std::size_t bytes, std::size_t alignment) {
  ++num_news;
  const std::size_t rounded = (bytes + alignment - 1) / alignment * alignment;
  void* memory = std::aligned_alloc(alignment, rounded == 0 ? alignment : rounded);
  if (memory == nullptr) std::abort();
  return memory;
}

/// Not inlined: where only one of new and delete is, g++ takes them for a mismatch.
[[gnu::noinline]] inline void give_back(void* memory) noexcept { std::free(memory); }

}  // namespace detail
}  // namespace headwise::test

// Every form: a sanitizer's runtime brings its own of those that are left out.
void* operator new(std::size_t bytes) {
  return headwise::test::detail::counted(bytes, alignof(std::max_align_t));
}
void* operator new(std::size_t bytes, std::align_val_t alignment) {
  return headwise::test::detail::counted(bytes, static_cast<std::size_t>(alignment));
}
void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept {
  return ::operator new(bytes);
}
void* operator new[](std::size_t bytes) { return ::operator new(bytes); }
void* operator new[](std::size_t bytes, std::align_val_t alignment) {
  return ::operator new(bytes, alignment);
}
void* operator new[](std::size_t bytes, const std::nothrow_t&) noexcept {
  return ::operator new(bytes);
}
using headwise::test::detail::give_back;
void operator delete(void* memory) noexcept { give_back(memory); }
void operator delete(void* memory, std::size_t) noexcept { give_back(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { give_back(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { give_back(memory); }
void operator delete(void* memory, const std::nothrow_t&) noexcept { give_back(memory); }
void operator delete[](void* memory) noexcept { give_back(memory); }
void operator delete[](void* memory, std::size_t) noexcept { give_back(memory); }
void operator delete[](void* memory, std::align_val_t) noexcept { give_back(memory); }
void operator delete[](void* memory, std::size_t, std::align_val_t) noexcept { give_back(memory); }
void operator delete[](void* memory, const std::nothrow_t&) noexcept { give_back(memory); }
