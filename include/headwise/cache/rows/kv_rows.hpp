// SPDX-License-Identifier: MIT
/// @file kv_rows.hpp
/// KvRows: K in one format, V in another.
#pragma once

#include <array>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>

#include "headwise/cache/rows/format.hpp"
#include "headwise/cache/rows/tiles.hpp"
#include "headwise/core/config.hpp"
#include "headwise/core/page_shape.hpp"

namespace headwise::inline v0 {

/// A page is one of KFormat without V, then one of VFormat without K: each part is that format's,
/// to the last bit, and the kernels read both where they lie.
/// @tparam KRows,VRows  row formats whose pages lie in one piece (or element types): Int8Rows,
///   Int4Rows, f16, ... Rotated K comes from without: RotatedRows<KvRows<...>> turns q, too.
template <class KRows, class VRows>
  requires(std::same_as<typename FormatOf<KRows>::Memory, PagedMemory>&&
               std::same_as<typename FormatOf<VRows>::Memory, PagedMemory> &&
           !RotatesK<FormatOf<KRows>> && !RotatesK<FormatOf<VRows>>)
struct KvRows {
  using KFormat = FormatOf<KRows>;  ///< of K
  using VFormat = FormatOf<VRows>;  ///< of V
  using Memory = PagedMemory;
  using Page = const std::byte*;

  static constexpr const char* name() { return kName.data(); }

  static constexpr std::size_t page_bytes(const PageShape& shape) {
    return v_offset(shape) + VFormat::page_bytes(v_of(shape));
  }

  template <class Isa>
  static std::int64_t encode(std::byte* page, const PageShape& shape, std::size_t row,
                             const float* k, const float* v) {
    return KFormat::template encode<Isa>(page, k_of(shape), row, k, v) +
           VFormat::template encode<Isa>(page + v_offset(shape), v_of(shape), row, k, v);
  }

  template <class Isa>
  static std::int64_t count_overflows(const PageShape& shape, const float* k, const float* v) {
    return KFormat::template count_overflows<Isa>(k_of(shape), k, v) +
           VFormat::template count_overflows<Isa>(v_of(shape), k, v);
  }

  template <class Isa>
  static void add_rows(const std::byte* page, const PageShape& shape, std::size_t first,
                       std::size_t last, double* k_sum, double* v_sum) {
    KFormat::template add_rows<Isa>(page, k_of(shape), first, last, k_sum, v_sum);
    VFormat::template add_rows<Isa>(page + v_offset(shape), v_of(shape), first, last, k_sum, v_sum);
  }

  static void read_row(Page page, const PageShape& shape, std::size_t row, float* k, float* v) {
    KFormat::read_row(page, k_of(shape), row, k, v);
    VFormat::read_row(page + v_offset(shape), v_of(shape), row, k, v);
  }

  static void copy_rows(const std::byte* from, std::span<const std::int32_t> rows, std::byte* to,
                        std::size_t to_row, const PageShape& shape) {
    KFormat::copy_rows(from, rows, to, to_row, k_of(shape));
    VFormat::copy_rows(from + v_offset(shape), rows, to + v_offset(shape), to_row, v_of(shape));
  }

  static void round_row(const PageShape& shape, const float* k, const float* v, float* to_k,
                        float* to_v) {
    KFormat::round_row(k_of(shape), k, v, to_k, to_v);
    VFormat::round_row(v_of(shape), k, v, to_k, to_v);
  }

  /// The 64 rows around `row` (as many as the page has), where they lie.
  HEADWISE_ALWAYS_INLINE static auto tiles(
      Page page, const PageShape& shape,
      std::size_t row) requires(TiledInPlace<KFormat>&& TiledInPlace<VFormat>) {
    return detail::join(KFormat::tiles(page, k_of(shape), row),
                        VFormat::tiles(page + v_offset(shape), v_of(shape), row));
  }

  template <class Isa>
  static int pack(Page page, const PageShape& shape, std::size_t row, int count, float* k,
                  float* v) noexcept {
    KFormat::template pack<Isa>(page, k_of(shape), row, count, k, v);
    return VFormat::template pack<Isa>(page + v_offset(shape), v_of(shape), row, count, k, v);
  }

  template <class Isa>
  static void pack_own_k(const float* rows, std::ptrdiff_t stride, int count, int dim,
                         float* tiles) noexcept {
    KFormat::template pack_own_k<Isa>(rows, stride, count, dim, tiles);
  }

  template <class Isa>
  static void pack_own_v(const float* rows, std::ptrdiff_t stride, int count, int dim,
                         float* strips) noexcept {
    VFormat::template pack_own_v<Isa>(rows, stride, count, dim, strips);
  }

 private:
  static constexpr PageShape k_of(const PageShape& shape) {
    return {shape.page_tokens, shape.k_dim, 0};
  }
  static constexpr PageShape v_of(const PageShape& shape) {
    return {shape.page_tokens, 0, shape.v_dim};
  }
  static constexpr std::size_t v_offset(const PageShape& shape) {
    return KFormat::page_bytes(k_of(shape));
  }

  /// "int8_k_int4_v"
  static constexpr auto kName = [] {
    constexpr std::string_view k = KFormat::name(), v = VFormat::name();
    std::array<char, k.size() + v.size() + 6> name{};
    auto* to = name.data();
    for (const std::string_view part : {k, std::string_view("_k_"), v, std::string_view("_v")}) {
      for (const char c : part) *to++ = c;
    }
    return name;
  }();
};

}  // namespace headwise::inline v0
