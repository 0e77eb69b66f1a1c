// SPDX-License-Identifier: MIT
/// @file own_tables.cuh
/// TableAttention: decode over an engine's own page tables, without a cache.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "headwise/attention/cuda/launches.cuh"
#include "headwise/attention/cuda/softmax_kind.cuh"
#include "headwise/cache/cuda/device.cuh"
#include "headwise/cache/cuda/step_state.cuh"
#include "headwise/core/check.hpp"
#include "headwise/core/shape.hpp"
#include "headwise/core/tensor_view.hpp"
#include "headwise/core/window.hpp"

namespace headwise::inline v0::cuda {

/// One layer's pages as an engine keeps them: a page holds 64 K rows of one KV head of one
/// sequence, then as many V rows; `page_table[h * head_stride + s * sequence_stride + p]` names the
/// page of positions [64 p, 64 p + 64) of head h of sequence s.
struct PageTableView {
  const std::int32_t* page_table = nullptr;  ///< on the device
  std::byte* pages = nullptr;                ///< page 0, on the device, 16-byte aligned
  std::size_t page_stride = 0;               ///< bytes from one page number to the next
};

/// How those tables are laid out, the same for all layers.
struct PageTableShape {
  std::int32_t max_sequences = 0;    ///< rows of a head's table
  std::int64_t sequence_stride = 0;  ///< entries from one sequence to the next: most pages of one
  std::int32_t head_stride = 0;      ///< entries from one KV head to the next

  /// [kv_head, sequence, page], dense.
  /// @throws ConfigError where a head's table has 2^31 entries or more.
  static PageTableShape dense(std::int32_t max_sequences, std::int64_t max_pages) {
    const std::int64_t entries = max_sequences * max_pages;
    if (max_sequences < 1 || max_pages < 1 || entries > std::numeric_limits<std::int32_t>::max()) {
      fail<ConfigError>("page tables of ", max_sequences, " sequences of ", max_pages,
                        " pages: 1 to 2^31 - 1 entries a head");
    }
    return {max_sequences, max_pages, static_cast<std::int32_t>(entries)};
  }
};

/// The windows of a layer's heads, equal ones once.
struct WindowClass {
  std::int32_t sink = 0;    ///< first positions, always seen
  std::int32_t recent = 0;  ///< newest ones, the query's own counted
};

namespace detail {

/// Describes one new token of each sequence to the kernels, from the lengths alone.
/// @param lengths  [num_sequences] tokens, the new one's row counted and stored; 0: no sequence
template <class = void>  // inline does not hold for kernels
__global__ void __launch_bounds__(128)
    describe_tables_kernel(StepHeader* header, ChunkState* chunks, ClassState* classes,
                           const WindowClass* windows, int num_classes, const std::int32_t* lengths,
                           int num_sequences, std::int64_t sequence_stride,
                           std::int32_t head_stride) {
  wait_for_previous();
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i == 0) header->num_chunks = num_sequences;
  if (i >= num_sequences * num_classes) return;
  const int s = i / num_classes;
  const WindowClass window = windows[i % num_classes];
  const std::int32_t length = lengths[s];
  if (i % num_classes == 0) chunks[s] = {s, max(length - 1, 0), length > 0 ? 1 : 0};
  ClassState state{};
  state.table = s * sequence_stride;
  state.head_stride = head_stride;
  const std::int32_t sinks = min(window.sink, length);
  const std::int32_t oldest = max(sinks, length - min(window.recent, length));
  state.slot_end[0] = sinks == oldest ? length : sinks;
  if (sinks == 0) state.slot_begin[0] = oldest;
  if (sinks == 0) state.slot_end[0] = length;
  if (sinks > 0 && sinks < oldest) {
    state.slot_begin[1] = oldest;
    state.slot_end[1] = length;
  }
  classes[i] = state;
}

}  // namespace detail

/// Decode over an engine's own pages: it stores rows and keeps tables, this attends, each head
/// within its window, at the speed of the memory bus. Pages that no window reaches are never read:
/// the engine may have freed them, and their table entries may be anything.
///
///     attention.plan_work(lengths, num_sequences, stream); // once a step
///     attention.decode(layer, tables, q, out, stream); // once a layer, rows already stored
///
/// Both may be captured in a graph: lengths and tables are read on the device, from the same
/// addresses; sequences that are not there have length 0.
///
/// @tparam Row, Dims, Io, Softmax  as LayerLaunches'.
template <DeviceRow Row, class Dims = AllHeadDims, DeviceIo Io = Row,
          SoftmaxKind Softmax = PlainSoftmax>
