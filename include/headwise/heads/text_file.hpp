// SPDX-License-Identifier: MIT
/// @file text_file.hpp
/// Whole small files in and out; what the readers of score files share. Files are hostile.
#pragma once

#include <cerrno>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>

#include "headwise/core/check.hpp"

namespace headwise::inline v0::detail {

/// Far more heads in a score file than any model has (the largest open ones: 126 layers of 128
/// query heads).
inline constexpr std::size_t kMaxScores = std::size_t{1} << 20;

/// The largest published score file has 2.6 MB, kMaxScores of our own writing 26 MiB; a path such
/// as /dev/zero must not fill the memory.
inline constexpr std::size_t kMaxFileBytes = std::size_t{32} << 20;

struct CloseFile {
  void operator()(std::FILE* file) const { std::fclose(file); }
};
using File = std::unique_ptr<std::FILE, CloseFile>;

/// Whether `path` is a file that opens; a directory is none (fopen() opens it, reading fails).
inline bool can_open(const std::string& path) {
  const File file(std::fopen(path.c_str(), "rb"));
  return file && (std::fgetc(file.get()) != EOF || !std::ferror(file.get()));
}

/// @throws ConfigError when the file cannot be read, FormatError when it is too large.
inline std::string load_text(const std::string& path, std::size_t max_bytes = kMaxFileBytes) {
  const File file(std::fopen(path.c_str(), "rb"));
  if (!file) fail<ConfigError>("cannot open ", path, ": ", std::strerror(errno));
  std::string text;
  char buffer[1 << 16];
  while (const std::size_t read = std::fread(buffer, 1, sizeof buffer, file.get())) {
    text.append(buffer, read);
    if (text.size() > max_bytes) {
      fail<FormatError>(path, ": larger than the limit of ", max_bytes, " bytes");
    }
  }
  if (std::ferror(file.get())) fail<ConfigError>("cannot read ", path, ": ", std::strerror(errno));
  return text;
}

/// @throws ConfigError when the file cannot be written.
inline void save_text(const std::string& path, std::string_view text) {
  File file(std::fopen(path.c_str(), "wb"));
  const bool written = file && std::fwrite(text.data(), 1, text.size(), file.get()) == text.size();
  if (!written || std::fclose(file.release()) != 0) {
    fail<ConfigError>("cannot write ", path, ": ", std::strerror(errno));
  }
}

/// A piece of a file as an error message may show it: short and printable.
inline std::string excerpt(std::string_view piece) {
  constexpr std::size_t kMaxShown = 40;
  std::string text = "'";
  for (const char c : piece.substr(0, kMaxShown)) text += c >= ' ' && c <= '~' ? c : '#';
  return text + (piece.size() > kMaxShown ? "...'" : "'");
}

}  // namespace headwise::inline v0::detail
