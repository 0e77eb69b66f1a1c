// SPDX-License-Identifier: MIT
// Scores and values at the ends of their formats give what double gives.
#include <gtest/gtest.h>

#include <cstdint>
#include <string>

#include "cuda/device_model.cuh"

namespace headwise::test {
namespace {

/// Plants q and k in all rows of a step, after `past` tokens of the same kind.
template <class Row, class Plant>
void check(int dim, Plant plant) {
  SCOPED_TRACE("width " + std::to_string(dim));
  DeviceModel<Row> model({.dim = dim, .group_size = 4, .max_context = 512});
  if (!has_device()) return;
  const SequenceId id = model.add();
  const auto step = [&](std::int64_t n, Phase phase) {
    for (std::int64_t row = 0; row < n; ++row) plant(model, row);
    model.step({{id, n}}, phase);
  };
  step(16, Phase::kPrompt);
  step(1, Phase::kDecode);
  step(130, Phase::kPrompt);
  step(1, Phase::kDecode);
  step(9, Phase::kDecode);
}

TEST(CudaExtremeValues, ScoresThatAreAllMinusInfinityGiveZeros) {
  for (const int dim : {64, 96, 128}) {
    check<f16>(dim, [](auto& model, std::int64_t row) {
      model.plant_q(row, -1.0F);
      model.plant_k(row, 70000.0F);  // infinity, as it is stored
    });
    check<bf16>(dim, [](auto& model, std::int64_t row) {
      model.plant_q(row, -1.0F);
      model.plant_k(row, std::numeric_limits<float>::infinity());
    });
  }
  HEADWISE_NEEDS_DEVICE();
}

TEST(CudaExtremeValues, AScoreOfMinusInfinityIsNoSentinelForTheOthers) {
  for (const int dim : {64, 96, 128}) {
    check<f16>(dim, [](auto& model, std::int64_t row) {
      model.plant_q(row, -1.0F);
      if (row == 0) model.plant_k(row, 70000.0F);
    });
  }
  HEADWISE_NEEDS_DEVICE();
}

TEST(CudaExtremeValues, EqualScoresFarBelowZeroShareTheWeight) {
  for (const int dim : {64, 96, 128}) {
    check<f16>(dim, [](auto& model, std::int64_t row) {
      model.plant_q(row, -60000.0F);
      model.plant_k(row, 60000.0F);
    });
    check<bf16>(dim, [](auto& model, std::int64_t row) {  // scores of -1e34: far below any sentinel
      model.plant_q(row, -1e16F);
      model.plant_k(row, 1e16F);
    });
  }
  HEADWISE_NEEDS_DEVICE();
}

TEST(CudaExtremeValues, EqualScoresFarAboveZeroShareTheWeight) {
  for (const int dim : {64, 96, 128}) {
    check<f16>(dim, [](auto& model, std::int64_t row) {
      model.plant_q(row, 50000.0F);
      model.plant_k(row, 50000.0F);
    });
  }
  HEADWISE_NEEDS_DEVICE();
}

TEST(CudaExtremeValues, ValuesNearTheFormatsEndGiveTheirMean) {
  for (const int dim : {64, 96, 128}) {
    check<bf16>(dim, [](auto& model, std::int64_t row) {
      model.plant_q(row, 0.0F);  // all weigh alike
      model.plant_v(row, 3e38F);
    });
    check<f16>(dim, [](auto& model, std::int64_t row) {
      model.plant_q(row, 0.0F);
      model.plant_v(row, 65504.0F);
    });
  }
  HEADWISE_NEEDS_DEVICE();
}

TEST(CudaExtremeValues, ValuesOf3e36Over300RowsGiveTheirMean) {
  DeviceModel<bf16> model({.dim = 128, .group_size = 4, .max_context = 512});
  HEADWISE_NEEDS_DEVICE();
  const SequenceId id = model.add();
  for (int row = 0; row < 300; ++row) model.plant_v(row, 3e36F);
  model.step({{id, 300}}, Phase::kPrompt);
  model.plant_v(0, 3e36F);
  model.step({{id, 1}}, Phase::kDecode);
}

TEST(CudaExtremeValues, SmallValuesKeepTheirBits) {
  for (const int dim : {64, 128}) {
    check<bf16>(dim, [](auto& model, std::int64_t row) { model.plant_v(row, 1e-25F); });
    check<f16>(dim, [](auto& model, std::int64_t row) { model.plant_v(row, 1e-4F); });
  }
  HEADWISE_NEEDS_DEVICE();
}

}  // namespace
}  // namespace headwise::test
