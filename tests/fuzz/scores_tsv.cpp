// SPDX-License-Identifier: MIT
// Any bytes as a table of scores: numbers or an error, and what was read is read again from what
// the writer makes of it.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string_view>

#include "headwise/heads/tsv.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  try {
    const headwise::HeadScores scores = headwise::parse_tsv(text, "fuzz.tsv");
    const std::string written = headwise::to_tsv(scores);
    if (headwise::to_tsv(headwise::parse_tsv(written, "fuzz.tsv")) != written) std::abort();
  } catch (const headwise::FormatError&) {
  }
  return 0;
}
