// SPDX-License-Identifier: MIT
// expect: conversion from .*Pos.* to .*Slot
// A place in the buffer is not a place in the sequence.
#include "headwise/core/position.hpp"

int main() {
  const headwise::Pos pos{3};
#ifdef WRONG
  const headwise::Slot slot = pos;
#else
  const headwise::Slot slot{pos.value};
#endif
  return slot.value == 3 ? 0 : 1;
}
