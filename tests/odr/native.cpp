// SPDX-License-Identifier: MIT
// Compiled with -march=native.
#include "unit.hpp"

std::string native_report() { return report(); }
