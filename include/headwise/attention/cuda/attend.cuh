// SPDX-License-Identifier: MIT
/// @file attend.cuh
/// DeviceAttention: attends the layers of a DeviceCache's steps, prompt or decode.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "headwise/attention/cuda/chunk_rule.cuh"
#include "headwise/attention/cuda/head_dims.cuh"
#include "headwise/attention/cuda/launches.cuh"
#include "headwise/attention/cuda/softmax_kind.cuh"
#include "headwise/cache/cuda/device.cuh"
#include "headwise/cache/cuda/device_cache.cuh"
#include "headwise/cache/geometry.hpp"
#include "headwise/cache/step.hpp"
#include "headwise/core/tensor_view.hpp"

namespace headwise::inline v0::cuda {

/// A cache's layers as attention needs to know them.
inline std::vector<DeviceLayer> device_layers(const CacheGeometry& geometry) {
  std::vector<DeviceLayer> layers;
  for (std::size_t l = 0; l < geometry.layers().size(); ++l) {
    const LayerGeometry& of_layer = geometry.layers()[l];
    DeviceLayer layer{of_layer.shape, {}};
    for (const int kv_head : of_layer.task_order) {
      const HeadGeometry& head = geometry.head(static_cast<int>(l), kv_head);
      const int i = layer.heads.num_heads++;
      layer.heads.idx_in_class[i] = static_cast<std::int32_t>(head.idx_in_class);
      layer.heads.kv_head[i] = static_cast<std::int16_t>(kv_head);
      layer.heads.class_idx[i] = static_cast<std::int16_t>(head.class_idx);
      const HeadClass& heads = geometry.classes()[static_cast<std::size_t>(head.class_idx)];
      layer.has_compensation = layer.has_compensation || heads.rule.compensation_rows() > 0;
    }
    layers.push_back(layer);
  }
  return layers;
}

/// The same of a cache that is there.
inline std::vector<DeviceLayer> device_layers(const CacheGeometry& geometry,
                                              const DevicePlace& place) {
  std::vector<DeviceLayer> layers = device_layers(geometry);
  for (std::size_t l = 0; l < layers.size(); ++l) {
    if (layers[l].has_compensation) layers[l].folded = place.folded(static_cast<int>(l));
  }
  return layers;
}

/// What a cache and its attention take on a device and beside it.
struct DeviceEstimate {
  std::size_t page_bytes = 0;     ///< of device memory: K and V, none where the caller gives memory
  std::size_t cache_bytes = 0;    ///< of device memory: page tables and the open step
  std::size_t scratch_bytes = 0;  ///< of device memory: what attention keeps between launches
  std::size_t pinned_bytes = 0;   ///< of page-locked host memory
  /// Of device memory.
  std::size_t device_bytes() const { return page_bytes + cache_bytes + scratch_bytes; }
};

/// What DeviceCache<Row> and DeviceAttention<Row, Dims, Io, Softmax> will allocate, before there is
/// a device.
/// @param limits  the device's: DeviceLimits::current() on its host, or as its maker says.
/// @param max_converted_rows  as DeviceAttention's.
/// @throws ConfigError as the two constructors.
template <DeviceRow Row, class Dims = AllHeadDims, SoftmaxKind Softmax = PlainSoftmax>
DeviceEstimate estimate_device(const ModelShape& shape, const HeadPlan& plan,
                               const CacheOptions& options, const DeviceLimits& limits,
                               std::int64_t max_converted_rows = 0) {
  const CacheGeometry geometry(shape, plan, options, &PlainRows<Row>::page_bytes);
  const DevicePlace::Bytes bytes = DevicePlace::bytes(geometry);
  const std::vector<DeviceLayer> layers = device_layers(geometry);
  return {bytes.pages, bytes.device,
          LaunchLayout::of<Dims, Softmax>(layers, options.max_sequences, limits, max_converted_rows,
                                          options.max_context)
              .total_bytes,
          bytes.pinned};
}

/// Attention over one DeviceCache. Allocates everything at construction.
///
///     cache.begin(step, chunks, stream);
///     attention.plan_work(stream); // once a step: cuts the decode work
///     attention.attend(step, layer, q, k, v, out, stream); // once a layer
///     cache.commit(step);
///
/// plan and attend may be captured in a graph, together and for steps without prefill: a replay
/// follows begin, reads what it sent and is followed by commit_replayed. It attends as many
/// sequences as come, of the numbers of tokens that the captured step had. q, k, v and out may not
/// move; they need room for all rows. A capture attends nothing yet: it may be made in any open
/// step, again and again.
///
/// @tparam Row, Dims, Io, Softmax  as LayerLaunches'.
template <DeviceRow Row, class Dims = AllHeadDims, DeviceIo Io = Row,
          SoftmaxKind Softmax = PlainSoftmax>
class DeviceAttention {
 public:
  /// @param max_converted_rows  where Io is not Row: tokens of any step that has a chunk for
  ///   prefill (see ChunkRule).
  /// @throws ConfigError for a head width that is not one of Dims, a group of more than 128, or a
  ///   layer whose SoftmaxOptions are more than Softmax has.
  /// @throws CudaError when memory cannot be allocated.
  explicit DeviceAttention(const DeviceCache<Row>& cache, std::int64_t max_converted_rows = 0)
      : cache_(cache),
        launches_(device_layers(cache.geometry(), cache.place()),
                  cache.geometry().options().max_sequences, max_converted_rows,
                  cache.geometry().options().max_context) {
    chunks_.reserve(static_cast<std::size_t>(cache.geometry().options().max_sequences));
  }

