# SPDX-License-Identifier: MIT
# UNTESTED: conan create cmake/packaging/conan
import re
from pathlib import Path

from conan import ConanFile
from conan.tools.build import check_min_cppstd
from conan.tools.files import copy

ROOT = Path(__file__).resolve().parents[3]


class HeadwiseRecipe(ConanFile):
    name = "headwise"
    description = "Head-aware KV caches for transformer inference engines"
    license = "MIT"
    package_type = "header-library"
    settings = "os", "arch", "compiler", "build_type"
    no_copy_source = True

    def set_version(self):
        header = (ROOT / "include/headwise/core/version.hpp").read_text()
        self.version = ".".join(re.findall(r"#define HEADWISE_VERSION_\w+ (\d+)", header))

    def export_sources(self):
        copy(self, "include/headwise/*", ROOT, self.export_sources_folder)
        copy(self, "LICENSE", ROOT, self.export_sources_folder)

    def validate(self):
        check_min_cppstd(self, 20)

    def package(self):
        copy(self, "include/headwise/*", self.source_folder, self.package_folder)
        copy(self, "LICENSE", self.source_folder, Path(self.package_folder) / "licenses")

    def package_id(self):
        self.info.clear()

    def package_info(self):
        self.cpp_info.bindirs = []
        self.cpp_info.libdirs = []
        self.cpp_info.set_property("cmake_target_name", "headwise::headwise")
        self.cpp_info.set_property("pkg_config_name", "headwise")
