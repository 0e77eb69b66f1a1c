// SPDX-License-Identifier: MIT
// A device says what went wrong, and work that was not cut for a step is refused.
#include <gtest/gtest.h>

#include <cstdlib>

#include "cuda/device_model.cuh"

namespace headwise::test {
namespace {

__global__ void fail_kernel() { asm volatile("trap;"); }

TEST(CudaStatuses, AttendRefusesDecodeWorkThatWasNotCutForThisStep) {
  DeviceModel<f16> model({.max_context = 300});
  HEADWISE_NEEDS_DEVICE();
  const SequenceId id = model.add();
  model.step({{id, 100}}, Phase::kPrompt, 1);
  for (const std::int64_t n : {1, 3}) {
    model.begin({{id, n}}, Phase::kDecode);
    EXPECT_EQ(model.attend(0), StepStatus::kNotPlanned);
  }
  ASSERT_EQ(model.attention().plan_work(model.stream()), StepStatus::kOk);
  model.begin({{id, 1}}, Phase::kDecode);  // another step: the former one's work is not its own
  EXPECT_EQ(model.attend(0), StepStatus::kNotPlanned);
  ASSERT_EQ(model.attention().plan_work(model.stream()), StepStatus::kOk);
  EXPECT_EQ(model.attend(0), StepStatus::kOk);
}

TEST(CudaStatuses, AttendNeedsNoPlanForPrefill) {
  DeviceModel<f16> model({.max_context = 300});
  HEADWISE_NEEDS_DEVICE();
  const SequenceId id = model.add();
  model.begin({{id, 100}}, Phase::kPrompt);
  EXPECT_EQ(model.attend(0), StepStatus::kOk);
}

TEST(CudaStatuses, AttendRefusesALayerThatWasAttendedAndAStepThatIsNotOpen) {
  DeviceModel<f16> model({.max_context = 300});
  HEADWISE_NEEDS_DEVICE();
  const SequenceId id = model.add();
  model.begin({{id, 70}}, Phase::kPrompt);
  EXPECT_EQ(model.attend(0), StepStatus::kOk);
  EXPECT_EQ(model.attend(0), StepStatus::kAttended);
  EXPECT_EQ(model.cache().commit(model.open_step()), StepStatus::kOk);
  EXPECT_EQ(model.attend(0), StepStatus::kStale);
}

TEST(CudaStatuses, ACaptureNeedsItsOwnPlanAndAttendsNothingYet) {
  DeviceModel<f16> model({.max_context = 300, .most_rows = 8});
  HEADWISE_NEEDS_DEVICE();
  const SequenceId id = model.add();
  model.begin({{id, 1}}, Phase::kDecode);
  ASSERT_EQ(model.attention().plan_work(model.stream()), StepStatus::kOk);
  cudaGraph_t graph = nullptr;
  ASSERT_EQ(cudaStreamBeginCapture(model.stream(), cudaStreamCaptureModeThreadLocal), cudaSuccess);
  EXPECT_EQ(model.attend(0), StepStatus::kNotPlanned);
  ASSERT_EQ(cudaStreamEndCapture(model.stream(), &graph), cudaSuccess);
  cudaGraphDestroy(graph);
  for (int i = 0; i < 2; ++i) cudaGraphExecDestroy(model.capture());
  EXPECT_EQ(model.cache().commit(model.open_step()), StepStatus::kIncomplete);
}

TEST(CudaStatuses, BeginSaysThatTheDeviceFailed) {
  DeviceModel<f16> model({.max_context = 300});
  HEADWISE_NEEDS_DEVICE();
  GTEST_FLAG_SET(death_test_style, "threadsafe");  // in a process of its own: the device is lost
  const auto begins_on_a_lost_device = [] {
    DeviceModel<f16> lost({.max_context = 300});
    const SequenceId id = *lost.cache().add_sequence();
    fail_kernel<<<1, 1, 0, lost.stream()>>>();
    cudaStreamSynchronize(lost.stream());
    Step step;
    const StepStatus status = lost.cache().begin(step, {{id, 10}}, lost.stream());
    const bool told = status == StepStatus::kDeviceError && step.chunks().size() <= 1 &&
                      !lost.cache().is_open(step) && lost.cache().place().error() != cudaSuccess;
    std::_Exit(told ? 0 : 1);
  };
  EXPECT_EXIT(begins_on_a_lost_device(), ::testing::ExitedWithCode(0), "");
}

}  // namespace
}  // namespace headwise::test
