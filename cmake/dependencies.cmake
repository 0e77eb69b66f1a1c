# SPDX-License-Identifier: MIT
# Packages of our own tests, benches and examples: the installed one, else a pinned download.
# The hashes are those that many public Bazel WORKSPACE and CMake files pin for the same URLs.
include(FetchContent)
set(FETCHCONTENT_QUIET ON)

set(gtest_url https://github.com/google/googletest/archive/refs/tags/v1.14.0.tar.gz)
set(gtest_sha256 8ad598c73ad796e0d8280b082cebd82a630d73e73cd3c70057938a6501bba5d7)
set(benchmark_url https://github.com/google/benchmark/archive/refs/tags/v1.8.3.tar.gz)
set(benchmark_sha256 6bc180a57d23d4d9515519f92b0c83d61b05b5bab188961f36ac7b06b0d9e9ce)
set(eigen3_url https://gitlab.com/libeigen/eigen/-/archive/3.4.0/eigen-3.4.0.tar.gz)
set(eigen3_sha256 8586084f71f9bde545ee7fa6d00288b264a2b7ac3607b974e54d13e7162c1c72)
set(nlohmann_json_url https://github.com/nlohmann/json/releases/download/v3.11.3/json.tar.xz)
set(nlohmann_json_sha256 d6c65aca6b1ed68e7a182f4757257b107ae403032760ed6ef121c9d55e81757d)

# headwise_need(GTest | benchmark | Eigen3 | nlohmann_json)
macro(headwise_need package)
  find_package(${package} QUIET)
  if(NOT ${package}_FOUND)
    headwise_fetch(${package})
  endif()
endmacro()

function(headwise_fetch package)
  string(TOLOWER ${package} name)
  FetchContent_GetProperties(${name})
  if(NOT ${name}_POPULATED)
    message(STATUS "${package} is not installed: fetching ${${name}_url}")
  endif()
  # Only what a test needs of each: no tests of theirs, no install rules.
  set(INSTALL_GTEST OFF CACHE INTERNAL "")
  set(BENCHMARK_ENABLE_TESTING OFF CACHE INTERNAL "")
  set(BENCHMARK_ENABLE_INSTALL OFF CACHE INTERNAL "")
  set(JSON_Install OFF CACHE INTERNAL "")
  if(package STREQUAL Eigen3)
    set(skip_cmake SOURCE_SUBDIR headers_only)  # a folder that is not there: Eigen's own CMake is not run
  endif()
  FetchContent_Declare(${name} URL ${${name}_url} URL_HASH SHA256=${${name}_sha256} ${skip_cmake})
  FetchContent_MakeAvailable(${name})
  if(package STREQUAL Eigen3 AND NOT TARGET Eigen3::Eigen)
    add_library(headwise_eigen INTERFACE)
    add_library(Eigen3::Eigen ALIAS headwise_eigen)
    target_include_directories(headwise_eigen SYSTEM INTERFACE ${eigen3_SOURCE_DIR})
  endif()
endfunction()

# ggml and llama.cpp are never fetched: the adapter's test, the examples that are built on them and the comparison in
# bench/ are left out where neither is installed. One installation has both, or ggml alone.
set(HEADWISE_GGML "" CACHE PATH
  "Where ggml (and llama.cpp) is installed; empty: where cmake/bootstrap.sh llama puts it, else the system")
if(NOT CMAKE_CROSSCOMPILING)
  set(ggml_hints ${HEADWISE_GGML})
  if(NOT ggml_hints)
    set(ggml_hints ${PROJECT_SOURCE_DIR}/build/llama/install)
  endif()
  find_package(ggml CONFIG QUIET HINTS ${ggml_hints})
  find_package(llama CONFIG QUIET HINTS ${ggml_hints})
endif()
if(NOT TARGET ggml::ggml)
  message(STATUS "ggml is not installed: its adapter is neither tested nor shown (cmake/bootstrap.sh llama)")
elseif(NOT TARGET llama)
  message(STATUS "llama.cpp is not installed: no example runs in it (cmake/bootstrap.sh llama)")
endif()
