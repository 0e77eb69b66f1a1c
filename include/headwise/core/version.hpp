// SPDX-License-Identifier: MIT
/// @file version.hpp
/// The library's version; the build system reads it from here, so it exists once.
#pragma once

/// Incompatible changes; 0 while any minor version may break.
#define HEADWISE_VERSION_MAJOR 0
/// New features; in 0.x also incompatible changes.
#define HEADWISE_VERSION_MINOR 1
/// Corrections only.
#define HEADWISE_VERSION_PATCH 0
