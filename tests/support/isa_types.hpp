// SPDX-License-Identifier: MIT
/// @file isa_types.hpp
/// Type lists for typed tests: every ISA this build has, crossed with row formats.
#pragma once

#include <gtest/gtest.h>

#include <string>
#include <tuple>
#include <type_traits>

#include "headwise/cache/rows/int4_rows.hpp"
#include "headwise/cache/rows/int8_rows.hpp"
#include "headwise/cache/rows/kv_rows.hpp"
#include "headwise/cache/rows/plain_rows.hpp"
#include "headwise/cache/rows/tiled_rows.hpp"
#include "headwise/core/dtype.hpp"
#include "headwise/simd/simd.hpp"

namespace headwise::test {

/// One point of the product that kernels are instantiated over.
template <class IsaT, class FormatT>
struct KernelTypes {
  using Isa = IsaT;
  using Format = FormatT;
};

namespace type_lists {

template <class Isa>
using IfCompiled = std::conditional_t<simd::CompiledIsa<Isa>, std::tuple<Isa>, std::tuple<>>;

using Isas = decltype(std::tuple_cat(IfCompiled<simd::Scalar>{}, IfCompiled<simd::Avx2>{},
                                     IfCompiled<simd::Avx512>{}, IfCompiled<simd::Neon>{}));

template <class Isa>
std::tuple<KernelTypes<Isa, PlainRows<f32>>, KernelTypes<Isa, TiledRows<f32>>,
           KernelTypes<Isa, PlainRows<f16>>, KernelTypes<Isa, TiledRows<f16>>,
           KernelTypes<Isa, PlainRows<bf16>>, KernelTypes<Isa, TiledRows<bf16>>>
element_types_of();

template <class Isa>
std::tuple<KernelTypes<Isa, Int8Rows>, KernelTypes<Isa, Int4Rows>,
           KernelTypes<Isa, KvRows<Int8Rows, Int4Rows>>, KernelTypes<Isa, KvRows<f16, Int8Rows>>>
scaled_types_of();

template <class Isa>
std::tuple<KernelTypes<Isa, PlainRows<f32>>, KernelTypes<Isa, PlainRows<f16>>,
           KernelTypes<Isa, PlainRows<bf16>>>
plain_types_of();

template <class... Ts>
::testing::Types<Ts...> as_types(std::tuple<Ts...>);

template <class... Isas>
auto element_types(std::tuple<Isas...>) -> decltype(std::tuple_cat(element_types_of<Isas>()...));
template <class... Isas>
auto plain_types(std::tuple<Isas...>) -> decltype(std::tuple_cat(plain_types_of<Isas>()...));
template <class... Isas>
auto all_types(std::tuple<Isas...>)
    -> decltype(std::tuple_cat(element_types_of<Isas>()..., scaled_types_of<Isas>()...));

}  // namespace type_lists

using AllIsas = decltype(type_lists::as_types(type_lists::Isas{}));
using AllKernels = decltype(type_lists::as_types(type_lists::all_types(type_lists::Isas{})));
/// Formats without scales: every element is rounded by itself.
using ElementKernels =
    decltype(type_lists::as_types(type_lists::element_types(type_lists::Isas{})));
/// Formats that an engine's own arrays may have.
using PlainKernels = decltype(type_lists::as_types(type_lists::plain_types(type_lists::Isas{})));

struct IsaNames {
  template <class Isa>
  static std::string GetName(int) {
    return std::string(simd::isa_name<Isa>());
  }
};

struct KernelNames {
  template <class T>
  static std::string GetName(int) {
    return std::string(simd::isa_name<typename T::Isa>()) + "_" + T::Format::name();
  }
};

/// Every row format, for tests that run on the best ISA alone.
using AllFormats = ::testing::Types<PlainRows<f32>, TiledRows<f32>, PlainRows<f16>, TiledRows<f16>,
                                    PlainRows<bf16>, TiledRows<bf16>, Int8Rows, Int4Rows,
                                    KvRows<Int8Rows, Int4Rows>, KvRows<f16, Int8Rows>>;

struct FormatNames {
  template <class Format>
  static std::string GetName(int) {
    return Format::name();
  }
};

}  // namespace headwise::test
