# SPDX-License-Identifier: MIT
# The version stands once, in the header that also the preprocessor reads.
set(version_header ${CMAKE_CURRENT_LIST_DIR}/../include/headwise/core/version.hpp)
file(STRINGS ${version_header} version_lines REGEX "#define HEADWISE_VERSION_(MAJOR|MINOR|PATCH) ")
string(REGEX REPLACE "[^0-9;]" "" version_lines "${version_lines}")
list(JOIN version_lines . HEADWISE_VERSION)
if(NOT HEADWISE_VERSION MATCHES "^[0-9]+\\.[0-9]+\\.[0-9]+$")
  message(FATAL_ERROR "${version_header}: no HEADWISE_VERSION_MAJOR, _MINOR, _PATCH in this order")
endif()
