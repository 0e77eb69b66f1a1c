// SPDX-License-Identifier: MIT
/// @file published.hpp
/// Published score files, read where they lie: they are not part of this repository.
#pragma once

#include <gtest/gtest.h>

#include <filesystem>
#include <string>

namespace headwise::testing {

inline std::string published(const std::string& file) {
  return HEADWISE_SHARED_DIR "/head_patterns/" + file;
}

}  // namespace headwise::testing

/// Skips the test where `path` is not there.
#define HEADWISE_SKIP_WITHOUT(path) \
  if (!std::filesystem::exists(path)) GTEST_SKIP() << (path) << " is not here"
