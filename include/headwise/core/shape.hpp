// SPDX-License-Identifier: MIT
/// @file shape.hpp
/// The attention geometry of a model, layer by layer.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <span>
#include <utility>
#include <vector>

#include "headwise/core/bits.hpp"
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

/// What a layer's softmax has besides its scale. The score of a query at position `i` and a key at
/// `j` is `capped(scale * q.k) + slope * (j - i)`.
struct SoftmaxOptions {
  /// Scores are capped by soft_cap * tanh(score / soft_cap) (Gemma 2, arXiv:2408.00118, section 2);
  /// 0: they are not. Finite, >= 0, no subnormal.
  float soft_cap = 0.0F;
  /// [num_qo_heads] a learned logit of each query head that has no value: exp(sink) is one more
  /// term of the softmax's sum (gpt-oss, arXiv:2508.10925). Finite; neither scaled nor capped.
  /// Empty: there are none.
  std::vector<float> sinks = {};
  /// [num_qo_heads] what each query head adds to a score for each token from query to key, which is
  /// not positive: slopes above 0 favour near keys (ALiBi: Press et al., arXiv:2108.12409). Finite.
  /// Empty: nothing.
  std::vector<float> alibi_slopes = {};

  friend bool operator==(const SoftmaxOptions&, const SoftmaxOptions&) = default;
};

/// One attention layer. Query head `h` is served by KV head `h / group_size`.
///
/// A model's hidden size is nowhere in it: num_qo_heads() * k_dim may be anything. K and V have the
/// same heads; a layer with different numbers of them cannot be said.
struct LayerShape {
  int num_kv_heads = 0;         ///< units of storage and of policy
  int group_size = 1;           ///< query heads per KV head
  int k_dim = 0;                ///< width of a K row (head_dim), a multiple of 16
  int v_dim = 0;                ///< width of a V row, a multiple of 16
  float sm_scale = 0.0F;        ///< factor on q.k, finite; 0 means 1 / sqrt(k_dim)
  SoftmaxOptions softmax = {};  ///< soft-cap, learned sinks, ALiBi
  /// The model's own window: a query sees this many newest tokens, its own included (Gemma 2 and 3,
  /// gpt-oss, Mistral); 0: there is none. Every head keeps the smaller of this window and its
  /// budget (heads/native_window.hpp), and prompts are windowed whatever CacheOptions::prefill
  /// says.
  std::int64_t sliding_window = 0;
  /// The model's own chunks, of which a query sees only the one that it is in (Llama 4's
  /// attention_chunk_size). Must be 0: such layers are refused, not read as something else.
  std::int64_t attention_chunk = 0;
  /// The earlier layer whose K and V this one reads (Gemma 3n; CLA, arXiv:2405.12981), from 0; -1:
  /// it has its own. It stores nothing, and keeps what that layer keeps.
  int kv_layer = -1;

  int num_qo_heads() const { return num_kv_heads * group_size; }
  /// Whether it has K and V of its own.
  bool owns_kv() const { return kv_layer < 0; }
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
  ///   below), an sm_scale that is not finite, softmax options, a window or a chunk out of their
  ///   range, a kv_layer that is not an earlier layer with K and V of its own and of the same
  ///   heads, widths and window, or what lies beyond kMaxLayers and its sisters.
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
      check_sharing(i);
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
    if (!is_finite(layer.sm_scale)) {
      fail<ConfigError>("layer ", i, ": sm_scale must be finite, got ", layer.sm_scale);
    }
    check_softmax(layer, i);
    detail::checked_range(layer.sliding_window, 0, kMaxTokens, "sliding_window");
    if (layer.attention_chunk != 0) {
      fail<ConfigError>("layer ", i, ": attention in chunks (Llama 4), here of ",
                        layer.attention_chunk,
                        " tokens, is not supported: attention_chunk must be 0");
    }
  }

  static void check_softmax(const LayerShape& layer, std::size_t i) {
    const SoftmaxOptions& softmax = layer.softmax;
    const float cap = softmax.soft_cap;
    if (!is_finite(cap) || (!is_zero(cap) && cap < std::numeric_limits<float>::min())) {
      fail<ConfigError>("layer ", i, ": soft_cap must be 0 or a finite number of at least ",
                        std::numeric_limits<float>::min(), ", got ", cap);
    }
    check_per_head(softmax.sinks, layer, "sinks", i);
    check_per_head(softmax.alibi_slopes, layer, "alibi_slopes", i);
  }

  static void check_per_head(const std::vector<float>& values, const LayerShape& layer,
                             const char* name, std::size_t i) {
    const auto wanted = static_cast<std::size_t>(layer.num_qo_heads());
    if (!values.empty() && values.size() != wanted) {
      fail<ConfigError>("layer ", i, ": ", name, " must be empty or one for each of ", wanted,
                        " query heads, got ", values.size());
    }
    for (std::size_t h = 0; h < values.size(); ++h) {
      if (is_finite(values[h])) continue;
      fail<ConfigError>("layer ", i, ": ", name, " must be finite, got ", values[h],
                        " for query head ", h);
    }
  }

  void check_sharing(std::size_t i) const {
    const LayerShape& layer = layers_[i];
    if (layer.kv_layer == -1) return;
    if (layer.kv_layer < 0 || static_cast<std::size_t>(layer.kv_layer) >= i) {
      fail<ConfigError>("layer ", i, ": kv_layer must be -1 or an earlier layer, got ",
                        layer.kv_layer);
    }
    const LayerShape& owner = layers_[static_cast<std::size_t>(layer.kv_layer)];
    if (!owner.owns_kv()) {
      fail<ConfigError>("layer ", i, ": kv_layer ", layer.kv_layer,
                        " has no K and V of its own, it reads those of layer ", owner.kv_layer);
    }
    const auto same = [&](std::int64_t own, std::int64_t of_owner, const char* name) {
      if (own == of_owner) return;
      fail<ConfigError>("layer ", i, ": ", name, " must be that of layer ", layer.kv_layer,
                        ", whose K and V it reads (", of_owner, "), got ", own);
    };
    same(layer.num_kv_heads, owner.num_kv_heads, "num_kv_heads");
    same(layer.k_dim, owner.k_dim, "k_dim");
    same(layer.v_dim, owner.v_dim, "v_dim");
    same(layer.sliding_window, owner.sliding_window, "sliding_window");
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
