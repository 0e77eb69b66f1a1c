// SPDX-License-Identifier: MIT
/// @file launches.cuh
/// LayerLaunches: the kernels of some layers over an open step, whoever described it.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

#include "headwise/attention/cuda/chunk_rule.cuh"
#include "headwise/attention/cuda/decode/decode.cuh"
#include "headwise/attention/cuda/decode/work.cuh"
#include "headwise/attention/cuda/head_dims.cuh"
#include "headwise/attention/cuda/prefill/prefill.cuh"
#include "headwise/attention/cuda/prefill/work.cuh"
#include "headwise/attention/cuda/softmax_kind.cuh"
#include "headwise/cache/cuda/append.cuh"
#include "headwise/cache/cuda/device.cuh"
#include "headwise/cache/cuda/elements.cuh"
#include "headwise/cache/cuda/fold.cuh"
#include "headwise/cache/cuda/fold_state.cuh"
#include "headwise/cache/cuda/step_state.cuh"
#include "headwise/core/check.hpp"
#include "headwise/core/shape.hpp"
#include "headwise/core/tensor_view.hpp"

namespace headwise::inline v0::cuda {

/// Query heads of a KV head that a prefill launch does; larger groups take several.
inline constexpr int kMostPrefillGroup = 64;

/// A layer as attention needs to know it.
struct DeviceLayer {
  LayerShape shape;               ///< as the model has it
  LayerHeads heads;               ///< its KV heads, those that keep most first
  bool has_compensation = false;  ///< whether some of them keep growing windows
  FoldedHeads folded;             ///< those' compensation rows, once they lie somewhere
};

/// Where launches keep what they share, in one allocation: from layers, sequences and a device's
/// limits alone, so that it can be planned before there is a device.
struct LaunchLayout {
  /// Of one kind of layer and size.
  struct Lists {
    std::size_t items = 0;       ///< offset, see DecodeWork
    std::size_t item_begin = 0;  ///< offset
    std::size_t pieces = 0;      ///< offset
    std::size_t places = 0;      ///< offset
    std::size_t workers = 0;     ///< offset
  };
  /// Tensors of a step's chunks, as rows are stored: of the widest layer.
  struct Converted {
    std::size_t q = 0;          ///< offset
    std::size_t k = 0;          ///< offset
    std::size_t v = 0;          ///< offset
    std::size_t out = 0;        ///< offset
    std::int64_t max_rows = 0;  ///< tokens that there is room for
  };

  /// Cut prefill work: lists of one kind, and the partial results that launches share.
  struct PrefillLists {
    std::size_t num_shares = 0;   ///< offset, see PrefillWork
    std::size_t first_piece = 0;  ///< offset
    std::size_t pieces = 0;       ///< offset
  };

  /// What a layer's query heads have of their own, an f32 each; nothing lies there where its
  /// SoftmaxOptions have none.
  struct HeadLogits {
    std::size_t sinks = 0;         ///< offset, see SoftmaxArgs
    std::size_t alibi_slopes = 0;  ///< offset
  };

  std::vector<LayerKind> kinds;             ///< different ones, each with every size in turn
  std::vector<int> kind_of_layer;           ///< [layers] the first size's
  std::vector<Lists> lists;                 ///< [kinds]
  std::vector<HeadLogits> head_logits;      ///< [layers]
  std::size_t block_partials = 0;           ///< offset
  std::size_t worker_floats = 0;            ///< of partial results, in the kind that has most
  std::size_t worker_partials = 0;          ///< offset
  std::size_t arrived = 0;                  ///< offset
  std::size_t next_tile = 0;                ///< offset
  std::size_t overflows = 0;                ///< offset
  std::size_t device_kinds = 0;             ///< offset
  std::size_t device_work = 0;              ///< offset
  Converted converted;                      ///< where q, k, v and out are of another type
  PrefillCut prefill_cut;                   ///< of no blocks where prefill work is never cut
  std::vector<PrefillKind> prefill_kinds;   ///< different ones
  std::vector<int> prefill_kind_of_layer;   ///< [layers]
  std::vector<PrefillLists> prefill_lists;  ///< [prefill kinds]
  std::size_t prefill_parts = 0;            ///< offset
  std::size_t prefill_arrived = 0;          ///< offset
  std::size_t device_prefill_kinds = 0;     ///< offset
  std::size_t device_prefill_work = 0;      ///< offset
  std::size_t total_bytes = 0;              ///< of the allocation
  int cut_items = 0;                        ///< whose places fit the cut's shared memory; 0: none
  std::size_t cut_bytes = 0;                ///< of shared memory that the cut takes