  /// Would outlive the cache.
  explicit DeviceAttention(const DeviceCache<Row>&& cache,
                           std::int64_t max_converted_rows = 0) = delete;

  /// Bytes of device memory, all of it taken at construction.
  std::size_t device_bytes() const { return launches_.layout().total_bytes; }
  /// The launches themselves, for who drives them without a cache's steps: benchmarks.
  const LayerLaunches<Row, Dims, Io, Softmax>& launches() const& { return launches_; }
  const LayerLaunches<Row, Dims, Io, Softmax>& launches() const&& = delete;

  /// Cuts the open step's work into equal shares. A small launch, and another one for a step with
  /// several tokens of a sequence; needed before attend wherever a chunk of the step is decode's
  /// (see ChunkRule): one token, or a few; and for a step of few long tiles to use the whole device
  /// (prefill/work.cuh).
  /// @return kDeviceError where CUDA refused, see error().
  StepStatus plan_work(cudaStream_t stream) {
    StepStatus status = checked(launches_.plan_work(cache_.place().step(), stream));
    if (status == StepStatus::kOk && cache_.place().most_rows_stored() > 1) {
      status = checked(launches_.plan_prefill(cache_.place().step(), stream));
    }
    if (status != StepStatus::kOk) return status;
    planned_ = cache_.place().num_sent();
    follows_plan_ = true;
    return checked(capture_of(stream, planned_in_));
  }

