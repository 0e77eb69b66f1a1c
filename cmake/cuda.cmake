# SPDX-License-Identifier: MIT
# headwise::cuda, and the CUDA language for our own tests and benches. Opt-in: without nvcc nothing changes.
set(HEADWISE_CUDA AUTO CACHE STRING "CUDA kernels: AUTO (when nvcc is found), ON, OFF")
set_property(CACHE HEADWISE_CUDA PROPERTY STRINGS AUTO ON OFF)

set(HEADWISE_HAS_CUDA OFF)
if(HEADWISE_CUDA STREQUAL "AUTO" AND PROJECT_IS_TOP_LEVEL AND NOT HEADWISE_SANITIZE)
  include(CheckLanguage)
  if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
    find_program(HEADWISE_NVCC nvcc HINTS /usr/local/cuda/bin)
    mark_as_advanced(HEADWISE_NVCC)
    if(HEADWISE_NVCC)
      set(CMAKE_CUDA_COMPILER ${HEADWISE_NVCC})
    endif()
  endif()
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(HEADWISE_HAS_CUDA ON)
  endif()
elseif(HEADWISE_CUDA STREQUAL "ON")
  set(HEADWISE_HAS_CUDA ON)
endif()

if(HEADWISE_HAS_CUDA)
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    # 90a: warpgroup products, for prefill; its code runs on compute capability 9.0 alone. Each further architecture
    # costs a third of this one's time for every file; tests/cuda compiles one file for others too.
    set(CMAKE_CUDA_ARCHITECTURES 90a-real CACHE STRING "What our own CUDA programs are built for: 80-real, 90-virtual, ...")
  endif()
  enable_language(CUDA)
  find_package(CUDAToolkit REQUIRED)

  add_library(headwise_cuda INTERFACE)
  add_library(headwise::cuda ALIAS headwise_cuda)
  target_link_libraries(headwise_cuda INTERFACE headwise CUDA::cudart)
  # CMake 3.25 has no CUDA 20 for every nvcc; nvcc itself has it since 12.0.
  target_compile_options(headwise_cuda INTERFACE $<$<COMPILE_LANGUAGE:CUDA>:-std=c++20>)
endif()
