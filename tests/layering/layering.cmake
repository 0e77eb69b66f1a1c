# SPDX-License-Identifier: MIT
# cmake -D ROOT=<repository> -P layering.cmake
# Fails on an include that runs against the house, and on a header that lacks what every header has.
cmake_minimum_required(VERSION 3.22)

# core <- simd <- cache, core <- heads <- cache <- attention <- policies <- adapters
set(core_may_include core)
set(simd_may_include core simd)
set(heads_may_include core heads)
set(cache_may_include core simd heads cache)
set(attention_may_include core simd heads cache attention)
set(policies_may_include core simd heads cache attention policies)
set(adapters_may_include core simd heads cache attention policies adapters)
# Eigen/Core costs seconds a translation unit, and kernels have no use for it.
set(no_eigen "^(core|simd|cache|attention/cpu)/|\\.cuh$")

set(num_wrong 0)
macro(wrong header text)
  message("${header}: ${text}")
  math(EXPR num_wrong "${num_wrong} + 1")
endmacro()

set(house ${ROOT}/include/headwise)
file(STRINGS ${ROOT}/tests/layering/tested_elsewhere.txt tested_elsewhere REGEX "^[^#]")
list(TRANSFORM tested_elsewhere REPLACE ":.*" "")

file(GLOB_RECURSE headers RELATIVE ${house} ${house}/*.hpp ${house}/*.cuh)
foreach(header IN LISTS headers)
  file(STRINGS ${house}/${header} spdx LIMIT_COUNT 1)
  if(NOT spdx STREQUAL "// SPDX-License-Identifier: MIT")
    wrong(${header} "the first line is not the SPDX line")
  endif()
  file(STRINGS ${house}/${header} once REGEX "^#pragma once$")
  if(NOT once)
    wrong(${header} "no #pragma once")
  endif()

  string(REGEX MATCH "^[a-z]+/" room ${header})
  string(REPLACE "/" "" room "${room}")
  file(STRINGS ${house}/${header} includes REGEX "^ *# *include")
  foreach(include IN LISTS includes)
    if(include MATCHES "[<\"]headwise/([a-z]+)/" AND room AND NOT CMAKE_MATCH_1 IN_LIST ${room}_may_include)
      wrong(${header} "${room} must not include ${CMAKE_MATCH_1}")
    elseif(include MATCHES "\"" AND NOT include MATCHES "\"headwise/")
      wrong(${header} "${include} does not name its room")
    elseif(include MATCHES "[<\"](unsupported/)?Eigen/" AND header MATCHES "${no_eigen}")
      wrong(${header} "Eigen has no place here")
    endif()
  endforeach()

  # include/headwise/<room>/<file>.hpp is tested by tests/<room>/<file>_test.cpp
  cmake_path(REPLACE_EXTENSION header LAST_ONLY "" OUTPUT_VARIABLE test)
  if(room AND header MATCHES "\\.hpp$" AND NOT header IN_LIST tested_elsewhere
     AND NOT EXISTS ${ROOT}/tests/${test}_test.cpp)
    wrong(${header} "no tests/${test}_test.cpp")
  endif()
endforeach()

foreach(header IN LISTS tested_elsewhere)
  if(NOT header IN_LIST headers)
    wrong(${header} "in tested_elsewhere.txt, but there is no such header")
  endif()
endforeach()

list(LENGTH headers num_headers)
if(num_wrong OR NOT num_headers)
  message(FATAL_ERROR "${num_wrong} wrong in ${num_headers} headers")
endif()
message("${num_headers} headers, each in its room")