  /// @param max_converted_rows  tokens of a step with chunks, where they must be converted
  /// @param max_context  of a sequence with chunks; short ones are never cut
  /// @throws ConfigError for a head width that is not one of Dims, a group of more than 128, or a
  ///   softmax that has more than kernels of Softmax.
  template <class Dims, SoftmaxKind Softmax>
  static LaunchLayout of(std::span<const DeviceLayer> layers, int max_sequences,
                         const DeviceLimits& limits, std::int64_t max_converted_rows,
                         std::int64_t max_context) {
    LaunchLayout layout;
    int widest = 0;
    std::size_t q_elements = 0;
    std::size_t kv_elements = 0;
    for (std::size_t l = 0; l < layers.size(); ++l) {
      const LayerShape& shape = layers[l].shape;
      detail::check_softmax_kind<Softmax>(shape.softmax, layers[l].has_compensation,
                                          static_cast<int>(l));
      layout.add_layer<Dims>(layers[l], static_cast<int>(l), limits);
      layout.head_logits.push_back(
          {layout.section(shape.softmax.sinks.size() * sizeof(float)),
           layout.section(shape.softmax.alibi_slopes.size() * sizeof(float))});
      widest = std::max(widest, shape.k_dim);
      q_elements = std::max(q_elements, static_cast<std::size_t>(shape.num_qo_heads()) *
                                            static_cast<std::size_t>(shape.k_dim));
      kv_elements = std::max(kv_elements, static_cast<std::size_t>(shape.num_kv_heads) *
                                              static_cast<std::size_t>(shape.k_dim));
    }
    const auto blocks = static_cast<std::size_t>(limits.num_sms);
    layout.block_partials = layout.section(
        2 * blocks *
        static_cast<std::size_t>(detail::partial_floats(widest, DecodeSize::kMostRows)) *
        sizeof(float));
    layout.worker_partials = layout.section(layout.worker_floats * sizeof(float));
    layout.arrived = layout.section(kItemCounters * blocks * sizeof(unsigned));
    layout.next_tile = layout.section(sizeof(unsigned));
    layout.overflows = layout.section(sizeof(unsigned long long));
    int most_items = 0;
    for (const LayerKind& kind : layout.kinds) {
      const int kind_items = max_sequences * kind.num_heads * kind.rule.items_a_head(kind.size);
      most_items = std::max(most_items, kind_items);
      const auto items = static_cast<std::size_t>(kind_items);
      const auto pieces = static_cast<std::size_t>(DecodeWork::most_pieces(kind_items, kind.grid));
      Lists lists;
      lists.items = layout.section(items * sizeof(Piece));
      lists.item_begin = layout.section((items + 1) * sizeof(std::int32_t));
      lists.pieces = layout.section(pieces * sizeof(Piece));
      lists.places = layout.section(pieces * sizeof(std::int32_t));
      lists.workers =
          layout.section(static_cast<std::size_t>(kind.grid.num_workers()) * sizeof(WorkerWork));
      layout.lists.push_back(lists);
    }
    layout.cut_items = layout.fits(most_items) ? most_items : 0;
    if (layout.cut_items == 0) (void)layout.fits(0);
    layout.device_kinds = layout.section(layout.kinds.size() * sizeof(LayerKind));
    layout.device_work = layout.section(layout.kinds.size() * sizeof(DecodeWork));
    const auto rows = static_cast<std::size_t>(max_converted_rows);
    layout.converted.max_rows = max_converted_rows;
    for (std::size_t* offset : {&layout.converted.q, &layout.converted.out}) {
      *offset = layout.section(rows * q_elements * sizeof(std::uint16_t));
    }
    for (std::size_t* offset : {&layout.converted.k, &layout.converted.v}) {
      *offset = layout.section(rows * kv_elements * sizeof(std::uint16_t));
    }
    if (limits.chains_launches && max_context >= kLeastCutContext) {
      layout.add_prefill_cut(layers, limits);
    }
    return layout;
  }

