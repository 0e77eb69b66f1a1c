// SPDX-License-Identifier: MIT
/// @file isa_types.hpp
/// Type lists for typed tests: every ISA this build has, crossed with row formats and layouts.
#pragma once

#include <gtest/gtest.h>

#include <string>
#include <tuple>
#include <type_traits>

#include "headwise/cache/page_layout.hpp"
#include "headwise/core/dtype.hpp"
#include "headwise/simd/simd.hpp"

namespace headwise::test {

/// One point of the product that kernels are instantiated over.
template <class IsaT, class RowT, class LayoutT>
struct KernelTypes {
  using Isa = IsaT;
  using Row = RowT;
  using Layout = LayoutT;
};

namespace type_lists {

template <class Isa>
using IfCompiled = std::conditional_t<simd::CompiledIsa<Isa>, std::tuple<Isa>, std::tuple<>>;

using Isas = decltype(std::tuple_cat(IfCompiled<simd::Scalar>{}, IfCompiled<simd::Avx2>{},
                                     IfCompiled<simd::Avx512>{}, IfCompiled<simd::Neon>{}));

template <class Isa>
std::tuple<KernelTypes<Isa, f32, PlainLayout>, KernelTypes<Isa, f32, TiledLayout>,
           KernelTypes<Isa, f16, PlainLayout>, KernelTypes<Isa, f16, TiledLayout>,
           KernelTypes<Isa, bf16, PlainLayout>, KernelTypes<Isa, bf16, TiledLayout>>
kernel_types_of();

template <class... Ts>
::testing::Types<Ts...> as_types(std::tuple<Ts...>);

template <class... Isas>
auto all_kernel_types(std::tuple<Isas...>) -> decltype(std::tuple_cat(kernel_types_of<Isas>()...));

template <class Row>
std::string row_name() {
  if constexpr (std::is_same_v<Row, f32>) return "f32";
  if constexpr (std::is_same_v<Row, f16>) return "f16";
  if constexpr (std::is_same_v<Row, bf16>) return "bf16";
}

}  // namespace type_lists

using AllIsas = decltype(type_lists::as_types(type_lists::Isas{}));
using AllKernels = decltype(type_lists::as_types(type_lists::all_kernel_types(type_lists::Isas{})));

struct IsaNames {
  template <class Isa>
  static std::string GetName(int) {
    return std::string(simd::isa_name<Isa>());
  }
};

struct KernelNames {
  template <class T>
  static std::string GetName(int) {
    return std::string(simd::isa_name<typename T::Isa>()) + "_" +
           type_lists::row_name<typename T::Row>() +
           (std::is_same_v<typename T::Layout, PlainLayout> ? "_plain" : "_tiled");
  }
};

}  // namespace headwise::test
