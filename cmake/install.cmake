# SPDX-License-Identifier: MIT
# Headers, CMake package and pkg-config file. All of it is independent of the architecture and may be moved.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)
set(package_dir ${CMAKE_INSTALL_DATADIR}/cmake/headwise)

install(DIRECTORY include/headwise DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}
  FILES_MATCHING PATTERN *.hpp PATTERN *.h PATTERN *.cuh)
install(TARGETS headwise EXPORT headwise-targets)
install(EXPORT headwise-targets NAMESPACE headwise:: DESTINATION ${package_dir})

configure_package_config_file(cmake/headwise-config.cmake.in ${PROJECT_BINARY_DIR}/headwise-config.cmake
  INSTALL_DESTINATION ${package_dir} NO_SET_AND_CHECK_MACRO)
# In 0.x a minor version may break.
write_basic_package_version_file(${PROJECT_BINARY_DIR}/headwise-config-version.cmake
  COMPATIBILITY SameMinorVersion ARCH_INDEPENDENT)
install(FILES ${PROJECT_BINARY_DIR}/headwise-config.cmake ${PROJECT_BINARY_DIR}/headwise-config-version.cmake
  DESTINATION ${package_dir})

configure_file(cmake/headwise.pc.in ${PROJECT_BINARY_DIR}/headwise.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/headwise.pc DESTINATION ${CMAKE_INSTALL_DATADIR}/pkgconfig)
install(FILES LICENSE DESTINATION ${CMAKE_INSTALL_DATADIR}/licenses/headwise)
