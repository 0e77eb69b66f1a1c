// SPDX-License-Identifier: MIT
/// @file cuda_attention.cuh
/// Attention on a device for a model on the host: rows go over as the cache stores them, outputs
/// come back. For showing that the answers are the same, not for speed.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "headwise/core/dtype.hpp"
#include "headwise/core/tensor_view.hpp"
#include "headwise/headwise.cuh"

namespace needle_lm {

/// A device cache and its attention behind the calls that a decoder makes: begin, attend, commit.
/// @tparam Row  headwise::f16 or headwise::bf16.
template <headwise::cuda::DeviceRow Row>
class CudaAttention {
 public:
  /// @throws headwise::ConfigError, headwise::CudaError as DeviceCache and DeviceAttention do.
  CudaAttention(const headwise::ModelShape& shape, const headwise::HeadPlan& plan,
                const headwise::CacheOptions& options)
      : cache_(shape, plan, on_device(options)), attention_(cache_) {}

  /// add_sequence, release, rollback, length, held_bytes: as KvCache.
  headwise::cuda::DeviceCache<Row>& cache() { return cache_; }
  const headwise::cuda::DeviceCache<Row>& cache() const { return cache_; }

  headwise::StepStatus begin(headwise::Step& step, std::span<const headwise::SequenceChunk> chunks,
                             headwise::Phase phase) {
    const headwise::StepStatus status = cache_.begin(step, chunks, phase, nullptr);
    if (status == headwise::StepStatus::kOk) {
      headwise::cuda::require(cache_.error(), "begin");
      headwise::cuda::require(attention_.plan(nullptr), "plan");
    }
    return status;
  }

  /// headwise::attend with host tensors; returns when `out` is written.
  /// @param q,k,v,out  as headwise::attend; f32.
  void attend(const headwise::Step& step, int layer, headwise::TensorView<const float> q,
              headwise::TensorView<const float> k, headwise::TensorView<const float> v,
              headwise::TensorView<float> out) {
    const headwise::LayerShape& shape =
        cache_.geometry().layers()[static_cast<std::size_t>(layer)].shape;
    const std::int64_t rows = step.num_rows();
    const auto device_q = upload(q, rows, shape.num_qo_heads(), shape.k_dim, q_);
    const auto device_k = upload(k, rows, shape.num_kv_heads, shape.k_dim, k_);
    const auto device_v = upload(v, rows, shape.num_kv_heads, shape.v_dim, v_);
    const std::size_t count = static_cast<std::size_t>(rows) *
                              static_cast<std::size_t>(shape.num_qo_heads() * shape.v_dim);
    reserve(count, out_);
    auto* device_out = reinterpret_cast<Row*>(out_.data());
    headwise::cuda::require(
        attention_.attend(
            step, layer, device_q, device_k, device_v,
            headwise::TensorView<Row>::nhd(device_out, shape.num_qo_heads(), shape.v_dim), nullptr),
        "attend");
    host_.resize(count);
    headwise::cuda::require(
        cudaMemcpy(host_.data(), device_out, count * sizeof(Row), cudaMemcpyDeviceToHost),
        "attend");
    const Row* from = host_.data();
    for (std::int64_t row = 0; row < rows; ++row) {
      for (int head = 0; head < shape.num_qo_heads(); ++head) {
        float* to = out.row(row, head);
        for (int d = 0; d < shape.v_dim; ++d) to[d] = headwise::to_float(*from++);
      }
    }
  }

  headwise::StepStatus commit(headwise::Step& step) { return cache_.commit(step); }

 private:
  static headwise::CacheOptions on_device(headwise::CacheOptions options) {
    options.page_tokens = headwise::cuda::kPageTokens;
    return options;
  }
  static void reserve(std::size_t count, headwise::cuda::DeviceMemory& memory) {
    if (memory.num_bytes() < count * sizeof(Row)) {
      memory = headwise::cuda::DeviceMemory(count * sizeof(Row));
    }
  }

  headwise::TensorView<const Row> upload(headwise::TensorView<const float> from, std::int64_t rows,
                                         int heads, int dim, headwise::cuda::DeviceMemory& to) {
    host_.clear();
    for (std::int64_t row = 0; row < rows; ++row) {
      for (int head = 0; head < heads; ++head) {
        const float* x = from.row(row, head);
        for (int d = 0; d < dim; ++d) host_.push_back(headwise::from_float<Row>(x[d]));
      }
    }
    reserve(host_.size(), to);
    headwise::cuda::require(
        cudaMemcpy(to.data(), host_.data(), host_.size() * sizeof(Row), cudaMemcpyHostToDevice),
        "attend");
    return headwise::TensorView<const Row>::nhd(reinterpret_cast<const Row*>(to.data()), heads,
                                                dim);
  }

  headwise::cuda::DeviceCache<Row> cache_;
  headwise::cuda::DeviceAttention<Row> attention_;
  headwise::cuda::DeviceMemory q_, k_, v_, out_;
  std::vector<Row> host_;
};

}  // namespace needle_lm
