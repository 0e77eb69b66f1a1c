// SPDX-License-Identifier: MIT
/// @file attend.cuh
/// DeviceAttention: attends the layers of a DeviceCache's steps, prompt or decode.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "headwise/attention/cuda/decode/decode.cuh"
#include "headwise/attention/cuda/decode/work.cuh"
#include "headwise/attention/cuda/head_dims.cuh"
#include "headwise/attention/cuda/prefill/prefill.cuh"
#include "headwise/cache/cuda/append.cuh"
#include "headwise/cache/cuda/device.cuh"
#include "headwise/cache/cuda/device_cache.cuh"
#include "headwise/core/tensor_view.hpp"

namespace headwise::inline v0::cuda {

/// Which of a layer's heads a call attends: an engine may keep its own kernel for the dense ones.
enum class HeadsWanted : std::uint8_t { kAll, kRetrieval, kStreaming };

/// Attention over one DeviceCache. Allocates everything at construction.
///
///     cache.begin(step, chunks, phase, stream);
///     attention.plan(stream); // once a step: cuts the decode work
///     attention.attend(step, layer, q, k, v, out, stream); // once a layer
///     cache.commit(step);
///
/// plan and attend may be captured in a graph, for steps of one token a sequence: a replay follows
/// begin, reads what it sent and is followed by commit_replayed. q, k, v and out then need room for
/// max_sequences rows, and may not move.
///
/// @tparam Dims  head widths to compile kernels for.
template <DeviceRow Row, class Dims = AllHeadDims>
class DeviceAttention {
 public:
  /// @throws ConfigError for a head width that is not one of Dims.
  /// @throws CudaError when memory cannot be allocated.
  explicit DeviceAttention(const DeviceCache<Row>& cache)
      : cache_(cache), limits_(DeviceLimits::current()) {
    for (int l = 0; l < static_cast<int>(cache.geometry().layers().size()); ++l) add_layer(l);
    allocate();
  }

  /// Bytes of device memory, all of it taken at construction.
  std::size_t device_bytes() const { return memory_.num_bytes(); }

  /// Cuts the step's decode work into equal shares. One small launch; needed before attend wherever
  /// a sequence of the step has one new token.
  cudaError_t plan(cudaStream_t stream) const {
    return launch_chained(cut_decode_kernel<>, dim3(static_cast<unsigned>(kinds_.size())),
                          dim3(detail::kCutThreads), cut_bytes_, stream, limits_.chains_launches,
                          cache_.device_step(), device_kinds_, device_work_, cut_items_);
  }

  /// Stores the step's K and V of one layer and attends its queries: sequences of one new token in
  /// one launch over all heads, chunks in another.
  /// @param q    [rows, num_qo_heads, dim], 16-byte aligned, strides multiples of 8 elements
  /// @param k,v  [rows, num_kv_heads, dim], likewise; keys after RoPE
  /// @param out  [rows, num_qo_heads, dim], likewise; may not overlap the others
  cudaError_t attend(const Step& step, int layer, TensorView<const Row> q, TensorView<const Row> k,
                     TensorView<const Row> v, TensorView<Row> out, cudaStream_t stream) const {
    HEADWISE_ASSERT(cache_.is_open(step), "attend needs an open step");
    if (const cudaError_t e = append(step, layer, k, v, stream); e != cudaSuccess) return e;
    const auto entries = step.entries();
    const auto is_one = [](const StepEntry& entry) { return entry.num_tokens() == 1; };
    const auto is_chunk = [](const StepEntry& entry) { return entry.num_tokens() > 1; };
    if (std::any_of(entries.begin(), entries.end(), is_one)) {
      if (const cudaError_t e = decode(layer, q, out, stream); e != cudaSuccess) return e;
    }
    if (std::any_of(entries.begin(), entries.end(), is_chunk)) {
      return prefill(step, layer, q, k, v, out, HeadsWanted::kAll, stream);
    }
    return cudaSuccess;
  }

  /// Stores the step's K and V of one layer in their pages.
  cudaError_t append(const Step& step, int layer, TensorView<const Row> k, TensorView<const Row> v,
                     cudaStream_t stream) const {
    const Layer& place = layers_[static_cast<std::size_t>(layer)];
    const std::int64_t most_rows = cache_.most_appended_rows(step);
    // A graph of one-token steps is captured once for every batch size.
    const std::int64_t most_entries = most_rows <= 1
                                          ? cache_.geometry().options().max_sequences
                                          : static_cast<std::int64_t>(step.entries().size());
    cache_.note_attended(step, layer, place.heads.num_heads);
    return cuda::append(cache_.device_step(), place.heads, bits(k), bits(v), place.dim,
                        std::max<std::int64_t>(most_rows, 1), most_entries, limits_.chains_launches,
                        stream);
  }

