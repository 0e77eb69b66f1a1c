# SPDX-License-Identifier: MIT
# UNTESTED: an overlay port (vcpkg install headwise --overlay-ports=cmake/packaging) of the tree it lies in.
# A registry port would start with vcpkg_from_github and a release's SHA512 instead.
get_filename_component(SOURCE_PATH "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)
set(VCPKG_BUILD_TYPE release)  # headers only

vcpkg_cmake_configure(SOURCE_PATH "${SOURCE_PATH}"
  OPTIONS -DHEADWISE_BUILD_TESTS=OFF -DHEADWISE_BUILD_BENCHMARKS=OFF -DHEADWISE_BUILD_EXAMPLES=OFF)
vcpkg_cmake_install()
vcpkg_cmake_config_fixup(CONFIG_PATH share/cmake/headwise)
vcpkg_fixup_pkgconfig()
file(REMOVE_RECURSE "${CURRENT_PACKAGES_DIR}/share/licenses")
vcpkg_install_copyright(FILE_LIST "${SOURCE_PATH}/LICENSE")
