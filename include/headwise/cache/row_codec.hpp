// SPDX-License-Identifier: MIT
/// @file row_codec.hpp
/// Rows in and out of a page: encoded once, when they are stored.
#pragma once

#include <algorithm>
#include <cstddef>
#include <type_traits>

#include "headwise/cache/page_layout.hpp"
#include "headwise/core/dtype.hpp"
#include "headwise/simd/simd.hpp"

namespace headwise::inline v0 {

/// Floats that rows are converted in: every width is a multiple of it.
inline constexpr int kCodecStrip = 16;

/// Rounds 16 floats to `Row`, to nearest even.
template <class Isa, RowElement Row>
void encode_strip(const float* from, Row* to) {
  using Ops = simd::Ops<Isa>;
  for (int i = 0; i < kCodecStrip; i += Ops::kWidth) Ops::store(to + i, Ops::load(from + i));
}

/// Widens 16 elements to floats.
template <class Isa, RowElement Row>
void decode_strip(const Row* from, float* to) {
  using Ops = simd::Ops<Isa>;
  for (int i = 0; i < kCodecStrip; i += Ops::kWidth) Ops::store(to + i, Ops::load(from + i));
}

/// Stores one token's K [k_dim] and V [v_dim] as row `row` of a page.
template <class Isa, RowElement Row, PageLayout Layout>
void encode_row(Row* page, const PageShape& shape, std::size_t row, const float* k,
                const float* v) {
  for (std::size_t dim = 0; dim < static_cast<std::size_t>(shape.k_dim);
       dim += std::size_t{kCodecStrip}) {
    if constexpr (std::is_same_v<Layout, TiledLayout>) {
      alignas(64) Row strip[kCodecStrip];
      encode_strip<Isa>(k + dim, strip);
      Row* to = page + Layout::k_offset(shape, row, dim);
      for (std::size_t i = 0; i < TiledLayout::kTile; ++i) to[i * TiledLayout::kTile] = strip[i];
    } else {
      encode_strip<Isa>(k + dim, page + Layout::k_offset(shape, row, dim));
    }
  }
  for (std::size_t dim = 0; dim < static_cast<std::size_t>(shape.v_dim);
       dim += std::size_t{kCodecStrip}) {
    encode_strip<Isa>(v + dim, page + Layout::v_offset(shape, row, dim));
  }
}

/// Adds rows [first, last) of a page to `k_sum` [k_dim] and `v_sum` [v_dim].
template <class Isa, RowElement Row, PageLayout Layout>
void add_rows(const Row* page, const PageShape& shape, std::size_t first, std::size_t last,
              float* k_sum, float* v_sum) {
  using Ops = simd::Ops<Isa>;
  const auto add_strip = [](const Row* from, float* sum) {
    for (int i = 0; i < kCodecStrip; i += Ops::kWidth) {
      Ops::store(sum + i, Ops::add(Ops::load(sum + i), Ops::load(from + i)));
    }
  };
  for (std::size_t dim = 0; dim < static_cast<std::size_t>(shape.v_dim);
       dim += std::size_t{kCodecStrip}) {
    for (std::size_t row = first; row < last; ++row) {
      add_strip(page + Layout::v_offset(shape, row, dim), v_sum + dim);
    }
  }
  if constexpr (std::is_same_v<Layout, TiledLayout>) {
    for (std::size_t dim = 0; dim < static_cast<std::size_t>(shape.k_dim); ++dim) {
      for (std::size_t row = first; row < last;) {  // one dimension of up to 16 tokens at a time
        const std::size_t lane = row % TiledLayout::kTile;
        const std::size_t lanes = std::min(TiledLayout::kTile - lane, last - row);
        alignas(64) float tokens[TiledLayout::kTile];
        decode_strip<Isa>(page + Layout::k_offset(shape, row - lane, dim), tokens);
        float sum = 0.0F;
        for (std::size_t i = 0; i < lanes; ++i) sum += tokens[lane + i];
        k_sum[dim] += sum;
        row += lanes;
      }
    }
  } else {
    for (std::size_t row = first; row < last; ++row) {
      for (std::size_t dim = 0; dim < static_cast<std::size_t>(shape.k_dim);
           dim += std::size_t{kCodecStrip}) {
        add_strip(page + Layout::k_offset(shape, row, dim), k_sum + dim);
      }
    }
  }
}

}  // namespace headwise::inline v0
