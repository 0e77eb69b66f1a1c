// SPDX-License-Identifier: MIT
/// @file report.hpp
/// Results as a table for people, as CSV for programs, and progress while they are made.
#pragma once

#include <unistd.h>

#include <chrono>
#include <cstddef>
#include <cstdio>
#include <ostream>
#include <string>
#include <vector>

#include "evaluate.hpp"

namespace needle_lm {

inline void write_csv(std::ostream& out, const std::vector<Result>& results) {
  out << "policy,retrieval_share,kv_bytes,kv_share,tokens_per_s,passkey_em,cot_em,answer_em,"
         "mean_output_tokens\n";
  for (const Result& r : results) {
    char numbers[256];
    std::snprintf(numbers, sizeof numbers, "%.6f,%zu,%.6f,%.1f,%.6f,%.6f,%.6f,%.3f",
                  r.retrieval_share, r.kv_bytes, r.kv_share, r.tokens_per_s, r.passkey_exact,
                  r.cot_exact, r.answer_exact, r.mean_output_tokens);
    out << r.id << ',' << numbers << '\n';
  }
}

/// 78 columns, no colours.
inline void print_table(const std::vector<Result>& results, std::FILE* out) {
  const auto print_heads = [&](const char* policy, const char* heads, const char* mib,
                               const char* share, const char* speed, const char* passkey,
                               const char* cot, const char* answer, const char* tokens) {
    std::fprintf(out, "%-24s%6s%7s%6s%7s%8s%6s%7s%7s\n", policy, heads, mib, share, speed, passkey,
                 cot, answer, tokens);
  };
  print_heads("", "full", "KV", "KV", "decode", "passkey", "CoT", "right", "CoT");
  print_heads("policy", "heads", "MiB", "share", "tok/s", "exact", "exact", "answer", "tokens");
  for (const Result& r : results) {
    const double mib = static_cast<double>(r.kv_bytes) / (1024.0 * 1024.0);
    std::fprintf(out, "%-24s%5.0f%%%7.2f%6.2f%7.0f%8.3f%6.3f%7.3f%7.1f\n", r.title.c_str(),
                 100.0 * r.retrieval_share, mib, r.kv_share, r.tokens_per_s, r.passkey_exact,
                 r.cot_exact, r.answer_exact, r.mean_output_tokens);
  }
}

/// On a terminal a bar in place, elsewhere one line for each plan that is done; on stderr.
class Progress {
 public:
  explicit Progress(std::size_t total) : total_(total) {}

  void start(const std::string& title) {
    title_ = title;
    draw();
  }
  void step() {
    ++done_;
    draw();
  }
  void finish_plan() {
    if (is_terminal_) {
      std::fprintf(stderr, "\r%*s\r", kColumns, "");
    } else {
      std::fprintf(stderr, "%s: done, %zu of %zu documents in %.0f s\n", title_.c_str(), done_,
                   total_, seconds());
    }
  }

 private:
  static constexpr int kColumns = 79;
  static constexpr std::size_t kBar = 26;

  double seconds() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }

  void draw() const {
    if (!is_terminal_) return;
    const std::size_t filled = total_ == 0 ? kBar : kBar * done_ / total_;
    const std::string bar = std::string(filled, '#') + std::string(kBar - filled, '.');
    char time[32] = "";
    if (done_ > 0) {
      const double left =
          seconds() * static_cast<double>(total_ - done_) / static_cast<double>(done_);
      std::snprintf(time, sizeof time, "%.0f s left", left);
    }
    std::fprintf(stderr, "\r[%s] %zu/%zu  %-24s%13s", bar.c_str(), done_, total_, title_.c_str(),
                 time);
  }

  std::size_t total_;
  std::size_t done_ = 0;
  std::string title_;
  bool is_terminal_ = isatty(STDERR_FILENO) != 0;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

}  // namespace needle_lm
