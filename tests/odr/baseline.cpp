// SPDX-License-Identifier: MIT
// Compiled for the compiler's default instruction set.
#include "unit.hpp"

std::string baseline_report() { return report(); }
