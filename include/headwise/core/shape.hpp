// SPDX-License-Identifier: MIT
/// @file shape.hpp
/// The attention geometry of a model, layer by layer.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "headwise/core/check.hpp"
#include "headwise/core/checked.hpp"

namespace headwise::inline v0 {

/// Limits of a model, a few hundred times what the largest open ones have (126 layers, 128 query
/// heads, widths of 576): what is multiplied from them, in elements of a row or in heads, fits an
/// int with room to spare, and a damaged number is told from a model.
inline constexpr int kMaxLayers = 1 << 16;
/// KV heads or query heads of one layer; see kMaxLayers.
inline constexpr int kMaxHeads = 1 << 16;
/// KV heads or query heads of all layers; see kMaxLayers.
inline constexpr int kMaxModelHeads = 1 << 24;
/// Width of a K or V row, in elements; see kMaxLayers.
inline constexpr int kMaxDim = 1 << 16;

/// One attention layer. Query head `h` is served by KV head `h / group_size`.
struct LayerShape {
  int num_kv_heads = 0;   ///< units of storage and of policy
  int group_size = 1;     ///< query heads per KV head
  int k_dim = 0;          ///< width of a K row (head_dim), a multiple of 16
  int v_dim = 0;          ///< width of a V row, a multiple of 16
  float sm_scale = 0.0F;  ///< factor on q.k, finite; 0 means 1 / sqrt(k_dim)

  constexpr int num_qo_heads() const { return num_kv_heads * group_size; }
  /// The factor on q.k that attention uses: sm_scale, or what its 0 means.
  float scale() const {
    return sm_scale != 0.0F ? sm_scale : 1.0F / std::sqrt(static_cast<float>(k_dim));
  }
  friend bool operator==(const LayerShape&, const LayerShape&) = default;
};

/// All attention layers of a model; they need not be alike.
class ModelShape {
 public:
  /// Widths are stored in strips of 16 elements (one AVX-512 register of floats).
  static constexpr int kDimMultiple = 16;

  /// @throws ConfigError for a model without layers, a layer without KV heads (latent caches such
  ///   as MLA have none, a head-wise plan has nothing to decide there), a group below 1, a width
  ///   that is not a positive multiple of 16 (a model's own such width is padded with zeros, see
  ///   below), an sm_scale that is not finite, or what lies beyond kMaxLayers and its sisters.
  ///
  /// Rows of another width, 100 say, are padded with zeros to the next multiple, 112: zeros add
  /// nothing to q.k, and the columns of out beyond the model's own are zero. The scale then is the
  /// model's: sm_scale = 1 / sqrt(100).
  explicit ModelShape(std::vector<LayerShape> layers) : layers_(std::move(layers)) {
    if (layers_.empty()) fail<ConfigError>("a model needs at least one layer, got 0");
    detail::checked_range(layers_.size(), 1, kMaxLayers, "num_layers");
    std::int64_t num_qo_heads = 0;
    for (std::size_t i = 0; i < layers_.size(); ++i) {
      check(layers_[i], i);
      num_qo_heads += layers_[i].num_qo_heads();
    }
    detail::checked_range(num_qo_heads, 1, kMaxModelHeads, "query heads of all layers");
  }

  /// `num_layers` equal layers.
  /// @throws ConfigError additionally when `num_kv_heads` does not divide `num_qo_heads`.
  static ModelShape uniform(int num_layers, int num_qo_heads, int num_kv_heads, int head_dim) {
    detail::checked_range(num_layers, 1, kMaxLayers, "num_layers");
    detail::checked_range(num_qo_heads, 1, kMaxHeads, "num_qo_heads");
    if (num_kv_heads < 1 || num_qo_heads % num_kv_heads != 0) {
      fail<ConfigError>("num_kv_heads (", num_kv_heads, ") must divide num_qo_heads (",
                        num_qo_heads, ")");
    }
    const LayerShape layer{num_kv_heads, num_qo_heads / num_kv_heads, head_dim, head_dim};
    return ModelShape(std::vector<LayerShape>(static_cast<std::size_t>(num_layers), layer));
  }

  int num_layers() const { return static_cast<int>(layers_.size()); }
  /// Layer `i`, in [0, num_layers()).
  const LayerShape& layer(int i) const& {
    HEADWISE_ASSERT(i >= 0 && i < num_layers(), "layer out of range");
    return layers_[static_cast<std::size_t>(i)];
  }
  /// A copy: the shape is gone at the end of the expression.
  LayerShape layer(int i) const&& {
    const ModelShape& self = *this;
    return self.layer(i);
  }
  /// All layers, the first one first.
  std::span<const LayerShape> layers() const& { return layers_; }
  std::span<const LayerShape> layers() const&& = delete;  ///< would outlive the shape

  friend bool operator==(const ModelShape&, const ModelShape&) = default;

 private:
  static void check(const LayerShape& layer, std::size_t i) {
    if (layer.num_kv_heads < 1) {
      fail<ConfigError>("layer ", i, ": num_kv_heads must be at least 1, got ", layer.num_kv_heads,
                        " (latent caches without KV heads cannot be planned head by head)");
    }
    if (layer.group_size < 1) {
      fail<ConfigError>("layer ", i, ": group_size must be at least 1, got ", layer.group_size);
    }
    if (layer.num_kv_heads > kMaxHeads / layer.group_size) {
      fail<ConfigError>("layer ", i, ": num_kv_heads * group_size must be at most ", kMaxHeads,
                        " query heads, got ", layer.num_kv_heads, " * ", layer.group_size);
    }
    check_width(layer.k_dim, layer.k_dim, i);
    check_width(layer.v_dim, layer.k_dim, i);
    constexpr std::uint32_t kExponent = 0x7F800000U;  // by its bits: -ffast-math knows no NaN
    if ((std::bit_cast<std::uint32_t>(layer.sm_scale) & kExponent) == kExponent) {
      fail<ConfigError>("layer ", i, ": sm_scale must be finite, got ", layer.sm_scale);
    }
  }

  static void check_width(int dim, int k_dim, std::size_t i) {
    if (dim < 1 || dim > kMaxDim) {
      fail<ConfigError>("layer ", i, ": K and V widths must be positive multiples of ",
                        kDimMultiple, " up to ", kMaxDim, ", got ", dim);
    }
    if (dim % kDimMultiple != 0) {
      const int padded = (dim / kDimMultiple + 1) * kDimMultiple;
      fail<ConfigError>("layer ", i, ": K and V widths must be positive multiples of ",
                        kDimMultiple, ", got ", dim, "; pad rows with zeros to ", padded,
                        " and set sm_scale to the model's own factor, 1 / sqrt(", k_dim,
                        ") where it has no other");
    }
  }

  std::vector<LayerShape> layers_;
};

}  // namespace headwise::inline v0
