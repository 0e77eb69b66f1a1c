# SPDX-License-Identifier: MIT
# What our own tests, benches and examples are compiled with; nothing of it reaches a consumer.
option(HEADWISE_WERROR "Treat warnings in our own code as errors" OFF)
option(HEADWISE_NATIVE "Compile for this host, so that every vector ISA it has is exercised" ON)
option(HEADWISE_FUZZ "Build the fuzz targets: clang++ only" OFF)
option(HEADWISE_HARDENED "Keep the library's checks in optimised builds" OFF)
option(HEADWISE_CHECK_ONLY "Look for warnings alone: no object is made, nothing is linked" OFF)
option(HEADWISE_UNITY "Compile the tests several files at a time" OFF)
set(HEADWISE_SANITIZE "" CACHE STRING "Sanitizers, as in -fsanitize=: address,undefined")

if(PROJECT_IS_TOP_LEVEL AND NOT CMAKE_BUILD_TYPE AND NOT CMAKE_CONFIGURATION_TYPES)
  set(CMAKE_BUILD_TYPE Release CACHE STRING "Debug, Release, RelWithDebInfo" FORCE)
endif()
find_program(CCACHE_PROGRAM ccache)
if(PROJECT_IS_TOP_LEVEL AND CCACHE_PROGRAM AND NOT DEFINED CMAKE_CXX_COMPILER_LAUNCHER)
  set(CMAKE_CXX_COMPILER_LAUNCHER ${CCACHE_PROGRAM})
  set(CMAKE_C_COMPILER_LAUNCHER ${CCACHE_PROGRAM})
endif()
enable_language(C)  # engines in C: tests/c_face and an example
set(CMAKE_C_EXTENSIONS OFF)
set(CMAKE_CXX_EXTENSIONS OFF)
set(THREADS_PREFER_PTHREAD_FLAG ON)
find_package(Threads REQUIRED)

# The flags a strict consumer uses too; tests/flags compiles one without -isystem.
set(HEADWISE_WARNINGS -Wall -Wextra -Wpedantic -Wconversion -Wsign-conversion -Wshadow -Wdouble-promotion)

# g++ 12 sees overlaps and overruns in std::string's own memcpy (GCC bug 105651), and uninitialised values in its own AVX-512
# intrinsics wherever Eigen uses them (GCC bug 105593).
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
  set(HEADWISE_FALSE_ALARMS -Wno-restrict -Wno-array-bounds -Wno-stringop-overread -Wno-uninitialized -Wno-maybe-uninitialized)
endif()

# In a unity build a local name may hide a constant of another file; -Wshadow there is for builds without (preset clang).
set(developer_warnings ${HEADWISE_WARNINGS})
list(REMOVE_ITEM developer_warnings -Wshadow)
list(APPEND developer_warnings $<$<NOT:$<BOOL:$<TARGET_PROPERTY:UNITY_BUILD>>>:-Wshadow>)

add_library(headwise_developer INTERFACE)
target_link_libraries(headwise_developer INTERFACE headwise::headwise Threads::Threads)
target_compile_options(headwise_developer INTERFACE
  "$<$<COMPILE_LANGUAGE:C,CXX>:${developer_warnings}>"
  $<$<COMPILE_LANGUAGE:CXX>:${HEADWISE_FALSE_ALARMS}>
  $<$<AND:$<COMPILE_LANGUAGE:C,CXX>,$<BOOL:${HEADWISE_WERROR}>>:-Werror>
  $<$<AND:$<COMPILE_LANGUAGE:CXX>,$<BOOL:${HEADWISE_NATIVE}>>:-march=native>)
target_compile_definitions(headwise_developer INTERFACE
  $<$<BOOL:${HEADWISE_HARDENED}>:HEADWISE_HARDENED=1>)
if(HEADWISE_CHECK_ONLY)
  target_compile_options(headwise_developer INTERFACE $<$<COMPILE_LANGUAGE:C,CXX>:-fsyntax-only>)
  foreach(language C CXX)
    set(CMAKE_${language}_LINK_EXECUTABLE "${CMAKE_COMMAND} -E true")
  endforeach()
endif()
if(HEADWISE_SANITIZE)
  # What is left out of undefined takes half of the compiler's time again, and says of pointers what address says, too.
  set(sanitize -fsanitize=${HEADWISE_SANITIZE} -fno-sanitize=null,alignment,object-size,vptr
    -fno-sanitize-recover=all -fno-omit-frame-pointer)
  set(sanitized CXX)
  if(CMAKE_C_COMPILER_ID STREQUAL CMAKE_CXX_COMPILER_ID)  # runtimes are linked by the C++ compiler
    list(PREPEND sanitized C)
  endif()
  string(REPLACE ";" "," sanitized "${sanitized}")
  target_compile_options(headwise_developer INTERFACE $<$<COMPILE_LANGUAGE:${sanitized}>:${sanitize}>)
  target_link_options(headwise_developer INTERFACE ${sanitize})
endif()
