// SPDX-License-Identifier: MIT
#include "headwise/attention/cpu/decode.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <span>
#include <vector>

#include "headwise/attention/reference.hpp"
#include "support/attention_cases.hpp"
#include "support/isa_types.hpp"
#include "support/run_kernels.hpp"

namespace headwise::test {
namespace {

class CpuDecode : public ::testing::TestWithParam<KernelPair> {};
INSTANTIATE_TEST_SUITE_P(AllKernels, CpuDecode, ::testing::ValuesIn(all_kernels()),
                         name_of_kernels<KernelPair>);

class CpuDecodeOfFormat : public ::testing::TestWithParam<KernelFormat> {};
INSTANTIATE_TEST_SUITE_P(AllFormats, CpuDecodeOfFormat, ::testing::ValuesIn(all_formats()),
                         name_of_kernels<KernelFormat>);

TEST_P(CpuDecodeOfFormat, EqualsTheOracleOnEveryCaseAndIsa) {
  for (const AttentionCase& c : attention_cases()) {
    const std::vector<double> truth = GetParam().isas.front().head(c)->truth();
    for (const KernelPair& kernels : GetParam().isas) {
      const auto head = kernels.head(c);
      head->decode();
      EXPECT_LE(relative_error(head->out(), truth), 1e-5) << kernels.name << ", " << c.name;
    }
  }
}

TEST_P(CpuDecode, GivesTheSameWhereverTheRowsAreCut) {
  const AttentionCase cases[] = {
      {.name = "dense", .group_size = 4, .past = 333, .queries = 2},
      {.name = "ring", .past = 700, .queries = 3, .window = {5, 90}, .kept = Kept::kRing},
      {.name = "compensation", .past = 200, .kept = Kept::kSecondRun, .compensation = 50},
      {.name = "cap, sinks and ALiBi",
       .group_size = 2,
       .past = 700,
       .queries = 3,
       .window = {5, 90},
       .kept = Kept::kRing,
       .soft_cap = 3.0F,
       .sinks = true,
       .alibi = true},
      {.name = "compensation and sinks",
       .group_size = 3,
       .past = 200,
       .kept = Kept::kSecondRun,
       .compensation = 50,
       .sinks = true}};
  for (const AttentionCase& c : cases) {
    const auto head = GetParam().head(c);
    const std::vector<double> truth = head->truth();
    const std::int64_t rows = head->num_rows();
    for (const std::int64_t cut :
         {std::int64_t{0}, std::int64_t{1}, std::int64_t{17}, rows / 2, rows - 1, rows}) {
      head->decode({0, cut});
      EXPECT_LE(relative_error(head->out(), truth), 1e-5) << c.name << " cut at " << cut;
    }
    head->decode({0, 3, 16, 64, 64, rows - 2});
    EXPECT_LE(relative_error(head->out(), truth), 1e-5) << c.name << " cut in six";
  }
}

TEST_P(CpuDecode, GivesTheSameBitsForTheSameCuts) {
  const auto head = GetParam().head({.name = "", .group_size = 7, .past = 300});
  head->decode({0, 64});
  const std::vector<float> once = head->out();
  head->decode({0, 64});
  EXPECT_EQ(once, head->out());
}

TEST_P(CpuDecode, HoldsItsErrorOverALongHead) {
  const auto head =
      GetParam().head({.name = "", .k_dim = 32, .v_dim = 32, .group_size = 2, .past = 9000});
  head->decode({0, 4096, 8192});
  EXPECT_LE(relative_error(head->out(), head->truth()), 1e-5);
}

/// [token][kv_head][dim] arrays, K and V apart, the head in question being the second of three.
template <class E>
struct OwnArrays {
  static constexpr int kHeads = 3, kDim = 48;
  std::vector<E> k, v;
  explicit OwnArrays(std::int64_t tokens)
      : k(static_cast<std::size_t>(tokens) * kHeads * kDim), v(k.size()) {
    std::mt19937 random(4);
    std::normal_distribution<float> normal;
    for (E& x : k) x = from_float<E>(normal(random));
    for (E& x : v) x = from_float<E>(normal(random));
  }
};

template <class Types>
class OverRows : public ::testing::Test {};
TYPED_TEST_SUITE(OverRows, PlainKernels, KernelNames);

TYPED_TEST(OverRows, BothKernelsReadAnEnginesOwnArraysLikeTheOracle) {
  using Format = typename TypeParam::Format;
  using E = typename Format::Element;
  using Arrays = OwnArrays<E>;
  for (const std::int64_t tokens : {0, 1, 63, 64, 65, 300}) {
    const Arrays arrays(tokens);
    for (const std::int64_t queries : {1, 30}) {
      for (const Window window : {Window::everything(), Window{4, 50}}) {
        PagedHead<Format> head({.name = "",
                                .k_dim = Arrays::kDim,
                                .v_dim = Arrays::kDim,
                                .group_size = 3,
                                .past = tokens,
                                .queries = queries,
                                .window = window});
        auto problem = head.problem();
        problem.past = KvView<Format>::over_rows(
            arrays.k.data() + Arrays::kDim, arrays.v.data() + Arrays::kDim,
            Arrays::kHeads * Arrays::kDim, Arrays::kHeads * Arrays::kDim, tokens, Arrays::kDim,
            Arrays::kDim);
        // The oracle over the arrays themselves: no view, no pages.
        std::vector<double> truth;
        for (std::int64_t i = 0; i < queries; ++i) {
          for (int g = 0; g < 3; ++g) {
            ReferenceRow row(problem.q.row(i, g), static_cast<double>(problem.scale));
            std::vector<float> k(Arrays::kDim), v(Arrays::kDim);
            for (std::int64_t j = 0; j <= tokens + i; ++j) {
              if (!window.sees(Pos{tokens + i}, Pos{j})) continue;
              for (std::int64_t d = 0; d < Arrays::kDim; ++d) {
                const auto at =
                    static_cast<std::size_t>((j * Arrays::kHeads + 1) * Arrays::kDim + d);
                k[static_cast<std::size_t>(d)] =
                    j < tokens ? to_float(arrays.k[at])
                               : to_float(from_float<E>(problem.own_k.row(j - tokens, 0)[d]));
                v[static_cast<std::size_t>(d)] =
                    j < tokens ? to_float(arrays.v[at])
                               : to_float(from_float<E>(problem.own_v.row(j - tokens, 0)[d]));
              }
              row.add(std::span<const float>(k), std::span<const float>(v));
            }
            const std::vector<double> out = row.output(Arrays::kDim);
            truth.insert(truth.end(), out.begin(), out.end());
          }
        }
        decode_in_splits<typename TypeParam::Isa>(problem);
        ASSERT_LE(relative_error(head.out(), truth), 1e-5) << tokens << ' ' << queries;
        prefill_in_tiles<typename TypeParam::Isa>(problem, 17);
        ASSERT_LE(relative_error(head.out(), truth), 1e-5) << tokens << ' ' << queries;
      }
    }
  }
}

// The toy of RazorAttention's specification: one dimension, scale 1, q = 1; here dimension 0 of 16.
class CompensationToy : public ::testing::Test {
 protected:
  static constexpr float kKeys[6] = {0.0F, 1.0F, 2.0F, 3.0F, 0.5F, 0.25F};
  static constexpr float kValues[6] = {1.0F, 2.0F, 4.0F, 6.0F, 10.0F, 20.0F};

