# SPDX-License-Identifier: MIT
# The CUDA part is opt-in and untouched where there is no nvcc.
set(HEADWISE_CUDA AUTO CACHE STRING "CUDA kernels: AUTO (when nvcc is found), ON, OFF")
set_property(CACHE HEADWISE_CUDA PROPERTY STRINGS AUTO ON OFF)
