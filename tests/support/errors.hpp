// SPDX-License-Identifier: MIT
/// @file errors.hpp
/// What an error says, for tests that hold it to naming value and limit.
#pragma once

#include <gtest/gtest.h>

#include <string>

namespace headwise::testing {

/// what() of the `Error` that `fn` throws; a failed test where it throws nothing or another one.
template <class Error, class Fn>
std::string message_of(Fn&& fn) {
  try {
    fn();
  } catch (const Error& error) {
    return error.what();
  } catch (const std::exception& error) {
    ADD_FAILURE() << "another error: " << error.what();
    return "";
  }
  ADD_FAILURE() << "no error";
  return "";
}

}  // namespace headwise::testing
