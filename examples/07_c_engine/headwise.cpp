// SPDX-License-Identifier: MIT
// All the C++ that an engine in C adds: the definitions of headwise.h.
#include "headwise/headwise_c.hpp"