  /// Stores the step's K and V of one layer and attends its queries: sequences of one new token, or
  /// a few, in one launch over all heads (one for each size of items, see DecodeSize), longer
  /// chunks in another.
  /// @param q    [rows, num_qo_heads, dim], 16-byte aligned, strides multiples of 16 bytes
  /// @param k,v  [rows, num_kv_heads, dim], likewise; keys after RoPE
  /// @param out  [rows, num_qo_heads, dim], likewise; may not overlap the others
  /// @return kStale unless the step is open, kAttended where the layer was attended, kNotPlanned
  ///   where the step's work was not cut since begin (or, in a capture, not in this capture), and
  ///   kDeviceError where CUDA refused, or for more rows than can be converted (then error() is
  ///   cudaErrorInvalidValue). Nothing was launched then, unless by CUDA's fault.
  StepStatus attend(const Step& step, int layer, TensorView<const Io> q, TensorView<const Io> k,
                    TensorView<const Io> v, TensorView<Io> out, cudaStream_t stream) {
    if (!cache_.is_open(step)) return StepStatus::kStale;
    unsigned long long capture = 0;
    if (const StepStatus s = checked(capture_of(stream, capture)); s != StepStatus::kOk) return s;
    const int num_kv_heads = launches_.shape(layer).num_kv_heads;
    if (capture == 0 && step.is_attended(layer, num_kv_heads)) return StepStatus::kAttended;
    std::int64_t growing = 0;
    std::int64_t tiles = 0;
    unsigned sizes = 0;
    const ChunkRule rule = launches_.rule(layer);
    chunks_.clear();
    for (const StepChunk& chunk : step.chunks()) {
      growing += chunk.num_tokens() > 0 ? 1 : 0;
      const int size = rule.decode_size(chunk.num_tokens());
      if (size != ChunkRule::kNone) sizes |= 1U << size;
      const std::int64_t of_chunk = launches_.num_tiles(layer, chunk.num_tokens());
      if (of_chunk > 0) add_chunk({chunk.first_row, chunk.num_tokens()});
      tiles += of_chunk;
    }
    const bool is_planned = planned_ == cache_.place().num_sent() && planned_in_ == capture;
    if (sizes != 0 && !is_planned) return StepStatus::kNotPlanned;
    if (tiles > 0 && !launches_.can_convert(step.num_rows())) {
      return checked(cudaErrorInvalidValue);
    }
    const DeviceStep on_device = cache_.place().step();
    // Decode stores what it attends; rings that move, and what prefill attends, are append's.
    // Whether rings move is no graph's to know, unless all sequences get one token.
    const bool stores = tiles == 0 && !cache_.place().moves_rows() &&
                        (capture == 0 || cache_.place().most_rows_stored() <= 1);
    cudaError_t e = cudaSuccess;
    if (!stores) e = append(step, layer, k, v, capture != 0, stream);
    if (e == cudaSuccess) {
      e = launches_.decode(on_device, layer, sizes, q, k, v, stores, out, stream,
                           stores && follows_plan_);
    }
    follows_plan_ = false;
    if (e == cudaSuccess && tiles > 0) {
      e = launches_.prefill(on_device, layer, tiles, step.num_rows(), chunks_, q, k, v, out, stream,
                            is_planned);
    }
    // A graph cannot know in which of its steps pages are folded.
    if (e == cudaSuccess && launches_.folds(layer) && (capture != 0 || cache_.place().folds())) {
      e = launches_.fold(on_device, layer,
                         capture != 0 ? cache_.geometry().options().max_sequences
                                      : static_cast<std::int64_t>(step.chunks().size()),
                         stream);
    }
    const StepStatus status = checked(e);
    if (status == StepStatus::kOk && capture == 0) {
      step.note_heads_done(layer, growing * num_kv_heads);
    }
    return status;
  }

  /// What CUDA answered to the first call that failed.
  cudaError_t error() const { return error_; }
  /// @copydoc LayerLaunches::overflows
  cudaError_t overflows(std::int64_t& count, cudaStream_t stream) const {
    return launches_.overflows(count, stream);
  }

 private:
  using RowRange = typename LayerLaunches<Row, Dims, Io, Softmax>::RowRange;

  /// 0 where the stream is not capturing.
  static cudaError_t capture_of(cudaStream_t stream, unsigned long long& id) {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    unsigned long long found = 0;
    const cudaError_t e = cudaStreamGetCaptureInfo(stream, &status, &found);
    id = status == cudaStreamCaptureStatusActive ? found : 0;
    return e;
  }
  StepStatus checked(cudaError_t error) {
    if (error_ == cudaSuccess) error_ = error;
    return error == cudaSuccess ? StepStatus::kOk : StepStatus::kDeviceError;
  }
  void add_chunk(RowRange rows) {
    if (!chunks_.empty() && chunks_.back().first + chunks_.back().count == rows.first) {
      chunks_.back().count += rows.count;
    } else {
      chunks_.push_back(rows);
    }
  }

  cudaError_t append(const Step& step, int layer, TensorView<const Io> k, TensorView<const Io> v,
                     bool in_graph, cudaStream_t stream) const {
    std::int64_t most_rows = std::max<std::int64_t>(1, cache_.place().most_rows_stored());
    std::int64_t most_chunks = static_cast<std::int64_t>(step.chunks().size());
    if (in_graph) {  // for every batch size; several tokens may move a ring when they come again
      if (most_rows > 1) most_rows = std::max(most_rows, cache_.place().most_rows_moved());
      most_chunks = cache_.geometry().options().max_sequences;
    }
    return launches_.append(cache_.place().step(), layer, k, v, most_rows, most_chunks, stream);
  }

  const DeviceCache<Row>& cache_;
  LayerLaunches<Row, Dims, Io, Softmax> launches_;
  std::vector<RowRange> chunks_;       // of the call in progress
  bool follows_plan_ = false;          // nothing was launched since plan_work()
  std::uint64_t planned_ = 0;          // DevicePlace::num_sent() when the work was cut
  unsigned long long planned_in_ = 0;  // the capture that plan was called in; 0: none
  cudaError_t error_ = cudaSuccess;
};

}  // namespace headwise::inline v0::cuda