 private:
  /// Longest context whose tiles are not worth cutting: partial results take 18 MiB of a device.
  static constexpr std::int64_t kLeastCutContext = 4096;

  std::size_t section(std::size_t size) {
    const std::size_t begin = total_bytes;
    total_bytes += (size + 255) / 256 * 256;
    return begin;
  }
  bool fits(int items) {
    cut_bytes = 0;
    for (const LayerKind& kind : kinds) {
      cut_bytes = std::max(cut_bytes, cut_decode_bytes(kind.grid, items));
    }
    // What every block may have without asking; the rest is for the kernel's own.
    return cut_bytes <= 48 * 1024 - 1024;
  }
  /// For layers that warpgroups attend.
  void add_prefill_cut(std::span<const DeviceLayer> layers, const DeviceLimits& limits) {
    prefill_cut.num_blocks = limits.num_sms;
    int widest = 0;
    for (const DeviceLayer& layer : layers) {
      PrefillKind kind;
      if (detail::has_warpgroup_kernel(layer.shape.k_dim) &&
          layer.shape.group_size <= kMostPrefillGroup) {
        widest = std::max(widest, layer.shape.k_dim);
        kind.num_heads = layer.heads.num_heads;
        kind.tile_tokens = detail::kGroupRows / layer.shape.group_size;
        kind.group_size = layer.shape.group_size;
        std::copy_n(layer.heads.class_idx, kind.num_heads, kind.class_idx);
      }
      const auto same = [&](const PrefillKind& other) {
        return std::memcmp(&kind, &other, sizeof kind) == 0;
      };
      const auto found = std::find_if(prefill_kinds.begin(), prefill_kinds.end(), same);
      prefill_kind_of_layer.push_back(static_cast<int>(found - prefill_kinds.begin()));
      if (found == prefill_kinds.end()) prefill_kinds.push_back(kind);
    }
    const auto parts = static_cast<std::size_t>(prefill_cut.most_parts());
    prefill_parts =
        section(parts * static_cast<std::size_t>(detail::part_float4s(widest)) * sizeof(float4));
    prefill_arrived = section(parts * detail::kGroupWarps * sizeof(unsigned));
    for (std::size_t k = 0; k < prefill_kinds.size(); ++k) {
      PrefillLists lists;
      lists.num_shares = section(sizeof(std::int32_t));
      lists.first_piece =
          section(static_cast<std::size_t>(prefill_cut.most_shares()) * sizeof(std::int32_t));
      lists.pieces =
          section(static_cast<std::size_t>(prefill_cut.most_pieces()) * sizeof(TilePiece));
      prefill_lists.push_back(lists);
    }
    device_prefill_kinds = section(prefill_kinds.size() * sizeof(PrefillKind));
    device_prefill_work = section(prefill_kinds.size() * sizeof(PrefillWork));
  }
  template <class Dims>
  void add_layer(const DeviceLayer& layer, int l, const DeviceLimits& limits) {
    std::array<DecodeKernel, DecodeSize::kCount> kernels;
    if (shape_sizes<Dims>(layer.shape.k_dim, limits, kernels) != cudaSuccess) {
      fail<ConfigError>("layer ", l, ": no device kernel for head width ", layer.shape.k_dim);
    }
    if (layer.shape.group_size > kMostGroup) {
      fail<ConfigError>("layer ", l, ": at most ", kMostGroup,
                        " query heads a KV head on a device, got ", layer.shape.group_size);
    }
    LayerKind kind;
    kind.num_heads = layer.heads.num_heads;
    kind.rule = rule_of(layer.shape.group_size, kernels);
    kind.grid = kernels[0].grid;
    std::copy_n(layer.heads.class_idx, kind.num_heads, kind.class_idx);
    std::copy_n(layer.heads.kv_head, kind.num_heads, kind.kv_head);
    const auto same = [&](const LayerKind& other) {
      return std::memcmp(&kind, &other, sizeof kind) == 0;
    };
    const auto found = std::find_if(kinds.begin(), kinds.end(), same);
    kind_of_layer.push_back(static_cast<int>(found - kinds.begin()));
    if (found != kinds.end()) return;
    for (int size = 0; size <= kind.rule.largest_size; ++size) {
      kind.size = size;
      kind.grid = kernels[static_cast<std::size_t>(size)].grid;
      const int floats = detail::partial_floats(layer.shape.k_dim, DecodeSize(size).rows);
      worker_floats = std::max(worker_floats, static_cast<std::size_t>(kind.grid.num_workers()) *
                                                  static_cast<std::size_t>(floats));
      kinds.push_back(kind);
    }
  }
  template <class Dims, int kSize = 0>
  static cudaError_t shape_sizes(int dim, const DeviceLimits& limits,
                                 std::array<DecodeKernel, DecodeSize::kCount>& kernels) {
    if constexpr (kSize < DecodeSize::kCount) {
      const cudaError_t e = shape_decode<kSize, Dims>(dim, limits, kernels[kSize]);
      return e != cudaSuccess ? e : shape_sizes<Dims, kSize + 1>(dim, limits, kernels);
    } else {
      return cudaSuccess;
    }
  }

