// SPDX-License-Identifier: MIT
// What pages are made of and what q, k, v and out are made of are two things.
#include <gtest/gtest.h>

#include <vector>

#include "cuda/device_model.cuh"

namespace headwise::test {
namespace {

template <class RowAndIo>
class CudaIoTypes : public ::testing::Test {};
template <class R, class I>
struct Types {
  using Row = R;
  using Io = I;
};
using Pairs = ::testing::Types<Types<f16, f32>, Types<f16, bf16>, Types<bf16, f32>>;
TYPED_TEST_SUITE(CudaIoTypes, Pairs);

TYPED_TEST(CudaIoTypes, PromptsAndDecodeGiveTheOraclesRows) {
  for (const int dim : {64, 128}) {
    for (const int group : {1, 4, 12}) {
      DeviceModel<typename TypeParam::Row, cuda::IoDims, typename TypeParam::Io> model(
          {.dim = dim,
           .group_size = group,
           .num_layers = 2,
           .max_context = 1024,
           .max_converted_rows = 400});
      if (!has_device()) continue;
      const SequenceId a = model.add();
      const SequenceId b = model.add();
      model.step({{a, 300}, {b, 1}}, Phase::kPrompt, 5);
      model.step({{a, 1}, {b, 1}}, Phase::kDecode);
      model.step({{b, 70}, {a, 1}}, Phase::kPrompt, 5);
      model.step({{a, 5}, {b, 1}}, Phase::kDecode);
    }
  }
  HEADWISE_NEEDS_DEVICE();
}

TEST(CudaIoTypesF32, OutputsOfDecodeAreNotRoundedToTheRowType) {
  // One row: the output is that row, exactly, and a third of it times three is not f16.
  DeviceModel<f16, cuda::IoDims, f32> model(
      {.group_size = 4, .max_context = 100, .max_converted_rows = 8});
  HEADWISE_NEEDS_DEVICE();
  const SequenceId id = model.add();
  for (int i = 0; i < 3; ++i) {
    model.plant_q(0, 0.0F);
    model.plant_v(0, i == 0 ? 1.0F : 0.0F);
    model.step({{id, 1}}, Phase::kDecode);
  }
  std::vector<float> out(64);
  ASSERT_EQ(cudaMemcpy(out.data(), model.out(0).data, 64 * 4, cudaMemcpyDeviceToHost), cudaSuccess);
  for (const float x : out) EXPECT_NEAR(x, 1.0F / 3, 1e-6F);
}

TEST(CudaIoTypesF32, ElementsThatBecomeInfiniteAreCounted) {
  DeviceModel<f16, cuda::IoDims, f32> model({.max_context = 100, .max_converted_rows = 8});
  HEADWISE_NEEDS_DEVICE();
  const SequenceId id = model.add();
  model.begin({{id, 1}}, Phase::kDecode);
  model.plant_k(0, 70000.0F);
  model.step({{id, 1}}, Phase::kDecode);
  model.plant_v(0, std::numeric_limits<float>::infinity());  // it was none before
  model.step({{id, 1}}, Phase::kDecode);
  std::int64_t count = 0;
  ASSERT_EQ(model.attention().overflows(count, model.stream()), cudaSuccess);
  EXPECT_EQ(count, 2 * 64);  // one row of each head
}

TEST(CudaIoTypesF32, MoreRowsThanAreThereForConversionAreRefused) {
  DeviceModel<f16, cuda::IoDims, f32> model({.max_context = 100, .max_converted_rows = 64});
  HEADWISE_NEEDS_DEVICE();
  const SequenceId id = model.add();
  model.step({{id, 9}}, Phase::kPrompt);  // decode's: nothing passes through that memory
  model.begin({{id, 65}}, Phase::kPrompt);
  EXPECT_EQ(model.attend(0), StepStatus::kDeviceError);
  EXPECT_EQ(model.attention().error(), cudaErrorInvalidValue);
}

}  // namespace
}  // namespace headwise::test
