// SPDX-License-Identifier: MIT
#include "headwise/heads/fingerprint.hpp"

#include <gtest/gtest.h>

#include <set>
#include <string_view>
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
           KeepGrowingWindow{.divisor = 4}}) {
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
