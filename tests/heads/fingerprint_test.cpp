// SPDX-License-Identifier: MIT
#include "headwise/heads/fingerprint.hpp"

#include <gtest/gtest.h>

#include <set>
#include <string_view>
#include <utility>
#include <vector>

namespace headwise {
namespace {

std::string hash_of(std::string_view text) {
  detail::Fnv128 hash;
  for (const char c : text) hash.add_byte(static_cast<std::uint8_t>(c));
  return hash.value().to_string();
}

TEST(Fnv128, HasThePublishedTestVectors) {
  EXPECT_EQ(hash_of(""), "6c62272e07bb014262b821756295c58d");
  EXPECT_EQ(hash_of("a"), "d228cb696f1a8caf78912b704e4a8964");
  EXPECT_EQ(hash_of("foobar"), "343e1662793c64bf6f0d3597ba446f18");
}

TEST(Fingerprint, IsTheSameOnEveryPlatform) {
  HeadPlan plan(std::vector<int>{2, 1});
  plan.set(0, 1, KeepWindow{{64, 256}});
  plan.set(1, 0, KeepGrowingWindow{});
  // FNV-1a of the words 2 | 2 | 0 | 1 64 256 | 1 | 2 4 4000 5, computed with Python's integers.
  EXPECT_EQ(fingerprint(plan).to_string(), "7df8081fb9abec6803878a76baaca5c0");
}

TEST(Fingerprint, NamesALengthToStreamFrom) {
  HeadPlan plan(std::vector<int>{2});
  plan.set(0, 1, KeepWindowFrom{{{128, 256}}, 16384});
  // 1 | 2 | 0 | 5 16384 1 128 256
  EXPECT_EQ(fingerprint(plan).to_string(), "19453ace712d5d0ac65415546fe51e5d");
}

/// A global layer, one with a window of 512, and one that reads the second's K and V.
ModelShape gemma_like(std::int64_t window, int kv_layer) {
  const LayerShape global{.num_kv_heads = 2, .group_size = 2, .k_dim = 16, .v_dim = 16};
  LayerShape local = global;
  local.sliding_window = window;
  LayerShape shared = local;
  shared.kv_layer = kv_layer;
  return ModelShape({global, local, shared});
}

TEST(Fingerprint, OfAModelNamesWhatItsLayersStore) {
  HeadPlan plan(std::vector<int>{2, 2, 2});
  plan.set(0, 1, KeepWindow{{64, 256}});
  plan.set(1, 1, KeepWindow{{64, 256}});
  // 3 | 2 | 0 | 1 64 256 | 2 | 1 0 512 | 1 0 256 | -1 1
  EXPECT_EQ(fingerprint(gemma_like(512, 1), plan).to_string(), "98a55985f8bca86fe864f64b55ab0c1c");
  EXPECT_EQ(fingerprint(gemma_like(0, -1), plan), fingerprint(plan));
  std::set<Fingerprint> seen{fingerprint(plan)};
  for (const auto& [window, kv_layer] : {std::pair{512, 1}, {512, -1}, {300, 1}, {0, 1}, {0, 0}}) {
    EXPECT_TRUE(seen.insert(fingerprint(gemma_like(window, kv_layer), plan)).second);
  }
  EXPECT_THROW((void)fingerprint(ModelShape::uniform(2, 2, 2, 16), plan), ConfigError);
}

TEST(Fingerprint, ChangesWithEverythingThatIsStored) {
  std::vector<HeadPlan> plans;
  for (const auto& heads : {std::vector<int>{4}, {2, 2}, {1, 3}, {3, 1}, {1, 1, 2}, {5}}) {
    plans.emplace_back(heads);
  }
  const HeadPlan base(std::vector<int>{2, 2}, KeepWindow{{4, 60}});
  plans.push_back(base);
  for (const HeadBudget& budget : std::vector<HeadBudget>{
           KeepEverything{}, KeepWindow{{5, 60}}, KeepWindow{{4, 61}}, KeepGrowingWindow{},
           KeepGrowingWindow{.sink = 5}, KeepGrowingWindow{.min_recent = 64},
           KeepGrowingWindow{.divisor = 4}, KeepWindowFrom{{{4, 60}}, 1},
           KeepWindowFrom{{{4, 60}}, 2}, KeepWindowFrom{{{4, 61}}, 1},
           KeepWindowFrom{{{4, 60}, 70}, 1}, KeepSelected{}, KeepSelected{64}}) {
    for (int head = 0; head < 4; ++head) {
      plans.push_back(base);
      plans.back().set(head / 2, head % 2, budget);
    }
  }
  std::set<Fingerprint> seen;
  for (const HeadPlan& plan : plans) EXPECT_TRUE(seen.insert(fingerprint(plan)).second);
  EXPECT_EQ(fingerprint(HeadPlan(base)), fingerprint(base));
}

}  // namespace
}  // namespace headwise
