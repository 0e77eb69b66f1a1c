// SPDX-License-Identifier: MIT
// A row that a query does not see contributes nothing to it, whatever its bits are.
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "cuda/device_model.cuh"

namespace headwise::test {
namespace {

template <class Row>
class CudaHiddenRows : public ::testing::Test {
 public:
  /// For widths of either prefill kernel and groups: `fn(model, id)` over a fresh sequence of a
  /// head that keeps everything and one that streams. Queries that do see the row are held to what
  /// double gives: infinity or NaN.
  template <class Fn>
  static void for_each_model(std::int64_t max_rollback, Fn fn) {
    for (const int dim : {64, 96, 128, 256}) {
      for (const int group : {1, 4}) {
        SCOPED_TRACE("width " + std::to_string(dim) + ", group " + std::to_string(group));
        DeviceModel<Row> model(
            {.dim = dim, .group_size = group, .max_context = 512, .max_rollback = max_rollback});
        if (has_device()) fn(model, model.add());
      }
    }
  }
};
TYPED_TEST_SUITE(CudaHiddenRows, DeviceRows);

TYPED_TEST(CudaHiddenRows, AValueOfALaterTokenOfTheChunkReachesNoQuery) {
  for (const float value : {kInf, -kInf, kNan, 1e6F}) {  // f16 ends at 65504
    TestFixture::for_each_model(0, [&](auto& model, SequenceId id) {
      model.plant_v(39, value);
      model.step({{id, 40}}, Phase::kPrompt);
    });
  }
  HEADWISE_NEEDS_DEVICE();
}

TYPED_TEST(CudaHiddenRows, AKeyOfALaterTokenOfTheChunkReachesNoQuery) {
  for (const float value : {kInf, kNan, -1e6F}) {
    TestFixture::for_each_model(0, [&](auto& model, SequenceId id) {
      model.plant_k(39, value);
      model.step({{id, 40}}, Phase::kPrompt);
    });
  }
  HEADWISE_NEEDS_DEVICE();
}

TYPED_TEST(CudaHiddenRows, AValueThatHasLeftTheWindowReachesNoQuery) {
  TestFixture::for_each_model(0, [&](auto& model, SequenceId id) {
    model.plant_v(30, kInf);  // seen by tokens 30 to 89 of the head with a window of 4 + 60
    model.step({{id, 160}}, Phase::kPrompt);
  });
  HEADWISE_NEEDS_DEVICE();
}

TYPED_TEST(CudaHiddenRows, AStoredValueReachesOnlyWhoSeesIt) {
  TestFixture::for_each_model(0, [&](auto& model, SequenceId id) {
    model.plant_v(30, kNan);
    model.step({{id, 70}}, Phase::kPrompt);
    model.step({{id, 33}}, Phase::kPrompt);  // some of these no longer see it
    for (int i = 0; i < 3; ++i) model.step({{id, 1}}, Phase::kDecode);
  });
  HEADWISE_NEEDS_DEVICE();
}

TYPED_TEST(CudaHiddenRows, AValueThatWasRolledBackReachesNoQuery) {
  TestFixture::for_each_model(9, [&](auto& model, SequenceId id) {
    model.step({{id, 100}}, Phase::kPrompt, 1);
    for (const std::int64_t n : {1, 5, 9}) {
      for (std::int64_t row = 0; row < n; ++row) model.plant_v(row, kNan);
      model.step({{id, n}}, Phase::kDecode);
      model.rollback(id, 100);
      model.step({{id, 1}}, Phase::kDecode);
      model.rollback(id, 100);
      model.step({{id, 3}}, Phase::kDecode);
      model.rollback(id, 100);
    }
  });
  HEADWISE_NEEDS_DEVICE();
}

TYPED_TEST(CudaHiddenRows, AnotherSequencesInfinityReachesNoQuery) {
  DeviceModel<TypeParam> model({.dim = 128, .group_size = 4, .max_context = 512});
  HEADWISE_NEEDS_DEVICE();
  const SequenceId a = model.add();
  const SequenceId b = model.add();
  for (int row = 0; row < 50; ++row) model.plant_v(row, kInf);
  model.step({{a, 50}, {b, 90}}, Phase::kPrompt);
  model.plant_v(0, kInf);
  model.step({{a, 1}, {b, 1}}, Phase::kDecode);
}

/// More tiles than a launch has blocks: what a block finds in one tile must not touch the next.
TYPED_TEST(CudaHiddenRows, ManyTilesAreMendedEachForItself) {
  DeviceModel<TypeParam> model(
      {.dim = 128, .group_size = 4, .num_kv_heads = 8, .max_context = 4096});
  HEADWISE_NEEDS_DEVICE();
  const SequenceId id = model.add();
  for (std::int64_t row = 15; row < 2000; row += 160) model.plant_v(row, kNan);
  model.step({{id, 2000}}, Phase::kPrompt, 60);
}

}  // namespace
}  // namespace headwise::test