  /// Row 0 and rows 4, 5 as they are; rows 1, 2, 3 as one compensation row of weight `weight`.
  double attend(std::int64_t weight) {
    constexpr int kDim = 16;
    const PageShape shape{16, kDim, kDim};
    using Format = PlainRows<f32>;
    AlignedFloats page(Format::page_bytes(shape) / sizeof(float));
    const int kept[] = {0, 4};
    for (std::size_t i = 0; i < 2; ++i) {
      page.data()[Format::k_offset(shape, i, 0)] = kKeys[kept[i]];
      page.data()[Format::v_offset(shape, i, 0)] = kValues[kept[i]];
    }
    const std::int32_t table[] = {0};
    float q[kDim] = {1.0F}, own_k[kDim] = {kKeys[5]}, own_v[kDim] = {kValues[5]}, out[kDim];
    float k_mean[kDim] = {2.0F};
    float v_mean[kDim] = {4.0F};

    HeadProblem<Format> problem;
    problem.past = KvView<Format>::over_pages(reinterpret_cast<const std::byte*>(page.data()),
                                              Format::page_bytes(shape), table, shape);
    problem.past.add_run({Slot{0}, Pos{0}, 1});
    problem.past.add_run({Slot{1}, Pos{4}, 1});
    problem.past.compensation = {k_mean, v_mean, weight};
    problem.first_query = Pos{5};
    problem.num_queries = 1;
    problem.q = {q, kDim, kDim};
    problem.own_k = {own_k, kDim, kDim};
    problem.own_v = {own_v, kDim, kDim};
    problem.out = {out, kDim, kDim};
    decode_in_splits<simd::BestIsa>(problem);
    EXPECT_NEAR(static_cast<double>(out[0]), reference_attention(problem)[0], 1e-5);
    return static_cast<double>(out[0]);
  }
};

TEST_F(CompensationToy, WeighsTheRowByHowManyItStandsFor) {
  EXPECT_NEAR(attend(3), 5.051219, 2e-6);
}
TEST_F(CompensationToy, DiffersWithWeightOne) { EXPECT_NEAR(attend(1), 6.423354, 2e-6); }
TEST_F(CompensationToy, IsAbsentWithCountZero) { EXPECT_NEAR(attend(0), 10.976481, 2e-6); }

TEST(CpuDecodeOfNothing, WritesZeros) {
  PagedHead<TiledRows<f16>> head({.name = "", .group_size = 2, .past = 40});
  auto problem = head.problem();
  const std::int64_t rows = problem.num_queries * problem.group_size;
  AlignedFloats partial(decode_partial_floats(rows, problem.past.shape.v_dim));
  AlignedFloats scratch(
      decode_scratch_floats(rows, problem.past.shape.k_dim, problem.past.shape.v_dim));
  decode_split<simd::BestIsa>(problem, {0, 0, false}, partial.data(), scratch.data());
  merge_splits<simd::BestIsa>(problem, partial.data(), 0, 1);
  EXPECT_TRUE(std::ranges::all_of(head.out(), [](float x) { return x == 0.0F; }));
}

}  // namespace
}  // namespace headwise::test
