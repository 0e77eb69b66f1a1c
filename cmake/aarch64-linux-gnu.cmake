# SPDX-License-Identifier: MIT
# Toolchain of the neon preset: 64-bit Arm on Linux, its programs run under emulation.
# Debian: g++-aarch64-linux-gnu qemu-user libgtest-dev
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64 -L /usr/aarch64-linux-gnu)

# An installed GoogleTest is the host's: its sources are built instead, Debian's or the pinned download.
set(CMAKE_DISABLE_FIND_PACKAGE_GTest ON)
if(EXISTS /usr/src/googletest)
  set(FETCHCONTENT_SOURCE_DIR_GTEST /usr/src/googletest CACHE PATH "GoogleTest's sources")
endif()
