# SPDX-License-Identifier: MIT
# Target `docs`, where Doxygen is installed: the reference of the public headers, in docs/html of the build folder.
# A type or a function without a comment is an error.
find_package(Doxygen 1.9 QUIET)
if(NOT DOXYGEN_FOUND)
  return()
endif()
set(HEADWISE_DOCS_DIR ${PROJECT_BINARY_DIR}/docs)
configure_file(${CMAKE_CURRENT_LIST_DIR}/Doxyfile.in ${HEADWISE_DOCS_DIR}/Doxyfile @ONLY)
add_custom_target(docs
  COMMAND ${CMAKE_COMMAND} -D DOXYGEN=${DOXYGEN_EXECUTABLE} -D FOLDER=${HEADWISE_DOCS_DIR}
    -P ${CMAKE_CURRENT_LIST_DIR}/docs_check.cmake
  COMMENT "Reference of the public headers: ${HEADWISE_DOCS_DIR}/html/index.html"
  VERBATIM)