class TableAttention {
 public:
  /// @param layers  of the model, K and V equally wide
  /// @param windows  [layers][num_kv_heads]; Window::everything() for a retrieval head
  /// @throws ConfigError for windows that are not one a head or have a `from`, a layer with a
  ///   sliding_window (`windows` say it, head by head), widths without a kernel, groups of more
  ///   than 128, more than 128 KV heads, SoftmaxOptions that are more than Softmax has.
  /// @throws CudaError when memory cannot be allocated.
  TableAttention(std::span<const LayerShape> layers, std::span<const std::vector<Window>> windows,
                 const PageTableShape& tables)
      : tables_(tables),
        classes_(classes_of(layers, windows)),
        launches_(layers_of(layers, windows), tables.max_sequences),
        layout_(static_cast<std::size_t>(tables.max_sequences), classes_.size(), 0, 0),
        state_(layout_.total_bytes + classes_.size() * sizeof(WindowClass)) {
    require(cudaMemset(state_.data(), 0, state_.num_bytes()), "cudaMemset");
    require(cudaMemcpy(state_.data() + layout_.total_bytes, classes_.data(),
                       classes_.size() * sizeof(WindowClass), cudaMemcpyHostToDevice),
            "cudaMemcpy");
    require(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  }

  /// Bytes of device memory, all of it taken at construction.
  std::size_t device_bytes() const { return state_.num_bytes() + launches_.layout().total_bytes; }

  /// Cuts the step's work: row s of q and out is the newest token of sequence s, whose length
  /// counts it.
  /// @param lengths  [num_sequences] on the device
  cudaError_t plan_work(const std::int32_t* lengths, int num_sequences, cudaStream_t stream) {
    if (num_sequences < 0 || num_sequences > tables_.max_sequences) return cudaErrorInvalidValue;
    std::byte* base = state_.data();
    const auto num_classes = static_cast<int>(classes_.size());
    const int threads = std::max(1, num_sequences * num_classes);
    detail::describe_tables_kernel<>
        <<<static_cast<unsigned>((threads + 127) / 128), 128, 0, stream>>>(
            reinterpret_cast<StepHeader*>(base),
            reinterpret_cast<ChunkState*>(base + layout_.chunks),
            reinterpret_cast<ClassState*>(base + layout_.classes),
            reinterpret_cast<const WindowClass*>(base + layout_.total_bytes), num_classes, lengths,
            num_sequences, tables_.sequence_stride, tables_.head_stride);
    if (const cudaError_t e = cudaGetLastError(); e != cudaSuccess) return e;
    is_fresh_ = true;
    return launches_.plan_work(step({}), stream);
  }

  /// Attends one layer's newest tokens, all heads of all sequences in one launch.
  /// @param q    [sequences, num_qo_heads, dim], 16-byte aligned, strides multiples of 16 bytes
  /// @param out  [sequences, num_qo_heads, dim], likewise; may not overlap q
  /// @pre plan_work() was called since the lengths changed.
  cudaError_t decode(int layer, const PageTableView& pages, TensorView<const Io> q,
                     TensorView<Io> out, cudaStream_t stream) {
    const bool follows_plan = is_fresh_;
    is_fresh_ = false;
    return launches_.decode(step(pages), layer, q, out, stream, follows_plan);
  }

 private:
  static WindowClass window_class(const Window& window) {
    constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();
    if (!window.bounded()) return {0, static_cast<std::int32_t>(kMost)};
    return {static_cast<std::int32_t>(std::min(window.sink, kMost)),
            static_cast<std::int32_t>(std::min(window.recent, kMost))};
  }
  static int class_idx(const std::vector<WindowClass>& classes, const WindowClass& window) {
    const auto found = std::find_if(classes.begin(), classes.end(), [&](const WindowClass& c) {
      return c.sink == window.sink && c.recent == window.recent;
    });
    return static_cast<int>(found - classes.begin());
  }
  static std::vector<WindowClass> classes_of(std::span<const LayerShape> layers,
                                             std::span<const std::vector<Window>> windows) {
    if (windows.size() != layers.size()) {
      fail<ConfigError>(windows.size(), " layers of windows for ", layers.size(), " layers");
    }
    std::vector<WindowClass> classes;
    for (std::size_t l = 0; l < layers.size(); ++l) {
      const int num_heads = layers[l].num_kv_heads;
      if (windows[l].size() != static_cast<std::size_t>(num_heads) || num_heads > kMaxHeads ||
          layers[l].k_dim != layers[l].v_dim) {
        fail<ConfigError>("layer ", l, ": ", windows[l].size(), " windows for ", num_heads,
                          " KV heads of widths ", layers[l].k_dim, " and ", layers[l].v_dim,
                          "; at most ", kMaxHeads, " of equal widths");
      }
      if (layers[l].sliding_window != 0) {
        fail<ConfigError>("layer ", l,
                          ": windows are given for each head, sliding_window must be "
                          "0, got ",
                          layers[l].sliding_window);
      }
      for (const Window& window : windows[l]) {
        if (window.from != 0) {
          fail<ConfigError>("layer ", l,
                            ": windows from a length on are not on the device yet, "
                            "got from ",
                            window.from);
        }
        if (class_idx(classes, window_class(window)) == static_cast<int>(classes.size())) {
          classes.push_back(window_class(window));
        }
      }
    }
    return classes;
  }
  std::vector<DeviceLayer> layers_of(std::span<const LayerShape> layers,
                                     std::span<const std::vector<Window>> windows) const {
    std::vector<DeviceLayer> result;
    for (std::size_t l = 0; l < layers.size(); ++l) {
      DeviceLayer layer{layers[l], {}};
      for (int h = 0; h < layers[l].num_kv_heads; ++h) {
        const int i = layer.heads.num_heads++;
        layer.heads.idx_in_class[i] = h;  // tables lie head by head, whatever a head keeps
        layer.heads.kv_head[i] = static_cast<std::int16_t>(h);
        layer.heads.class_idx[i] = static_cast<std::int16_t>(
            class_idx(classes_, window_class(windows[l][static_cast<std::size_t>(h)])));
      }
      result.push_back(layer);
    }
    return result;
  }
  DeviceStep step(const PageTableView& pages) const {
    return {reinterpret_cast<const StepHeader*>(state_.data()),
            reinterpret_cast<const ChunkState*>(state_.data() + layout_.chunks),
            reinterpret_cast<const ClassState*>(state_.data() + layout_.classes),
            pages.page_table,
            pages.pages,
            pages.page_stride,
            static_cast<std::int32_t>(classes_.size()),
            tables_.max_sequences};
  }

  PageTableShape tables_;
  std::vector<WindowClass> classes_;
  LayerLaunches<Row, Dims, Io, Softmax> launches_;
  StepLayout layout_;
  DeviceMemory state_;
  bool is_fresh_ = false;  // no layer was decoded since plan_work()
};

}  // namespace headwise::inline v0::cuda
