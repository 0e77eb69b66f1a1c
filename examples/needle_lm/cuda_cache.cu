// SPDX-License-Identifier: MIT
#include <cuda_runtime.h>

#include <vector>

#include "cuda_cache.hpp"
#include "headwise/headwise.cuh"

namespace needle_lm {
namespace {

using headwise::TensorView;
using headwise::cuda::DeviceMemory;
using headwise::cuda::require;

using HeadDims = headwise::cuda::HeadDims<32>;  // the trained model's: every width costs kernels

headwise::CacheOptions on_device(headwise::CacheOptions options) {
  options.page_tokens = headwise::cuda::kPageTokens;
  return options;
}

/// Rows of one tensor on the device, and the host memory that they are converted in.
template <class Row>
class Rows {
 public:
  TensorView<Row> reserve(std::int64_t rows, int heads, int dim) {
    host_.resize(static_cast<std::size_t>(rows * heads * dim));
    const std::size_t bytes = host_.size() * sizeof(Row);
    if (memory_.num_bytes() < bytes) memory_ = DeviceMemory(bytes);
    return TensorView<Row>::nhd(reinterpret_cast<Row*>(memory_.data()), heads, dim);
  }

  TensorView<const Row> upload(TensorView<const float> from, std::int64_t rows, int heads,
                               int dim) {
    const TensorView<Row> to = reserve(rows, heads, dim);
    Row* next = host_.data();
    for (std::int64_t row = 0; row < rows; ++row) {
      for (int head = 0; head < heads; ++head) {
        const float* x = from.row(row, head);
        for (int d = 0; d < dim; ++d) *next++ = headwise::from_float<Row>(x[d]);
      }
    }
    copy(memory_.data(), host_.data(), cudaMemcpyHostToDevice);
    return {to.data, to.stride_n, to.stride_h};
  }

  void download(TensorView<float> to, std::int64_t rows, int heads, int dim) {
    copy(host_.data(), memory_.data(), cudaMemcpyDeviceToHost);
    const Row* next = host_.data();
    for (std::int64_t row = 0; row < rows; ++row) {
      for (int head = 0; head < heads; ++head) {
        float* x = to.row(row, head);
        for (int d = 0; d < dim; ++d) x[d] = headwise::to_float(*next++);
      }
    }
  }

 private:
  void copy(void* to, const void* from, cudaMemcpyKind kind) {
    require(cudaMemcpy(to, from, host_.size() * sizeof(Row), kind), "copy of a layer's rows");
  }

  std::vector<Row> host_;
  DeviceMemory memory_;
};

}  // namespace

template <class Row>
struct CudaCache<Row>::Device {
  Device(const headwise::ModelShape& shape, const headwise::HeadPlan& plan,
         const headwise::CacheOptions& options)
      : cache(shape, plan, on_device(options)), attention(cache) {}

  headwise::cuda::DeviceCache<Row> cache;
  headwise::cuda::DeviceAttention<Row, HeadDims> attention;
  Rows<Row> q, k, v, out;
};

template <class Row>
CudaCache<Row>::CudaCache(const headwise::ModelShape& shape, const headwise::HeadPlan& plan,
                          const headwise::CacheOptions& options)
    : device_(std::make_unique<Device>(shape, plan, options)) {}
template <class Row>
CudaCache<Row>::~CudaCache() = default;

template <class Row>
std::optional<headwise::SequenceId> CudaCache<Row>::add_sequence() {
  return device_->cache.add_sequence();
}
template <class Row>
void CudaCache<Row>::release(headwise::SequenceId sequence) {
  device_->cache.release(sequence);
}
template <class Row>
std::int64_t CudaCache<Row>::length(headwise::SequenceId sequence) const {
  return device_->cache.length(sequence);
}
template <class Row>
std::size_t CudaCache<Row>::held_bytes(headwise::SequenceId sequence) const {
  return device_->cache.held_bytes(sequence);
}

template <class Row>
headwise::StepStatus CudaCache<Row>::begin(headwise::Step& step,
                                           std::span<const headwise::SequenceChunk> chunks) {
  const headwise::StepStatus status = device_->cache.begin(step, chunks, nullptr);
  return status == headwise::StepStatus::kOk ? device_->attention.plan_work(nullptr) : status;
}
template <class Row>
headwise::StepStatus CudaCache<Row>::commit(headwise::Step& step) {
  return device_->cache.commit(step);
}

template <class Row>
void CudaCache<Row>::attend(headwise::Step& step, int layer, TensorView<const float> q,
                            TensorView<const float> k, TensorView<const float> v,
                            TensorView<float> out) {
  const headwise::LayerShape& shape =
      device_->cache.geometry().layers()[static_cast<std::size_t>(layer)].shape;
  const std::int64_t rows = step.num_rows();
  const int qo_heads = shape.num_qo_heads();
  const auto device_q = device_->q.upload(q, rows, qo_heads, shape.k_dim);
  const auto device_k = device_->k.upload(k, rows, shape.num_kv_heads, shape.k_dim);
  const auto device_v = device_->v.upload(v, rows, shape.num_kv_heads, shape.v_dim);
  const auto device_out = device_->out.reserve(rows, qo_heads, shape.v_dim);
  if (device_->attention.attend(step, layer, device_q, device_k, device_v, device_out, nullptr) !=
      headwise::StepStatus::kOk) {
    headwise::fail<headwise::CudaError>("attend: ", cudaGetErrorString(device_->attention.error()));
  }
  device_->out.download(out, rows, qo_heads, shape.v_dim);
}

template class CudaCache<headwise::f16>;
template class CudaCache<headwise::bf16>;

}  // namespace needle_lm