 public:
  /// Who attends which chunk of a layer on a device.
  static ChunkRule rule_of(int group_size,
                           const std::array<DecodeKernel, DecodeSize::kCount>& kernels) {
    ChunkRule rule{group_size};
    while (rule.largest_size > 1 &&
           kernels[static_cast<std::size_t>(rule.largest_size)].grid.workers_per_block == 0) {
      --rule.largest_size;
    }
    return rule;
  }
};

/// Append, decode and prefill of some layers. All memory is taken at construction; every call is a
/// launch or two, and may be captured in a graph.
///
/// @tparam Row  what pages are made of.
/// @tparam Dims  head widths to compile kernels for.
/// @tparam Io  what q, k, v and out are made of. Keys, values and queries are rounded to Row, once;
///   decode writes what it has summed in f32. Prefill's outputs are rounded to Row first, and its
///   tensors pass through memory for `max_converted_rows` tokens where Io is not Row.
/// @tparam Softmax  what the kernels' softmax has besides a scale: nothing, learned sinks, or all
///   that SoftmaxOptions can say.
template <DeviceRow Row, class Dims = AllHeadDims, DeviceIo Io = Row,
          SoftmaxKind Softmax = PlainSoftmax>
class LayerLaunches {
 public:
  /// @param max_sequences  of any step.
  /// @param max_converted_rows  see above; 0 where Io is Row, or chunks never come.
  /// @param max_context  of a sequence that chunks come for; 0 where they never come.
  /// @throws ConfigError as LaunchLayout::of().
  /// @throws CudaError when memory cannot be allocated.
  LayerLaunches(std::span<const DeviceLayer> layers, int max_sequences,
                std::int64_t max_converted_rows = 0, std::int64_t max_context = 0)
      : limits_(DeviceLimits::current()),
        layout_(LaunchLayout::of<Dims, Softmax>(layers, max_sequences, limits_,
                                                std::same_as<Row, Io> ? 0 : max_converted_rows,
                                                max_context)),
        memory_(layout_.total_bytes) {
    std::byte* base = memory_.data();
    std::vector<DecodeWork> work;
    for (const LaunchLayout::Lists& l : layout_.lists) {
      work.push_back({reinterpret_cast<Piece*>(base + l.items),
                      reinterpret_cast<std::int32_t*>(base + l.item_begin),
                      reinterpret_cast<Piece*>(base + l.pieces),
                      reinterpret_cast<std::int32_t*>(base + l.places),
                      reinterpret_cast<WorkerWork*>(base + l.workers)});
    }
    std::vector<PrefillWork> prefill_work;
    for (const LaunchLayout::PrefillLists& l : layout_.prefill_lists) {
      prefill_work.push_back({reinterpret_cast<std::int32_t*>(base + l.num_shares),
                              reinterpret_cast<std::int32_t*>(base + l.first_piece),
                              reinterpret_cast<TilePiece*>(base + l.pieces),
                              reinterpret_cast<float4*>(base + layout_.prefill_parts),
                              reinterpret_cast<unsigned*>(base + layout_.prefill_arrived)});
    }
    for (std::size_t l = 0; l < layers.size(); ++l) {
      Layer layer{layers[l].shape, layers[l].heads, {}, {}, {}, {}, {}, {}};
      const int dim = layer.shape.k_dim;
      require(prepare_sizes(dim, limits_, layer.decode), "decode kernel");
      require(prepare_prefill<Row, Dims, Softmax>(dim, layer.prefill), "prefill kernel");
      layer.rule = LaunchLayout::rule_of(layer.shape.group_size, layer.decode);
      const auto kind = static_cast<std::size_t>(layout_.kind_of_layer[l]);
      std::copy_n(work.begin() + static_cast<std::ptrdiff_t>(kind), layer.rule.largest_size + 1,
                  layer.work.begin());
      if (cuts_prefill() && layer.prefill.cut_function != nullptr) {
        layer.prefill_work =
            prefill_work[static_cast<std::size_t>(layout_.prefill_kind_of_layer[l])];
      }
      layers_.push_back(layer);
    }
    require(cudaMemset(base, 0, layout_.total_bytes), "cudaMemset");
    for (std::size_t l = 0; l < layers.size(); ++l) {
      layers_[l].softmax = send(layers[l].shape.softmax, layout_.head_logits[l]);
      layers_[l].softmax.folded = layers[l].folded;
    }
    require(cudaMemcpy(base + layout_.device_kinds, layout_.kinds.data(),
                       layout_.kinds.size() * sizeof(LayerKind), cudaMemcpyHostToDevice),
            "cudaMemcpy");
    require(cudaMemcpy(base + layout_.device_work, work.data(), work.size() * sizeof(DecodeWork),
                       cudaMemcpyHostToDevice),
            "cudaMemcpy");
    if (cuts_prefill()) {
      require(
          cudaMemcpy(base + layout_.device_prefill_kinds, layout_.prefill_kinds.data(),
                     layout_.prefill_kinds.size() * sizeof(PrefillKind), cudaMemcpyHostToDevice),
          "cudaMemcpy");
      require(cudaMemcpy(base + layout_.device_prefill_work, prefill_work.data(),
                         prefill_work.size() * sizeof(PrefillWork), cudaMemcpyHostToDevice),
              "cudaMemcpy");
    }
    require(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  }

  /// Where everything lies.
  const LaunchLayout& layout() const& { return layout_; }
  const LaunchLayout& layout() const&& = delete;
  /// Layers there are.
  int num_layers() const { return static_cast<int>(layers_.size()); }
  /// As the model has it.
  const LayerShape& shape(int layer) const& { return at(layer).shape; }
  const LayerShape& shape(int layer) const&& = delete;

  /// Cuts the step's decode work into equal shares. One small launch; needed before decode.
  cudaError_t plan_work(const DeviceStep& step, cudaStream_t stream) const {
    return launch_chained(cut_decode_kernel<>, dim3(static_cast<unsigned>(layout_.kinds.size())),
                          dim3(detail::kCutThreads), layout_.cut_bytes, stream,
                          limits_.chains_launches, step, at<const LayerKind>(layout_.device_kinds),
                          at<const DecodeWork>(layout_.device_work), layout_.cut_items);
  }

  /// Cuts the step's prefill work where few tiles are long. One small launch; without it prefill
  /// attends tiles whole.
  cudaError_t plan_prefill(const DeviceStep& step, cudaStream_t stream) const {
    if (!cuts_prefill()) return cudaSuccess;
    return launch_chained(
        cut_prefill_kernel<>, dim3(static_cast<unsigned>(layout_.prefill_kinds.size())),
        dim3(detail::kCutPrefillThreads), detail::cut_prefill_bytes(layout_.prefill_cut), stream,
        limits_.chains_launches, step, at<const PrefillKind>(layout_.device_prefill_kinds),
        at<const PrefillWork>(layout_.device_prefill_work), layout_.prefill_cut);
  }

  /// Stores the step's K and V of one layer in their pages.
  /// @param most_rows  the most rows that one head of one sequence stores; 1 for decode.
  /// @param max_chunks  the most sequences that a replay of this launch may meet.
  cudaError_t append(const DeviceStep& step, int layer, TensorView<const Io> k,
                     TensorView<const Io> v, std::int64_t most_rows, std::int64_t max_chunks,
                     cudaStream_t stream) const {
    const Layer& of_layer = at(layer);
    return cuda::append<Row, Io>(step, of_layer.heads, bits(k), bits(v), of_layer.shape.k_dim,
                                 most_rows, max_chunks, at<unsigned long long>(layout_.overflows),
                                 limits_.chains_launches, stream);
  }

  /// Whether some heads of a layer keep growing windows.
  bool folds(int layer) const { return at(layer).softmax.folded.heads != nullptr; }
  /// Makes the compensation rows that the step asks for, of one layer whose K and V are stored.
  /// @param max_chunks  as append()'s.
  cudaError_t fold(const DeviceStep& step, int layer, std::int64_t max_chunks,
                   cudaStream_t stream) const {
    const Layer& of_layer = at(layer);
    return cuda::fold<Row>(step, of_layer.heads, of_layer.softmax.folded, of_layer.shape.k_dim,
                           max_chunks, stream);
  }

  /// Who attends which chunk of a layer.
  ChunkRule rule(int layer) const { return at(layer).rule; }

  /// Attends one layer's chunks of the sizes named, all heads in one launch a size.
  /// @param sizes  bit s: chunks that rule() says are decoded in items of size s
  /// @param k,v  the step's own rows; null where all chunks are single tokens that are stored
  /// @param stores  whether the launches store them, in a step that moves no ring; else append()
  /// does,
  ///   before or after.
  /// @pre the step's work was cut by plan_work().
  /// @param follows_plan  whether nothing but plan_work() comes before: the launch reads work
  /// before it
  ///   waits for the stream's last kernel, which must have waited for plan_work().
  cudaError_t decode(const DeviceStep& step, int layer, unsigned sizes, TensorView<const Io> q,
                     TensorView<const Io> k, TensorView<const Io> v, bool stores,
                     TensorView<Io> out, cudaStream_t stream, bool follows_plan = false) const {
    const Layer& of_layer = at(layer);
    DecodeArgs args{step,
                    {},
                    {at<float>(layout_.block_partials), at<unsigned>(layout_.arrived),
                     at<float>(layout_.worker_partials)},
                    rows_at(q),
                    rows_at(k),
                    rows_at(v),
                    rows_at(out),
                    of_layer.shape.group_size,
                    of_layer.shape.scale() * kLog2E,
                    stores,
                    at<unsigned long long>(layout_.overflows),
                    {},
                    of_layer.softmax};
    for (int i = 0; i < of_layer.heads.num_heads; ++i) {
      args.idx_in_class[of_layer.heads.kv_head[i]] = of_layer.heads.idx_in_class[i];
    }
    cudaError_t e = cudaSuccess;
    for (std::size_t s = 0; s < of_layer.decode.size() && e == cudaSuccess; ++s) {
      if ((sizes >> s & 1U) == 0) continue;
      args.work = of_layer.work[s];
      e = cuda::decode(args, of_layer.decode[s], limits_.chains_launches && !follows_plan, stream);
      follows_plan = false;
    }
    return e;
  }
  /// As above for single tokens alone, which are stored.
  cudaError_t decode(const DeviceStep& step, int layer, TensorView<const Io> q, TensorView<Io> out,
                     cudaStream_t stream, bool follows_plan = false) const {
    return decode(step, layer, 1U << rule(layer).decode_size(1), q, {}, {}, false, out, stream,
                  follows_plan);
  }

  /// Tiles that a chunk is cut into; the sum over a step is what prefill() takes.
  std::int64_t num_tiles(int layer, std::int64_t num_tokens) const {
    const int group = at(layer).shape.group_size;
    return is_prefilled(num_tokens, group)
               ? at(layer).prefill.num_tiles(num_tokens, group_share(group))
               : 0;
  }
  /// Whether prefill() can take a step of so many rows.
  bool can_convert(std::int64_t num_rows) const {
    return std::same_as<Row, Io> || num_rows <= layout_.converted.max_rows;
  }
  /// Rows of a step.
  struct RowRange {
    std::int64_t first = 0;  ///< the first row
    std::int64_t count = 0;  ///< rows
  };
  /// Attends chunks that are not decode's, before or after append.
  /// @param num_rows  of the step, all sequences.
  /// @param chunks  the rows of chunks, which alone are written to `out`.
  /// @param is_planned  whether plan_prefill() has cut this step's work.
  /// @return cudaErrorInvalidValue for more rows than can be converted.
  cudaError_t prefill(const DeviceStep& step, int layer, std::int64_t tiles, std::int64_t num_rows,
                      std::span<const RowRange> chunks, TensorView<const Io> q,
                      TensorView<const Io> k, TensorView<const Io> v, TensorView<Io> out,
                      cudaStream_t stream, bool is_planned = false) const {
    const Layer& of_layer = at(layer);
    PrefillArgs args{step,
                     of_layer.heads,
                     {},
                     {},
                     {},
                     {},
                     at<unsigned>(layout_.next_tile),
                     of_layer.shape.group_size,
                     of_layer.shape.scale() * kLog2E,
                     {},
                     of_layer.softmax};
    if (is_planned && tiles * of_layer.heads.num_heads <= layout_.prefill_cut.most_tiles()) {
      args.work = of_layer.prefill_work;
    }
    if constexpr (std::same_as<Row, Io>) {
      args.q = bits(q);
      args.k = bits(k);
      args.v = bits(v);
      args.out = bits(out);
      return prefill_heads(args, of_layer, tiles, stream);
    } else {
      if (!can_convert(num_rows)) return cudaErrorInvalidValue;
      const int dim = of_layer.shape.k_dim;
      const int qo_heads = of_layer.shape.num_qo_heads();
      const int kv_heads = of_layer.shape.num_kv_heads;
      const auto dense = [&](std::size_t offset, int heads) {
        return TensorView<std::uint16_t>::nhd(at<std::uint16_t>(offset), heads, dim);
      };
      const auto convert = [&](TensorView<const Io> from, std::size_t offset, int heads,
                               TensorView<const std::uint16_t>& to) {
        const TensorView<std::uint16_t> place_of_it = dense(offset, heads);
        to = place_of_it;
        return convert_rows<Row, Io>({place_of_it.data, place_of_it.stride_n, place_of_it.stride_h},
                                     rows_at(from), num_rows, heads, dim, stream);
      };
      cudaError_t e = convert(q, layout_.converted.q, qo_heads, args.q);
      if (e == cudaSuccess) e = convert(k, layout_.converted.k, kv_heads, args.k);
      if (e == cudaSuccess) e = convert(v, layout_.converted.v, kv_heads, args.v);
      args.out = dense(layout_.converted.out, qo_heads);
      if (e == cudaSuccess) e = prefill_heads(args, of_layer, tiles, stream);
      for (const RowRange& rows : chunks) {
        if (e != cudaSuccess) break;
        e = convert_rows<Io, Row>(
            {out.data + rows.first * out.stride_n, out.stride_n, out.stride_h},
            {args.out.data + rows.first * args.out.stride_n, args.out.stride_n, args.out.stride_h},
            rows.count, qo_heads, dim, stream);
      }
      return e;
    }
  }

  /// Reads how many elements of k and v were finite as given and are infinite as stored, in all
  /// steps so far; waits for the stream. Always 0 where Io is Row.
  cudaError_t overflows(std::int64_t& count, cudaStream_t stream) const {
    unsigned long long on_device = 0;
    if (const cudaError_t e = cudaMemcpyAsync(&on_device, at<unsigned long long>(layout_.overflows),
                                              sizeof on_device, cudaMemcpyDeviceToHost, stream);
        e != cudaSuccess) {
      return e;
    }
    const cudaError_t e = cudaStreamSynchronize(stream);
    count = static_cast<std::int64_t>(on_device);
    return e;
  }

 private:
  struct Layer {
    LayerShape shape;
    LayerHeads heads;
    ChunkRule rule;
    std::array<DecodeWork, DecodeSize::kCount> work;
    std::array<DecodeKernel, DecodeSize::kCount> decode;
    PrefillKernel prefill;
    PrefillWork prefill_work;  // none where tiles are never cut
    SoftmaxArgs softmax;
  };

  /// Copies to the device what query heads have of their own.
  SoftmaxArgs send(const SoftmaxOptions& options, const LaunchLayout::HeadLogits& places) const {
    const auto sent = [&](const std::vector<float>& values, std::size_t place) {
      if (values.empty()) return static_cast<const float*>(nullptr);
      const std::vector<float> logits = detail::in_log2(values);
      require(cudaMemcpy(at<float>(place), logits.data(), logits.size() * sizeof(float),
                         cudaMemcpyHostToDevice),
              "cudaMemcpy");
      return static_cast<const float*>(at<float>(place));
    };
    const float cap = detail::in_log2(options.soft_cap);
    return {cap,
            cap > 0.0F ? 1.0F / cap : 0.0F,
            sent(options.sinks, places.sinks),
            sent(options.alibi_slopes, places.alibi_slopes),
            {}};
  }

  bool cuts_prefill() const { return !layout_.prefill_lists.empty(); }

  /// Query heads of a KV head that prefill does at a time: it takes up to 64.
  static int group_share(int group_size) {
    const int shares = (group_size + kMostPrefillGroup - 1) / kMostPrefillGroup;
    return (group_size + shares - 1) / shares;
  }
  /// All heads in one launch; a share of one KV head's group in one where it is larger than that.
  cudaError_t prefill_heads(const PrefillArgs& args, const Layer& layer, std::int64_t tiles,
                            cudaStream_t stream) const {
    const int share = group_share(args.group_size);
    if (share == args.group_size) {
      return cuda::prefill(args, layer.prefill, tiles, limits_.num_sms, stream);
    }
    cudaError_t e = cudaSuccess;
    for (int i = 0; i < layer.heads.num_heads; ++i) {
      const int kv_head = layer.heads.kv_head[i];
      for (int begin = 0; begin < args.group_size && e == cudaSuccess; begin += share) {
        // All shares alike, so that all kernels see the same chunks: the last one may do a head
        // again.
        const int first = std::min(begin, args.group_size - share);
        PrefillArgs part = args;
        part.heads = {
            1, {layer.heads.idx_in_class[i]}, {layer.heads.kv_head[i]}, {layer.heads.class_idx[i]}};
        part.group_size = share;
        // Prefill looks for query heads from kv_head x group_size on.
        const std::int64_t head = kv_head * (args.group_size - share) + first;
        part.q.data += head * args.q.stride_h;
        part.out.data += head * args.out.stride_h;
        part.softmax = args.softmax.from_head(head);
        e = cuda::prefill(part, layer.prefill, tiles, limits_.num_sms, stream);
      }
    }
    return e;
  }

  template <int kSize = 0>
  static cudaError_t prepare_sizes(int dim, const DeviceLimits& limits,
                                   std::array<DecodeKernel, DecodeSize::kCount>& kernels) {
    if constexpr (kSize < DecodeSize::kCount) {
      const cudaError_t e =
          prepare_decode<kSize, Row, Dims, Io, Softmax>(dim, limits, kernels[kSize]);
      return e != cudaSuccess ? e : prepare_sizes<kSize + 1>(dim, limits, kernels);
    } else {
      return cudaSuccess;
    }
  }

  static TensorView<const Bits<Io>> bits(TensorView<const Io> x) {
    return {reinterpret_cast<const Bits<Io>*>(x.data), x.stride_n, x.stride_h};
  }
  static TensorView<Bits<Io>> bits(TensorView<Io> x) {
    return {reinterpret_cast<Bits<Io>*>(x.data), x.stride_n, x.stride_h};
  }
  static RowsAt<const void*> rows_at(TensorView<const Io> x) {
    return {x.data, x.stride_n, x.stride_h};
  }
  static RowsAt<void*> rows_at(TensorView<Io> x) { return {x.data, x.stride_n, x.stride_h}; }

  const Layer& at(int layer) const { return layers_[static_cast<std::size_t>(layer)]; }
  template <class T>
  T* at(std::size_t offset) const {
    return reinterpret_cast<T*>(memory_.data() + offset);
  }

  DeviceLimits limits_;
  LaunchLayout layout_;
  DeviceMemory memory_;
  std::vector<Layer> layers_;
};

}  // namespace headwise::inline v0::cuda
