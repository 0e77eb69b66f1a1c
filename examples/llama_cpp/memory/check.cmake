# SPDX-License-Identifier: MIT
# Do the hooks still fit llama.cpp, and does the memory compile with them?
#   cmake -D SOURCE=<llama.cpp's sources> -D WORK=<folder> -D COMPILER=<C++ compiler> -P check.cmake
file(REMOVE_RECURSE ${WORK})
file(GLOB sources ${SOURCE}/src/*.h ${SOURCE}/src/llama-memory.cpp ${SOURCE}/src/llama-model.cpp
  ${SOURCE}/src/llama-graph.cpp)
file(COPY ${sources} DESTINATION ${WORK}/src)
execute_process(COMMAND patch --batch --fuzz=0 --strip=1 --directory=${WORK} --input=${CMAKE_CURRENT_LIST_DIR}/hooks.patch
  COMMAND_ERROR_IS_FATAL ANY)
execute_process(
  COMMAND ${COMPILER} -std=c++20 -fsyntax-only -march=native -Wall -Wextra -Wpedantic -Wconversion -Wshadow -Werror
    -I${CMAKE_CURRENT_LIST_DIR}/../../../include -isystem ${WORK}/src -isystem ${SOURCE}/include
    -isystem ${SOURCE}/ggml/include ${CMAKE_CURRENT_LIST_DIR}/memory.cpp
  COMMAND_ERROR_IS_FATAL ANY)
