// SPDX-License-Identifier: MIT
/// @file io_view.hpp
/// InputView, OutputView: tensors of floats, f16 or bf16, told apart at run time.
#pragma once

#include <concepts>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "headwise/core/check.hpp"
#include "headwise/core/dtype.hpp"
#include "headwise/core/tensor_view.hpp"

namespace headwise::inline v0 {

/// What q, k, v and out of the CPU kernels are made of; rows are stored as their format says.
enum class IoType : std::uint8_t { kF32, kF16, kBf16 };

/// A TensorView of any of these types. One type for all of them: kernels are compiled once, and
/// convert where they load queries, round a step's rows and write outputs.
/// @tparam Byte  const std::byte: what is read; std::byte: what is written
template <class Byte>
class IoView {
  static constexpr bool kIsInput = std::is_const_v<Byte>;
  template <class E>
  using Element = std::conditional_t<kIsInput, const E, E>;

 public:
  /// No tensor.
  IoView() = default;
  /// Rows of elements at `data`; strides in elements.
  template <class T>
    requires(RowElement<std::remove_const_t<T>> && (kIsInput || !std::is_const_v<T>))
  IoView(T* data, std::int64_t stride_n, std::int64_t stride_h)
      : data_(reinterpret_cast<Byte*>(data)),
        stride_n_(stride_n),
        stride_h_(stride_h),
        type_(std::same_as<std::remove_const_t<T>, f32>   ? IoType::kF32
              : std::same_as<std::remove_const_t<T>, f16> ? IoType::kF16
                                                          : IoType::kBf16) {}
  /// The same tensor.
  template <class T>
    requires(RowElement<std::remove_const_t<T>> && (kIsInput || !std::is_const_v<T>))
  IoView(TensorView<T> view) : IoView(view.data, view.stride_n, view.stride_h) {}  // NOLINT

  IoType type() const { return type_; }

  /// The tensor that begins at one token and head of this one.
  IoView from(std::int64_t token, std::int64_t head) const {
    const std::ptrdiff_t bytes = type_ == IoType::kF32 ? sizeof(f32) : sizeof(f16);
    IoView view = *this;
    view.data_ += (token * stride_n_ + head * stride_h_) * bytes;
    return view;
  }

  /// `fn(TensorView)` of what it is.
  template <class Fn>
  decltype(auto) visit(Fn&& fn) const {
    if (type_ == IoType::kF16) return fn(as<f16>());
    if (type_ == IoType::kBf16) return fn(as<bf16>());
    return fn(as<f32>());
  }

  /// The tensor as one of floats.
  /// @pre it is one
  TensorView<Element<f32>> floats() const {
    HEADWISE_ASSERT(type_ == IoType::kF32, "not a tensor of floats");
    return as<f32>();
  }
  /// One row of a tensor of floats.
  Element<f32>* row(std::int64_t token, std::int64_t head) const {
    return floats().row(token, head);
  }

 private:
  template <class E>
  TensorView<Element<E>> as() const {
    return {reinterpret_cast<Element<E>*>(data_), stride_n_, stride_h_};
  }

  Byte* data_ = nullptr;
  std::int64_t stride_n_ = 0;  // in elements
  std::int64_t stride_h_ = 0;
  IoType type_ = IoType::kF32;
};

/// What attention reads: q, k and v. A TensorView of f32, f16 or bf16 converts.
using InputView = IoView<const std::byte>;
/// What attention writes. A TensorView of f32, f16 or bf16 that are not const converts.
using OutputView = IoView<std::byte>;

}  // namespace headwise::inline v0
