// SPDX-License-Identifier: MIT
/// @file shape.hpp
/// The attention geometry of a model, layer by layer.
#pragma once

#include <cmath>
#include <cstddef>
#include <span>
#include <vector>

#include "headwise/core/check.hpp"

namespace headwise::inline v0 {

/// One attention layer. Query head `h` is served by KV head `h / group_size`.
struct LayerShape {
  int num_kv_heads = 0;   ///< units of storage and of policy
  int group_size = 1;     ///< query heads per KV head
  int k_dim = 0;          ///< width of a K row (head_dim), a multiple of 16
  int v_dim = 0;          ///< width of a V row, a multiple of 16
  float sm_scale = 0.0F;  ///< factor on q.k; 0 means 1 / sqrt(k_dim)

  /// Query heads, which are also output heads.
  constexpr int num_qo_heads() const { return num_kv_heads * group_size; }
  /// The factor on q.k that attention uses.
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
  ///   as MLA have none, a head-wise plan has nothing to decide there), a group below 1, or a width
  ///   that is not a positive multiple of 16.
  explicit ModelShape(std::vector<LayerShape> layers) : layers_(std::move(layers)) {
    if (layers_.empty()) fail<ConfigError>("a model needs at least one layer, got 0");
    for (std::size_t i = 0; i < layers_.size(); ++i) check(layers_[i], i);
  }

  /// `num_layers` equal layers.
  /// @throws ConfigError additionally when `num_kv_heads` does not divide `num_qo_heads`.
  static ModelShape uniform(int num_layers, int num_qo_heads, int num_kv_heads, int head_dim) {
    if (num_layers < 1) fail<ConfigError>("num_layers must be at least 1, got ", num_layers);
    if (num_kv_heads < 1 || num_qo_heads % num_kv_heads != 0) {
      fail<ConfigError>("num_kv_heads (", num_kv_heads, ") must divide num_qo_heads (",
                        num_qo_heads, ")");
    }
    const LayerShape layer{num_kv_heads, num_qo_heads / num_kv_heads, head_dim, head_dim};
    return ModelShape(std::vector<LayerShape>(static_cast<std::size_t>(num_layers), layer));
  }

  /// Attention layers.
  int num_layers() const { return static_cast<int>(layers_.size()); }
  /// Layer `i`, in [0, num_layers()).
  const LayerShape& layer(int i) const { return layers_[static_cast<std::size_t>(i)]; }
  /// All layers, the first one first.
  std::span<const LayerShape> layers() const { return layers_; }

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
    for (const int dim : {layer.k_dim, layer.v_dim}) {
      if (dim < kDimMultiple || dim % kDimMultiple != 0) {
        fail<ConfigError>("layer ", i, ": K and V widths must be positive multiples of ",
                          kDimMultiple, ", got ", dim);
      }
    }
  }

  std::vector<LayerShape> layers_;
};

}  // namespace headwise::inline v0