  /// The decode launch alone, for sequences of one new token whose rows are appended.
  cudaError_t decode(int layer, TensorView<const Row> q, TensorView<Row> out,
                     cudaStream_t stream) const {
    const Layer& place = layers_[static_cast<std::size_t>(layer)];
    const DecodeArgs args{
        cache_.device_step(), place.work,          scratch_, bits(q), bits(out), place.table_offset,
        place.group_size,     place.scale * kLog2E};
    return cuda::decode(args, place.decode, limits_.chains_launches, stream);
  }

  /// The prefill launch alone, for sequences of more than one new token; before or after append.
  /// Heads that are not wanted are left as they are in `out`.
  cudaError_t prefill(const Step& step, int layer, TensorView<const Row> q, TensorView<const Row> k,
                      TensorView<const Row> v, TensorView<Row> out, HeadsWanted wanted,
                      cudaStream_t stream) const {
    const Layer& place = layers_[static_cast<std::size_t>(layer)];
    PrefillArgs args{
        cache_.device_step(), place.heads,         bits(q), bits(k), bits(v), bits(out), next_tile_,
        place.group_size,     place.scale * kLog2E};
    if (wanted != HeadsWanted::kAll) {
      args.heads = cache_.layer_heads(layer, [&](const HeadStore& store) {
        return std::holds_alternative<RetrievalStore>(store) == (wanted == HeadsWanted::kRetrieval);
      });
    }
    std::int64_t tiles = 0;
    for (const StepEntry& entry : step.entries()) {
      tiles += place.prefill.num_tiles(entry.num_tokens(), place.group_size);
    }
    return cuda::prefill(args, place.prefill, tiles, limits_.num_sms, stream);
  }

 private:
  struct Layer {
    LayerHeads heads;
    DecodeWork work;
    DecodeKernel decode;
    PrefillKernel prefill;
    std::int64_t table_offset = 0;
    int kind = 0;
    int dim = 0;
    int group_size = 1;
    float scale = 1.0F;
  };

  static TensorView<const std::uint16_t> bits(TensorView<const Row> x) {
    return {reinterpret_cast<const std::uint16_t*>(x.data), x.stride_n, x.stride_h};
  }
  static TensorView<std::uint16_t> bits(TensorView<Row> x) {
    return {reinterpret_cast<std::uint16_t*>(x.data), x.stride_n, x.stride_h};
  }

  void add_layer(int l) {
    const LayerShape& shape = cache_.geometry().layers()[static_cast<std::size_t>(l)].shape;
    if (!Dims::contains(shape.k_dim)) {
      fail<ConfigError>("layer ", l, ": no device kernel for head width ", shape.k_dim);
    }
    Layer layer{cache_.layer_heads(l),
                {},
                {},
                {},
                cache_.geometry().head(l, 0).table_offset,
                0,
                shape.k_dim,
                shape.group_size,
                shape.scale()};
    require(prepare_decode<Row, Dims>(shape.k_dim, limits_, layer.decode), "decode kernel");
    require(prepare_prefill<Row, Dims>(shape.k_dim, layer.prefill), "prefill kernel");
    LayerKind kind;
    kind.num_heads = layer.heads.num_heads;
    kind.query_tiles = (shape.group_size + kItemQueries - 1) / kItemQueries;
    kind.grid = layer.decode.grid;
    for (int i = 0; i < kind.num_heads; ++i) {
      kind.class_idx[i] = layer.heads.class_idx[i];
      kind.kv_head[i] = layer.heads.kv_head[i];
      kind.table_offset[i] =
          layer.heads.table_offset[i] - static_cast<std::int32_t>(layer.table_offset);
    }
    const auto same = [&](const LayerKind& other) {
      return std::memcmp(&kind, &other, sizeof kind) == 0;
    };
    const auto found = std::find_if(kinds_.begin(), kinds_.end(), same);
    layer.kind = static_cast<int>(found - kinds_.begin());
    if (found == kinds_.end()) kinds_.push_back(kind);
    widest_ = std::max(widest_, shape.k_dim);
    layers_.push_back(layer);
  }

