// SPDX-License-Identifier: MIT
// Writes good snapshots of several lengths into a folder: fuzz_snapshot_seeds <folder>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "headwise/simd/simd.hpp"
#include "small_cache.hpp"

using namespace headwise;

namespace {

bool add_tokens(KvCache<f16>& cache, SequenceId id, std::int64_t tokens) {
  Step step;
  if (cache.begin(step, {{id, tokens}}) != StepStatus::kOk) return false;
  const std::vector<float> rows(static_cast<std::size_t>(tokens) * 16, 0.25F);
  const auto view = TensorView<const float>::nhd(rows.data(), 1, 16);
  for (int h = 0; h < 3 && tokens > 0; ++h) {
    cache.append<simd::Scalar>(step, step.chunks()[0], 0, h, view, view);
    step.note_head_done(0);
  }
  return cache.commit(step) == StepStatus::kOk;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: fuzz_snapshot_seeds <folder>\n");
    return 2;
  }
  const std::filesystem::path folder = argv[1];
  std::filesystem::create_directories(folder);
  test::SmallCache small;
  for (const std::int64_t length : {0, 1, 16, 17, 40, 64, 100}) {
    const SequenceId id = *small.cache.add_sequence();
    // In two chunks, so that banks change; then back a little.
    if (!add_tokens(small.cache, id, length / 2) ||
        !add_tokens(small.cache, id, length - length / 2)) {
      return 1;
    }
    if (length > 5 && small.cache.rollback(id, length - 3) != StepStatus::kOk) return 1;
    std::vector<std::byte> bytes(small.cache.snapshot_bytes(id));
    if (small.cache.snapshot(id, bytes) != StepStatus::kOk) return 1;
    small.cache.release(id);
    std::ofstream file(folder / ("length_" + std::to_string(length)), std::ios::binary);
    file.write(reinterpret_cast<const char*>(bytes.data()),
               static_cast<std::streamsize>(bytes.size()));
    if (!file) return 1;
  }
  return 0;
}
