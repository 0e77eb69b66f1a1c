// SPDX-License-Identifier: MIT
/// @file estimate.cuh
/// What fits into a device's memory: the inverses of estimate_device(), before there is a device.
#pragma once

#include <cstddef>
#include <cstdint>

#include "headwise/attention/cuda/attend.cuh"
#include "headwise/attention/cuda/head_dims.cuh"
#include "headwise/attention/cuda/launches.cuh"
#include "headwise/attention/cuda/softmax_kind.cuh"
#include "headwise/cache/cuda/elements.cuh"
#include "headwise/cache/estimate.hpp"
#include "headwise/cache/options.hpp"
#include "headwise/cache/rows/plain_rows.hpp"
#include "headwise/core/shape.hpp"
#include "headwise/heads/plan.hpp"

namespace headwise::inline v0::cuda {

namespace detail {

/// Device memory of a cache and its attention.
template <DeviceRow Row, class Dims, SoftmaxKind Softmax>
auto device_total(const ModelShape& shape, const HeadPlan& plan, const DeviceLimits& limits,
                  std::int64_t max_converted_rows) {
  return [&, max_converted_rows](const CacheGeometry& geometry) {
    return estimate_device<Row, Dims, Softmax>(shape, plan, geometry.options(), limits,
                                               max_converted_rows)
        .device_bytes();
  };
}

}  // namespace detail

/// The longest max_context of a DeviceCache<Row> that fits, with its tables and its attention's
/// scratch, into `bytes` of device memory; other options as given, max_bytes and page_memory
/// ignored. 0 when not even one token fits.
/// @param limits, max_converted_rows  as estimate_device()'s.
/// @throws ConfigError as estimate_device(), but for what does not fit.
template <DeviceRow Row, class Dims = AllHeadDims, SoftmaxKind Softmax = PlainSoftmax>
std::int64_t longest_context(const ModelShape& shape, const HeadPlan& plan,
                             const CacheOptions& options, const DeviceLimits& limits,
                             std::size_t bytes, std::int64_t max_converted_rows = 0) {
  return headwise::detail::longest_context_of<PlainRows<Row>>(
      shape, plan, options, bytes,
      detail::device_total<Row, Dims, Softmax>(shape, plan, limits, max_converted_rows));
}

/// The most sequences of max_context tokens that fit; see longest_context().
template <DeviceRow Row, class Dims = AllHeadDims, SoftmaxKind Softmax = PlainSoftmax>
std::int64_t most_sequences(const ModelShape& shape, const HeadPlan& plan,
                            const CacheOptions& options, const DeviceLimits& limits,
                            std::size_t bytes, std::int64_t max_converted_rows = 0) {
  return headwise::detail::most_sequences_of<PlainRows<Row>>(
      shape, plan, options, bytes,
      detail::device_total<Row, Dims, Softmax>(shape, plan, limits, max_converted_rows));
}

}  // namespace headwise::inline v0::cuda
