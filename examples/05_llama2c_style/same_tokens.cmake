# SPDX-License-Identifier: MIT
# run_plain and run_headwise (with the dense plan, and with half of the heads streaming) all generate the right answer.
cmake_minimum_required(VERSION 3.22)
set(needle_lm ${CMAKE_CURRENT_LIST_DIR}/../needle_lm)
execute_process(COMMAND ${EXPORT_MODEL} ${needle_lm} ${FOLDER} COMMAND_ERROR_IS_FATAL ANY)
file(READ ${FOLDER}/answer.txt answer)
string(REGEX MATCHALL "[0-9]+" tokens "${answer}")
list(LENGTH tokens count)
set(rope_theta 500000)  # as in needle_lm/model/config.json: llama2.c's format has no place for it

function(generate what)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE status OUTPUT_VARIABLE text ERROR_VARIABLE note)
  message(STATUS "${what}: ${text}   ${note}")
  if(NOT status EQUAL 0 OR NOT text STREQUAL answer)
    message(FATAL_ERROR "${what}: exit status ${status}, expected ${answer}")
  endif()
endfunction()
set(arguments ${FOLDER}/model.bin ${FOLDER}/prompt.txt ${count} ${rope_theta})
generate("plain" ${RUN_PLAIN} ${arguments})
generate("Headwise, every head keeps everything" ${RUN_HEADWISE} ${arguments})
generate("Headwise, half of the heads stream" ${RUN_HEADWISE} ${arguments} ${needle_lm}/heads/duo_attention.tsv)
