# SPDX-License-Identifier: MIT
# cmake -D DOXYGEN=<program> -D FOLDER=<with the Doxyfile> -P docs_check.cmake
# Fails on every warning of Doxygen but those about members of a class, which may be silent where their name says all.
file(REMOVE ${FOLDER}/warnings.txt)
execute_process(COMMAND ${DOXYGEN} ${FOLDER}/Doxyfile COMMAND_ERROR_IS_FATAL ANY)
file(STRINGS ${FOLDER}/warnings.txt warnings)
list(FILTER warnings EXCLUDE REGEX "Member .* of (class|struct|union) .* is not documented\\.$")
if(warnings)
  list(JOIN warnings "\n" warnings)
  message("${warnings}")
  message(FATAL_ERROR "the reference has gaps")
endif()
