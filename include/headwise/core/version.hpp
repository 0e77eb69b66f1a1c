// SPDX-License-Identifier: MIT
/// @file version.hpp
/// The library's version; the build system reads it from here, so it exists once.
#pragma once

#define HEADWISE_VERSION_MAJOR 0
#define HEADWISE_VERSION_MINOR 1
#define HEADWISE_VERSION_PATCH 0