  /// One allocation: partial results and counters, then each kind's lists, then the kinds and lists
  /// themselves.
  void allocate() {
    const auto blocks = static_cast<std::size_t>(limits_.num_sms);
    const std::size_t partial =
        static_cast<std::size_t>(detail::partial_floats(widest_)) * sizeof(float);
    std::size_t bytes = 0;
    const auto section = [&](std::size_t size) {
      const std::size_t begin = bytes;
      bytes += (size + 255) / 256 * 256;
      return begin;
    };
    const std::size_t block_partials = section(2 * blocks * partial);
    const std::size_t arrived = section(blocks * sizeof(unsigned));
    const std::size_t next_tile = section(sizeof(unsigned));
    struct Lists {
      std::size_t items, item_begin, pieces, places, warps;
    };
    std::vector<Lists> lists;
    int most_items = 0;
    for (const LayerKind& kind : kinds_) {
      const int kind_items =
          cache_.geometry().options().max_sequences * kind.num_heads * kind.query_tiles;
      most_items = std::max(most_items, kind_items);
      const auto items = static_cast<std::size_t>(kind_items);
      const auto pieces = static_cast<std::size_t>(DecodeWork::most_pieces(kind_items, kind.grid));
      lists.push_back(
          {section(items * sizeof(Piece)), section((items + 1) * sizeof(std::int32_t)),
           section(pieces * sizeof(Piece)), section(pieces * sizeof(std::int32_t)),
           section(static_cast<std::size_t>(kind.grid.num_workers()) * sizeof(WarpWork))});
    }
    const auto fits = [&](int items) {
      cut_bytes_ = 0;
      for (const LayerKind& kind : kinds_) {
        cut_bytes_ = std::max(cut_bytes_, cut_decode_bytes(kind.grid, items));
      }
      // What every block may have without asking; the rest is for the kernel's own.
      return cut_bytes_ <= 48 * 1024 - 1024;
    };
    cut_items_ = fits(most_items) ? most_items : 0;
    if (cut_items_ == 0) (void)fits(0);
    const std::size_t kinds = section(kinds_.size() * sizeof(LayerKind));
    const std::size_t work = section(kinds_.size() * sizeof(DecodeWork));

    memory_ = DeviceMemory(bytes);
    std::byte* base = memory_.data();
    scratch_ = {reinterpret_cast<float*>(base + block_partials),
                reinterpret_cast<unsigned*>(base + arrived)};
    next_tile_ = reinterpret_cast<unsigned*>(base + next_tile);
    std::vector<DecodeWork> host_work;
    for (const Lists& l : lists) {
      host_work.push_back({reinterpret_cast<Piece*>(base + l.items),
                           reinterpret_cast<std::int32_t*>(base + l.item_begin),
                           reinterpret_cast<Piece*>(base + l.pieces),
                           reinterpret_cast<std::int32_t*>(base + l.places),
                           reinterpret_cast<WarpWork*>(base + l.warps)});
    }
    for (Layer& layer : layers_) layer.work = host_work[static_cast<std::size_t>(layer.kind)];
    device_kinds_ = reinterpret_cast<const LayerKind*>(base + kinds);
    device_work_ = reinterpret_cast<const DecodeWork*>(base + work);
    require(cudaMemset(base, 0, bytes), "cudaMemset");
    require(cudaMemcpy(base + kinds, kinds_.data(), kinds_.size() * sizeof(LayerKind),
                       cudaMemcpyHostToDevice),
            "cudaMemcpy");
    require(cudaMemcpy(base + work, host_work.data(), host_work.size() * sizeof(DecodeWork),
                       cudaMemcpyHostToDevice),
            "cudaMemcpy");
    require(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  }

  const DeviceCache<Row>& cache_;
  DeviceLimits limits_;
  std::vector<Layer> layers_;
  std::vector<LayerKind> kinds_;
  int widest_ = 0;
  DeviceMemory memory_;
  DecodeScratch scratch_;
  unsigned* next_tile_ = nullptr;
  int cut_items_ = 0;
  std::size_t cut_bytes_ = 0;
  const LayerKind* device_kinds_ = nullptr;
  const DecodeWork* device_work_ = nullptr;
};

}  // namespace headwise::inline v0::cuda
