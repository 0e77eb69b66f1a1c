// SPDX-License-Identifier: MIT
// Any bytes as a file of query heads' scores, and as a config.json beside one: numbers or an error.
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "headwise/heads/json.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  try {
    (void)headwise::parse_head_runs(text, "fuzz.json");
  } catch (const headwise::FormatError&) {
  }
  try {
    (void)headwise::parse_window_config(text, "config.json");
  } catch (const headwise::FormatError&) {
  }
  return 0;
}
