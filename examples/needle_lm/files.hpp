// SPDX-License-Identifier: MIT
/// @file files.hpp
/// Whole files in, whole files out.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <system_error>
#include <vector>

#include "headwise/core/check.hpp"

namespace needle_lm {

/// All bytes of a regular file.
/// @throws FormatError when it is not there, cannot be read, or has more than `max_bytes`.
inline std::vector<char> read_file(const std::string& path, std::uintmax_t max_bytes) {
  std::error_code error;
  if (!std::filesystem::is_regular_file(path, error)) {
    headwise::fail<headwise::FormatError>(path, ": no such file");
  }
  const std::uintmax_t size = std::filesystem::file_size(path, error);
  if (!error && size > max_bytes) {
    headwise::fail<headwise::FormatError>(path, ": ", size, " bytes, more than the limit of ",
                                          max_bytes);
  }
  std::ifstream in(path, std::ios::binary);
  std::vector<char> bytes(error ? 0 : static_cast<std::size_t>(size));
  if (error || !in.read(bytes.data(), static_cast<std::streamsize>(bytes.size()))) {
    headwise::fail<headwise::FormatError>(path, ": cannot be read");
  }
  return bytes;
}

/// A JSON value for an error message: short, whatever the file says.
inline std::string brief(const nlohmann::json& value) {
  constexpr std::size_t kShown = 40;
  const std::string text = value.is_primitive() ? value.dump(-1, ' ', true) : value.type_name();
  return text.size() <= kShown ? text : text.substr(0, kShown) + "...";
}

/// A text file that appears under its name complete or not at all: it is written beside it and
/// renamed. Opened at once, so that a wrong path fails before the work and not after it.
class OutputFile {
 public:
  /// @throws ConfigError when the file cannot be created.
  explicit OutputFile(const std::string& path) : target_(path), partial_(path) {
    std::error_code error;
    const auto status = std::filesystem::status(target_, error);
    const bool is_device = std::filesystem::exists(status) && !is_regular_file(status);
    if (!is_device) {
      constexpr int kMaxLinks = 40;  // as Linux has it
      for (int i = 0; i < kMaxLinks && std::filesystem::is_symlink(target_, error); ++i) {
        target_ = target_.parent_path() / std::filesystem::read_symlink(target_, error);
      }
      partial_ = target_.string() + ".partial";
    }
    stream_.open(partial_, std::ios::binary);
    if (!stream_) headwise::fail<headwise::ConfigError>(path, ": cannot be written");
  }
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;

  ~OutputFile() {
    std::error_code ignored;
    if (partial_ != target_) std::filesystem::remove(partial_, ignored);
  }

  std::ostream& stream() { return stream_; }

  /// @throws std::runtime_error when the disk did not take all of it.
  void finish() {
    stream_.close();
    std::error_code error;
    if (stream_ && partial_ != target_) std::filesystem::rename(partial_, target_, error);
    if (!stream_ || error) throw std::runtime_error(target_.string() + ": could not be written");
  }

 private:
  std::filesystem::path target_;
  std::filesystem::path partial_;
  std::ofstream stream_;
};

}  // namespace needle_lm
