// SPDX-License-Identifier: MIT
// Any bytes as a snapshot: as they are, and with sizes and checksums made right, as a forger would,
// so that what lies behind them is reached. Nothing may be left in the cache, and what is restored
// must leave it as it came.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <span>
#include <vector>

#include "headwise/core/checksum.hpp"
#include "small_cache.hpp"

using namespace headwise;

namespace {

void require(bool holds) {
  if (!holds) std::abort();
}

std::size_t head_bytes(const KvCache<f16>& cache) {
  return SnapshotHead(cache.geometry(), {}).num_bytes();
}

void forge(const KvCache<f16>& cache, std::vector<std::byte>& bytes) {
  const std::size_t head = head_bytes(cache);
  if (bytes.size() < head) return;
  bytes.resize(bytes.size() / Checksum::kBlock * Checksum::kBlock);
  const std::uint64_t size = bytes.size();
  std::memcpy(bytes.data() + 16, &size, sizeof size);
  Checksum body;
  body.add(std::span(bytes).subspan(head));
  std::uint64_t sum = body.value();
  std::memcpy(bytes.data() + 32, &sum, sizeof sum);
  Checksum of_head;
  std::vector<std::byte> first(Checksum::kBlock, std::byte{0});
  std::copy_n(bytes.begin() + 32, 32, first.begin());
  of_head.add(first);
  of_head.add(std::span(bytes).subspan(Checksum::kBlock, head - Checksum::kBlock));
  sum = of_head.value();
  std::memcpy(bytes.data() + 24, &sum, sizeof sum);
}

void restore(KvCache<f16>& cache, std::span<const std::byte> bytes) {
  SequenceId id;
  try {
    if (cache.restore(bytes, id) == StepStatus::kOk) {
      std::vector<std::byte> again(cache.snapshot_bytes(id));
      require(again.size() == bytes.size());
      require(cache.snapshot(id, again) == StepStatus::kOk);
      SequenceId twin;
      require(cache.restore(again, twin) == StepStatus::kOk);
      Step step;
      (void)cache.begin(step, {{id, 1, Phase::kDecode}, {twin, 20}});
      (void)cache.drop(step);
      (void)cache.rollback(id, cache.length(id) - cache.max_truncate(id));
      cache.release(twin);
      cache.release(id);
    }
  } catch (const FormatError&) {
  }
  require(cache.pages_in_use() == 0);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static test::SmallCache small;
  std::vector<std::byte> bytes(size);
  if (size > 0) std::memcpy(bytes.data(), data, size);
  restore(small.cache, bytes);
  forge(small.cache, bytes);
  restore(small.cache, bytes);
  return 0;
}
