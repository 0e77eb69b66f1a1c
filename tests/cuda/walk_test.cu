// SPDX-License-Identifier: MIT
// Random walks: steps of one to forty tokens, rollbacks, forks, clears and releases, each output
// against double.
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "cuda/device_model.cuh"

namespace headwise::test {
namespace {

TEST(CudaWalk, EveryOutputIsTheOraclesOnRandomWalks) {
  for (unsigned seed = 1; seed <= 6; ++seed) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    DeviceModel<f16> model(
        {.group_size = 2,
         .max_context = 1200,
         .max_sequences = 5,
         .max_rollback = 20,
         .prefill = seed % 2 == 0 ? PrefillMode::kChunkCausal : PrefillMode::kWindowed},
        seed);
    if (!has_device()) continue;
    std::mt19937 random(seed);
    std::vector<SequenceId> live{model.add()};
    for (int i = 0; i < 120 && !::testing::Test::HasFailure(); ++i) {
      const SequenceId some = live[random() % live.size()];
      const std::int64_t length = model.cache().length(some);
      switch (random() % 8) {
        case 0:
          if (live.size() < 5) live.push_back(model.add());
          break;
        case 1:
          if (live.size() < 5) live.push_back(model.fork(some));
          break;
        case 2:
          if (live.size() > 1) {
            model.release(some);
            live.erase(std::find(live.begin(), live.end(), some));
          }
          break;
        case 3: {
          const std::int64_t lowest =
              std::max<std::int64_t>(0, model.cache().high_water(some) - 20);
          if (lowest < length) {
            model.rollback(some, lowest + static_cast<std::int64_t>(random()) % (length - lowest));
          }
          break;
        }
        default: {
          std::vector<SequenceChunk> chunks;
          for (const SequenceId id : live) {
            const std::int64_t room = 1200 - model.cache().length(id);
            const std::int64_t n = random() % 3 == 0 ? 1 : static_cast<std::int64_t>(random() % 41);
            chunks.push_back({id, std::min(room, n)});
          }
          if (std::all_of(chunks.begin(), chunks.end(),
                          [](const SequenceChunk& chunk) { return chunk.num_tokens == 0; })) {
            break;
          }
          model.step(chunks, random() % 2 == 0 ? Phase::kPrompt : Phase::kDecode, 4);
        }
      }
    }
  }
  HEADWISE_NEEDS_DEVICE();
}

}  // namespace
}  // namespace headwise::test
