// SPDX-License-Identifier: MIT
// Whole steps over q, k, v and out of two bytes: the outputs, rounded once, and the stored bits of
// floats of the same values.
#include <gtest/gtest.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "headwise/attention/attend.hpp"
#include "headwise/attention/single_sequence.hpp"
#include "support/attended_cache.hpp"

namespace headwise::test {
namespace {

template <class E>
std::vector<E> as(const std::vector<float>& x) {
  std::vector<E> to;
  for (const float value : x) to.push_back(from_float<E>(value));
  return to;
}
template <class E>
std::vector<float> floats(const std::vector<E>& x) {
  std::vector<float> to;
  for (const E value : x) to.push_back(to_float(value));
  return to;
}

template <class Rows, class E>
void expect_steps_as_of_floats(PrefillMode prefill) {
  const CacheOptions options = mixed_options(prefill, 7);
  AttendedCache<Rows> of_floats(mixed_shape(), mixed_plan(prefill), options);
  AttendedCache<Rows> of_elements(mixed_shape(), mixed_plan(prefill), options);
  const std::pair a(of_floats.add(), of_elements.add());
  const std::pair b(of_floats.add(), of_elements.add());
  std::int64_t step = 0;
  for (const auto& [of_a, of_b] : {std::pair{90, 1}, {1, 130}, {1, 1}, {6, 1}, {40, 17}, {1, 0}}) {
    const Phase phase = ++step % 2 == 0 ? Phase::kDecode : Phase::kPrompt;
    const auto new_a = new_tokens(of_a);
    const auto new_b = new_tokens(of_b);
    const Chunks chunks{{a.first, new_a}, {b.first, new_b}};
    ASSERT_EQ(of_floats.begin(chunks, phase), StepStatus::kOk);
    ASSERT_EQ(of_elements.begin({{a.second, new_a}, {b.second, new_b}}, phase), StepStatus::kOk);
    for (int l = 0; l < mixed_shape().num_layers(); ++l) {
      auto in = of_floats.inputs_of(l, chunks);
      const auto q = as<E>(in.q);
      const auto k = as<E>(in.k);
      const auto v = as<E>(in.v);
      std::vector<E> out = as<E>(in.out);
      in.q = floats(q);
      in.k = floats(k);
      in.v = floats(v);
      ASSERT_EQ(of_floats.attend_into(of_floats.step, l, in), StepStatus::kOk);
      const LayerShape& shape = mixed_shape().layer(l);
      ASSERT_EQ(attend(of_elements.cache, of_elements.step, l,
                       TensorView<const E>::nhd(q.data(), shape.num_qo_heads(), shape.k_dim),
                       TensorView<const E>::nhd(k.data(), shape.num_kv_heads, shape.k_dim),
                       TensorView<const E>::nhd(v.data(), shape.num_kv_heads, shape.v_dim),
                       TensorView<E>::nhd(out.data(), shape.num_qo_heads(), shape.v_dim)),
                StepStatus::kOk);
      ASSERT_EQ(floats(out), floats(as<E>(in.out))) << "layer " << l;
    }
    ASSERT_EQ(of_floats.commit(), StepStatus::kOk);
    ASSERT_EQ(of_elements.commit(), StepStatus::kOk);
    for (const auto& [one, other] : {a, b}) {
      ASSERT_EQ(seen_by_next(of_floats.cache, one, Phase::kDecode),
                seen_by_next(of_elements.cache, other, Phase::kDecode));
    }
  }
}

TEST(IoTypes, StepsGiveWhatFloatsOfTheSameValuesGive) {
  for (const PrefillMode prefill : {PrefillMode::kWindowed, PrefillMode::kChunkCausal}) {
    expect_steps_as_of_floats<f16, f16>(prefill);
    expect_steps_as_of_floats<f16, bf16>(prefill);
    expect_steps_as_of_floats<f32, f16>(prefill);
    expect_steps_as_of_floats<Int8Rows, f16>(prefill);
    expect_steps_as_of_floats<PlainRows<bf16>, bf16>(prefill);
  }
}

TEST(IoTypes, SharesAndSharedLayersAndTheOneSequenceFaceTakeThem) {
  const ModelShape shape = ModelShape::uniform(1, 2, 1, 16);
  SingleSequence<f16> sequence(shape, HeadPlan(shape), {.max_context = 64});
  const std::vector<f16> ones(64, from_float<f16>(1.0F));
  std::vector<f16> out(64), shared(64);
  const auto in = [&](std::int64_t heads) {
    return TensorView<const f16>::nhd(ones.data(), heads, 16);
  };
  ASSERT_EQ(sequence.begin(2), StepStatus::kOk);
  ASSERT_EQ(attend_shared(sequence.cache(), sequence.step(), 0, in(2), in(1), in(1),
                          TensorView<f16>::nhd(shared.data(), 2, 16)),
            StepStatus::kOk);
  ASSERT_EQ(plan_work(sequence.cache(), sequence.step(), 1), StepStatus::kOk);
  ASSERT_EQ(attend_share(sequence.cache(), sequence.step(), 0, in(2), in(1), in(1),
                         TensorView<f16>::nhd(out.data(), 2, 16), 0, 1),
            StepStatus::kOk);
  ASSERT_EQ(sequence.commit(), StepStatus::kOk);
  EXPECT_EQ(floats(out), floats(ones));
  EXPECT_EQ(floats(shared), floats(ones));
  ASSERT_EQ(sequence.begin(1), StepStatus::kOk);
  ASSERT_EQ(sequence.attend(0, in(2), in(1), in(1), TensorView<f16>::nhd(out.data(), 2, 16)),
            StepStatus::kOk);
}

}  // namespace
}  // namespace headwise::test
