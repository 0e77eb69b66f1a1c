// SPDX-License-Identifier: MIT
/// @file cuda_cache.hpp
/// A cache on a CUDA device for a model on the host: rows go over as the device stores them,
/// outputs come back. For showing that the answers are the same, not for speed.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>

#include "headwise/cache/options.hpp"
#include "headwise/cache/step.hpp"
#include "headwise/core/shape.hpp"
#include "headwise/core/tensor_view.hpp"
#include "headwise/heads/plan.hpp"

namespace needle_lm {

/// The calls of headwise::KvCache that a decoder makes, over headwise::cuda::DeviceCache. Nothing
/// of CUDA is seen here: cuda_cache.cu has it.
/// @tparam Row  headwise::f16 or headwise::bf16.
template <class Row>
class CudaCache {
 public:
  /// @throws ConfigError for what the device cache does not have: growing windows, head widths that
  ///   cuda_cache.cu was not compiled for.
  /// @throws CudaError where there is no device, or too little memory.
  CudaCache(const headwise::ModelShape& shape, const headwise::HeadPlan& plan,
            const headwise::CacheOptions& options);
  ~CudaCache();

  std::optional<headwise::SequenceId> add_sequence();
  void release(headwise::SequenceId sequence);
  std::int64_t length(headwise::SequenceId sequence) const;
  std::size_t held_bytes(headwise::SequenceId sequence) const;
  headwise::StepStatus begin(headwise::Step& step, std::span<const headwise::SequenceChunk> chunks);
  headwise::StepStatus commit(headwise::Step& step);

  /// headwise::attend with host tensors; returns when `out` is written.
  void attend(headwise::Step& step, int layer, headwise::TensorView<const float> q,
              headwise::TensorView<const float> k, headwise::TensorView<const float> v,
              headwise::TensorView<float> out);

 private:
  struct Device;
  std::unique_ptr<Device> device_;
};

/// As headwise::attend; the device has its own threads.
template <class Row, class Executor>
void attend(CudaCache<Row>& cache, headwise::Step& step, int layer,
            headwise::TensorView<const float> q, headwise::TensorView<const float> k,
            headwise::TensorView<const float> v, headwise::TensorView<float> out, Executor&) {
  cache.attend(step, layer, q, k, v, out);
}

}  // namespace needle_lm
