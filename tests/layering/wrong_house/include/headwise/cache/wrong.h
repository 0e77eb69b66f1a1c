// SPDX-License-Identifier: MIT
// C in a room, and C++ in it.
#pragma once
#include <vector>
