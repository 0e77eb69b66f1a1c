// SPDX-License-Identifier: MIT
// The CPU kernels' case table through a device cache: the past as one prompt, then the step.
#include <gtest/gtest.h>

#include <set>
#include <string>

#include "cuda/device_model.cuh"
#include "support/attention_cases.hpp"

namespace headwise::test {
namespace {

template <class Row>
class CudaCases : public ::testing::Test {};
TYPED_TEST_SUITE(CudaCases, DeviceRows);

/// The case as a device model. Widths without a kernel become 64; nothing keeps a second run or a
/// compensation row on a device, and pages have 64 tokens there.
bool on_device(const AttentionCase& c, DeviceModelOptions& options) {
  if (c.page_tokens != 64 || c.compensation > 0 || c.kept == Kept::kSecondRun) return false;
  options.dim = c.k_dim == c.v_dim && cuda::AllHeadDims::contains(c.k_dim) ? c.k_dim : 64;
  options.group_size = c.group_size;
  options.num_kv_heads = 1;
  options.first_streams = c.window.bounded();
  if (c.window.bounded()) options.window = c.window;
  options.max_context = c.past + c.queries;
  options.max_sequences = 1;
  options.soft_cap = c.soft_cap;
  options.alibi = c.alibi;
  if (c.sinks) options.sinks = {-1.0F, 0.5F, 3.0F};
  return true;
}
bool has_more_than_a_scale(const AttentionCase& c) {
  return c.soft_cap > 0.0F || c.sinks || c.alibi;
}

template <class Model>
void prompt_and_step(const AttentionCase& c, const DeviceModelOptions& options) {
  Model model(options);
  if (!has_device()) return;
  const SequenceId id = model.add();
  if (c.past > 0) model.step({{id, c.past}}, Phase::kPrompt, 3);
  model.step({{id, c.queries}}, Phase::kPrompt, 20);
}

TYPED_TEST(CudaCases, EqualTheOracle) {
  int run = 0;
  for (const AttentionCase& c : attention_cases()) {
    DeviceModelOptions options;
    if (has_more_than_a_scale(c) || !on_device(c, options)) continue;
    SCOPED_TRACE(c.name);
    ++run;
    prompt_and_step<DeviceModel<TypeParam>>(c, options);
  }
  EXPECT_GT(run, 80);
  HEADWISE_NEEDS_DEVICE();
}

TYPED_TEST(CudaCases, OfSoftmaxesWithMoreThanAScaleEqualTheOracle) {
  using Dims = cuda::ShapedDims<TypeParam>;
  int run = 0;
  for (const AttentionCase& c : attention_cases()) {
    DeviceModelOptions options;
    if (!has_more_than_a_scale(c) || !on_device(c, options)) continue;
    SCOPED_TRACE(c.name);
    if (!Dims::contains(options.dim)) options.dim = Dims::contains(64) ? 64 : 128;
    ++run;
    prompt_and_step<DeviceModel<TypeParam, Dims, TypeParam, cuda::ShapedSoftmax>>(c, options);
  }
  EXPECT_GT(run, 10);
  HEADWISE_NEEDS_DEVICE();
}

TYPED_TEST(CudaCases, EqualTheOracleForEveryGroupAndWidth) {
  for (const int dim : {32, 64, 80, 96, 128, 256}) {
    for (const int group : {1, 2, 4, 5, 7, 8, 12}) {
      SCOPED_TRACE("dim " + std::to_string(dim) + " group " + std::to_string(group));
      DeviceModel<TypeParam> model({.dim = dim, .group_size = group, .max_context = 1024});
      if (!has_device()) continue;
      const SequenceId id = model.add();
      model.step({{id, 333}}, Phase::kPrompt, 4);
      model.step({{id, 1}}, Phase::kDecode);
      model.step({{id, 5}}, Phase::kDecode);
    }
  }
  HEADWISE_NEEDS_DEVICE();
}

}  // namespace
}  // namespace headwise::test
