# SPDX-License-Identifier: MIT
# Compiles SOURCE, runs it, and compares what it prints with the file EXPECTED.
execute_process(COMMAND ${COMPILE} ${SOURCE} -o ${PROGRAM} COMMAND_ERROR_IS_FATAL ANY)
execute_process(COMMAND ${PROGRAM} OUTPUT_VARIABLE text RESULT_VARIABLE status)
file(READ ${EXPECTED} expected)
if(NOT status EQUAL 0 OR NOT text STREQUAL expected)
  message(FATAL_ERROR "exit status ${status}, printed\n${text}\nexpected\n${expected}")
endif()
