// SPDX-License-Identifier: MIT
/// @file engine_memory.hpp
/// What the engine had before: llama2.c's RunState, key_cache and value_cache of
/// [layer][seq_len][kv_dim], kv_dim being all KV heads of a token side by side.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "headwise/cache/rows/plain_rows.hpp"
#include "headwise/core/kv_view.hpp"

namespace own_memory {

using namespace headwise;

class EngineMemory {
 public:
  EngineMemory(int num_layers, std::int64_t seq_len, int num_kv_heads, int head_dim)
      : seq_len_(seq_len),
        head_dim_(head_dim),
        kv_dim_(num_kv_heads * head_dim),
        key_cache_(static_cast<std::size_t>(num_layers * seq_len * kv_dim_)),
        value_cache_(key_cache_.size()) {}

  /// One token's K and V of all heads of a layer, [kv_dim] each.
  void append(int layer, std::int64_t pos, const float* k, const float* v) {
    std::copy_n(k, kv_dim_, key_cache_.begin() + offset(layer, pos));
    std::copy_n(v, kv_dim_, value_cache_.begin() + offset(layer, pos));
  }

  /// The first `num_tokens` rows of one head where they lie; nothing is copied.
  KvView<PlainRows<float>> view(int layer, int kv_head, std::int64_t num_tokens) const {
    const std::ptrdiff_t first = offset(layer, 0) + kv_head * head_dim_;
    return KvView<PlainRows<float>>::over_rows(key_cache_.data() + first,
                                               value_cache_.data() + first, kv_dim_, kv_dim_,
                                               num_tokens, head_dim_, head_dim_);
  }

 private:
  std::ptrdiff_t offset(int layer, std::int64_t pos) const {
    return static_cast<std::ptrdiff_t>((layer * seq_len_ + pos) * kv_dim_);
  }

  std::int64_t seq_len_;
  int head_dim_;
  int kv_dim_;
  std::vector<float> key_cache_;
  std::vector<float> value_cache_;
};

}  // namespace own_memory
