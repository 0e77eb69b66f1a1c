// SPDX-License-Identifier: MIT
#pragma once
#include "headwise/attention/cuda/attend.cuh"
#include "headwise/cache/rows/plain.hpp"
