// SPDX-License-Identifier: MIT
/// @file headwise.cuh
/// Everything for CUDA: device pages and kernels. Opt-in; headwise.hpp never includes it.
#pragma once

#include "headwise/attention/cuda/attend.cuh"      // IWYU pragma: export
#include "headwise/attention/cuda/own_tables.cuh"  // IWYU pragma: export
#include "headwise/cache/cuda/device_cache.cuh"    // IWYU pragma: export
