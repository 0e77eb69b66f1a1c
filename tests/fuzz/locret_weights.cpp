// SPDX-License-Identifier: MIT
// Any bytes as a safetensors file of retaining heads: weights or an error.
#include "headwise/policies/locret_weights.hpp"

#include <cstddef>
#include <cstdint>
#include <string_view>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  try {
    (void)headwise::locret::parse_weights(bytes, "fuzz.safetensors");
  } catch (const headwise::FormatError&) {
  }
  return 0;
}
