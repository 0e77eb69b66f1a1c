// SPDX-License-Identifier: MIT
/// @file text.hpp
/// Real text to run a model over.
#pragma once

#include <algorithm>
#include <cstddef>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "headwise/core/check.hpp"
#include "model.hpp"

namespace in_llama {

/// The first `count` tokens of a file, or of all files of a folder one after the other (links are
/// left out), and again from the beginning where they are too few.
/// @throws ConfigError where there is no text.
inline std::vector<llama_token> text_tokens(const Model& model, const std::string& path,
                                            std::size_t count) {
  namespace fs = std::filesystem;
  std::vector<fs::path> files;
  if (fs::is_directory(path)) {
    for (const fs::directory_entry& entry : fs::directory_iterator(path)) {
      if (entry.is_regular_file() && !entry.is_symlink()) files.push_back(entry.path());
    }
    std::ranges::sort(files);
  } else if (fs::is_regular_file(path)) {
    files.emplace_back(path);
  }
  std::vector<llama_token> tokens;
  for (const fs::path& file : files) {
    if (tokens.size() >= count) break;
    std::ifstream in(file, std::ios::binary);
    const std::vector<llama_token> more =
        model.tokens({std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()});
    tokens.insert(tokens.end(), more.begin(), more.end());
  }
  if (tokens.empty()) {
    headwise::fail<headwise::ConfigError>(path, ": no text, expected a file or a folder of files");
  }
  while (tokens.size() < count) {
    const std::vector<llama_token> again(
        tokens.begin(),
        tokens.begin() +
            std::min(std::ssize(tokens), static_cast<std::ptrdiff_t>(count) - std::ssize(tokens)));
    tokens.insert(tokens.end(), again.begin(), again.end());
  }
  tokens.resize(count);
  return tokens;
}

}  // namespace in_llama
