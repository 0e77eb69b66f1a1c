// SPDX-License-Identifier: MIT
#include "headwise/attention/cpu/mixed_gradient.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "headwise/core/scratch.hpp"
#include "support/isa_types.hpp"
#include "support/mixed_oracle.hpp"

namespace headwise {
namespace {

template <class Isa>
class MixedGradient : public ::testing::Test {};
TYPED_TEST_SUITE(MixedGradient, test::AllIsas, test::IsaNames);

/// What the kernel gives where the forward pass was the oracle's, query ranges one after the other.
struct GradientRun {
  static constexpr float kBefore = 0.5F;  // of d_k and d_v, which are added to

  std::vector<float> d_q, d_k, d_v;
  double gate = 0.0;

  template <class Isa>
  static GradientRun of(const test::MixedCase& c, const std::vector<std::int64_t>& cuts) {
    const test::MixedHalf full_half = test::oracle_half(c, Window::everything());
    const test::MixedHalf streaming_half = test::oracle_half(c, c.window);
    const auto q = test::as_floats(c.q);
    const auto k = test::as_floats(c.k);
    const auto v = test::as_floats(c.v);
    const auto d_out = test::as_floats(c.d_out);
    const auto full = test::as_floats(c.constant_full.empty() ? full_half.out : c.constant_full);
    const auto full_lse = test::as_floats(full_half.lse);
    const auto streaming = test::as_floats(streaming_half.out);
    const auto streaming_lse = test::as_floats(streaming_half.lse);
    GradientRun run;
    run.d_q.assign(q.size(), std::numeric_limits<float>::quiet_NaN());
    run.d_k.assign(k.size(), kBefore);
    run.d_v.assign(v.size(), kBefore);
    const auto view = [](auto& x, int heads, int dim) {
      return TensorView<std::remove_reference_t<decltype(x[0])>>::nhd(x.data(), heads, dim);
    };
    const int group = c.layer.group_size;
    MixedHead head;
    head.window = c.window;
    head.full_weight = c.constant_full.empty() ? static_cast<float>(c.gates[0]) : 0.0F;
    head.streaming_weight = static_cast<float>(1.0 - c.gates[0]);
    head.group_size = group;
    head.k_dim = c.layer.k_dim;
    head.v_dim = c.layer.v_dim;
    head.scale = c.layer.scale();
    head.q = view(q, group, head.k_dim);
    head.k = view(k, 1, head.k_dim);
    head.v = view(v, 1, head.v_dim);
    head.full = view(full, group, head.v_dim);
    head.streaming = view(streaming, group, head.v_dim);
    head.full_lse = view(full_lse, group, 1);
    head.streaming_lse = view(streaming_lse, group, 1);
    head.d_out = view(d_out, group, head.v_dim);
    head.d_q = view(run.d_q, group, head.k_dim);
    head.d_k = view(run.d_k, 1, head.k_dim);
    head.d_v = view(run.d_v, 1, head.v_dim);

    const std::size_t floats = mixed_gradient_scratch_floats(group, head.k_dim, head.v_dim);
    Scratch scratch;
    scratch.reserve((floats + 16) * sizeof(float));
    auto* const room = reinterpret_cast<float*>(scratch.bytes());
    // Whatever was there: what is read was written before.
    std::fill_n(room, floats, std::numeric_limits<float>::quiet_NaN());
    std::fill_n(room + floats, 16, 7.0F);
    std::int64_t begin = 0;
    for (const std::int64_t end : cuts) {
      run.gate += mixed_gradient<Isa>(head, begin, end, room);
      begin = end;
    }
    for (int i = 0; i < 16; ++i) EXPECT_EQ(room[floats + static_cast<std::size_t>(i)], 7.0F);
    for (float& x : run.d_k) x -= kBefore;
    for (float& x : run.d_v) x -= kBefore;
    return run;
  }
};

void expect_gradients(const GradientRun& run, const test::MixedCase& c) {
  const test::OracleGradients expected = test::oracle_gradients(c);
  EXPECT_LT(test::relative_error(run.d_q, expected.q), 2e-5);
  EXPECT_LT(test::relative_error(run.d_k, expected.k), 2e-5);
  EXPECT_LT(test::relative_error(run.d_v, expected.v), 2e-5);
  EXPECT_NEAR(run.gate, expected.gates[0], 2e-5 * (10.0 + std::abs(expected.gates[0])));
}

TYPED_TEST(MixedGradient, IsTheOraclesForEveryGroupAndWidth) {
  for (const auto& [k_dim, v_dim] : {std::pair{16, 16}, {64, 80}, {80, 64}}) {
    for (const int group : {1, 3, 8, 140}) {
      for (const std::int64_t n : {2, 63, 65, 140}) {
        if (group == 140 && (n > 65 || k_dim > 16)) continue;  // more rows than a chunk has
        SCOPED_TRACE(testing::Message() << "group " << group << ", n " << n << ", width " << k_dim);
        const auto c = test::mixed_case(1, group, k_dim, v_dim, {3, 17}, n, 51);
        expect_gradients(GradientRun::of<TypeParam>(c, {n}), c);
      }
    }
  }
}

TYPED_TEST(MixedGradient, OfRangesAddsUp) {
  const auto c = test::mixed_case(1, 3, 16, 16, {3, 17}, 300, 53);
  expect_gradients(GradientRun::of<TypeParam>(c, {1, 1, 64, 130, 131, 300}), c);
}

TYPED_TEST(MixedGradient, OfOneHalfAlone) {
  for (const double gate : {0.0, 1.0, 0.5}) {
    auto c = test::mixed_case(1, 2, 16, 16, {70, 9}, 260, 57);
    c.gates = {gate};
    expect_gradients(GradientRun::of<TypeParam>(c, {260}), c);
    c.constant_full = test::mixed_case(1, 2, 16, 16, {70, 9}, 260, 58).d_out;
    expect_gradients(GradientRun::of<TypeParam>(c, {260}), c);
  }
}

}  // namespace
}  // namespace headwise
