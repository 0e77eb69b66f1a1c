// SPDX-License-Identifier: MIT
/// @file engine_memory.hpp
/// What the engine had before: blocks of KV rows, a free list, a block table for every KV head.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "headwise/cache/rows/plain_rows.hpp"
#include "headwise/cache/rows/tiled_rows.hpp"
#include "headwise/core/dtype.hpp"
#include "headwise/core/kv_view.hpp"
#include "headwise/core/window.hpp"

namespace own_memory {

using namespace headwise;

constexpr int kDim = 64;
constexpr int kBlockTokens = 32;
constexpr PageShape kBlock{kBlockTokens, kDim, kDim};  // 32 rows of K, then 32 of V, in f16

/// Blocks of one KV head each: row `pos % 32` of the head's block `pos / 32` is the token's.
class EngineMemory {
 public:
  explicit EngineMemory(std::size_t num_blocks, std::size_t num_heads)
      : blocks_(num_blocks), tables_(num_heads) {
    for (std::size_t i = num_blocks; i-- > 0;) free_.push_back(static_cast<std::int32_t>(i));
  }

  void append(int head, Pos pos, const float* k, const float* v) {
    if (pos.value % kBlockTokens == 0) {
      table(head).push_back(free_.back());
      free_.pop_back();
    }
    Block& block = blocks_[static_cast<std::size_t>(table(head).back())];
    const auto row = static_cast<std::size_t>(pos.value % kBlockTokens);
    for (std::size_t d = 0; d < kDim; ++d) {
      block.rows[PlainRows<f16>::k_offset(kBlock, row, d)] = from_float<f16>(k[d]);
      block.rows[PlainRows<f16>::v_offset(kBlock, row, d)] = from_float<f16>(v[d]);
    }
  }

  /// Frees the blocks that no query from `next` on will see; tables keep their length.
  void free_unseen(int head, Window window, Pos next) {
    for (std::int64_t b = 0; (b + 1) * kBlockTokens <= first_recent(window, next); ++b) {
      std::int32_t& block = table(head)[static_cast<std::size_t>(b)];
      if (b * kBlockTokens < window.sink || block < 0) continue;
      free_.push_back(block);
      block = -1;
    }
  }

  /// What a query from `next` on may see: at most two runs of rows, slot = position.
  KvView<PlainRows<f16>> view(int head, Window window, Pos next) {
    auto view =
        KvView<PlainRows<f16>>::over_pages(reinterpret_cast<const std::byte*>(blocks_.data()),
                                           sizeof(Block), table(head).data(), kBlock);
    const std::int64_t recent = first_recent(window, next);
    const std::int64_t sink = std::min(window.sink, recent);
    view.add_run({Slot{0}, Pos{0}, sink});
    view.add_run({Slot{recent}, Pos{recent}, next.value - recent});
    return view;
  }

  std::size_t num_used() const { return blocks_.size() - free_.size(); }

 private:
  struct alignas(64) Block {
    f16 rows[PlainRows<f16>::page_bytes(kBlock) / sizeof(f16)];
  };

  static std::int64_t first_recent(Window window, Pos next) {
    return window.oldest_recent(next).value;
  }
  std::vector<std::int32_t>& table(int head) { return tables_[static_cast<std::size_t>(head)]; }

  std::vector<Block> blocks_;
  std::vector<std::int32_t> free_;
  std::vector<std::vector<std::int32_t>> tables_;
};

}  // namespace own_memory
