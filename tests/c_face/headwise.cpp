// SPDX-License-Identifier: MIT
// The one C++ file that an engine in C adds.
#include "headwise/headwise_c.hpp"
