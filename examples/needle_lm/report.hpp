// SPDX-License-Identifier: MIT
/// @file report.hpp
/// Results as a table for people, as CSV for programs, and progress while they are made.
#pragma once

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdio>
#include <ostream>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "evaluate.hpp"
#include "tasks.hpp"

namespace needle_lm {

inline void write_csv(std::ostream& out, const std::vector<Result>& results) {
  out << "policy,retrieval_share,kv_bytes,kv_share,tokens_per_s,passkey_em,cot_em,answer_em,"
         "mean_output_tokens\n";
  for (const Result& r : results) {
    const auto share = [&](std::size_t documents) {
      return static_cast<double>(documents) / static_cast<double>(r.num_documents);
    };
    char numbers[256];
    std::snprintf(numbers, sizeof numbers, "%.6f,%zu,%.6f,%.1f,%.6f,%.6f,%.6f,%.3f",
                  r.retrieval_share, r.kv_bytes, r.kv_share, r.tokens_per_s, share(r.passkey_exact),
                  share(r.cot_exact), share(r.answer_exact), r.mean_output_tokens);
    out << r.id << ',' << numbers << '\n';
  }
}

/// "1/2": one of two.
inline std::string fraction(std::size_t part, std::size_t whole) {
  return std::to_string(part) + "/" + std::to_string(whole);
}

/// 80 columns at most, no colours. Right answers are counted, as in "1/2": a share of two documents
/// would look like a measurement.
inline void print_table(const std::vector<Result>& results, std::FILE* out) {
  const auto print_heads = [&](const char* policy, const char* heads, const char* mib,
                               const char* share, const char* speed, const char* passkey,
                               const char* cot, const char* answer, const char* tokens) {
    std::fprintf(out, "%-24s%6s%7s%6s%7s%8s%8s%8s%6s\n", policy, heads, mib, share, speed, passkey,
                 cot, answer, tokens);
  };
  print_heads("", "full", "KV", "KV", "decode", "passkey", "chain", "answer", "words");
  print_heads("policy", "heads", "MiB", "share", "tok/s", "right", "right", "right", "out");
  for (const Result& r : results) {
    const double mib = static_cast<double>(r.kv_bytes) / (1024.0 * 1024.0);
    const auto right = [&](std::size_t documents) { return fraction(documents, r.num_documents); };
    std::fprintf(out, "%-24s%5.0f%%%7.2f%6.2f%7.0f%8s%8s%8s%6.0f\n", r.title.c_str(),
                 100.0 * r.retrieval_share, mib, r.kv_share, r.tokens_per_s,
                 right(r.passkey_exact).c_str(), right(r.cot_exact).c_str(),
                 right(r.answer_exact).c_str(), r.mean_output_tokens);
  }
}

/// What print_table()'s columns and the two tasks are.
inline void print_legend(const Tasks& tasks, std::FILE* out) {
  std::fprintf(out,
               "\n"
               "full heads     share of the KV heads that keep everything; the others stream\n"
               "KV MiB, share  pages that a sequence of %d tokens really holds, equal to the\n"
               "               library's estimate, and their share of the full cache's\n"
               "decode tok/s   generated tokens a second, of all sequences together\n"
               "passkey right  documents whose answer is right to the word. Needles, \"# key\n"
               "               12 words ;\", lie in filler; the end asks for one: \"? key\"\n"
               "chain right    documents whose chain of thought is right to the word. A\n"
               "               program lies in filler; the end asks for a variable, \"? x\",\n"
               "               and the model works it out line by line, then says \"ANS x 4\"\n"
               "answer right   of these, documents whose last value is right, whatever the chain\n"
               "words out      of a chain, as generated, on average; %zu would be right, and\n"
               "               an output is cut %zu words beyond that\n",
               static_cast<int>(kMeasuredTokens), tasks.cot.documents.front().answer_length,
               kOverlength);
}

/// What the rows of run-time selection are.
inline void print_selection_legend(std::FILE* out) {
  std::fprintf(
      out,
      "\n"
      "SnapKV 25%% ..  a prompt is read whole, then each KV head keeps a quarter of its\n"
      "               tokens (the heads' mean), chosen by the method, and all that\n"
      "               is generated. The question is read too, and always kept.\n"
      "               \"RLKV + \": of the heads that RLKV keeps, the others stream. KV is\n"
      "               what a prompt of that length holds once tokens were dropped\n");
}

/// The first question of each task, its answer, and what every policy made of it.
inline void print_questions(const Tasks& tasks, const std::vector<Result>& results,
                            std::FILE* out) {
  const auto line = [&](const std::string& who, const std::string& said, bool is_right) {
    std::fprintf(out, "%-28s%-42s%s\n", who.c_str(), said.c_str(), is_right ? "right" : "wrong");
  };
  const auto tail = [](std::span<const Token> tokens, std::size_t count) {
    return words(tokens.last(std::min(count, tokens.size())));
  };
  const Document& passkey = tasks.passkey.documents.front();
  std::fprintf(out, "\nOne passkey, asked for after %zu words: %s\n", passkey.prompt_length,
               tail(passkey.prompt(), 2).c_str());
  const std::size_t length = passkey.answer_length;  // an answer that runs on is cut here
  line("  the document says", words(passkey.answer()), true);
  for (const Result& r : results) {
    const std::span<const Token> said(r.passkey_output);
    line("  " + r.title, words(said.first(std::min(length, said.size()))), is_exact(said, passkey));
  }
  const Document& cot = tasks.cot.documents.front();
  std::fprintf(out, "\nOne variable, asked for after %zu words: %s\n", cot.prompt_length,
               tail(cot.prompt(), 3).c_str());
  const auto conclusion = [](std::span<const Token> output, const Document& document) {
    const auto slip = std::mismatch(output.begin(), output.end(), document.answer().begin(),
                                    document.answer().end());
    const auto lines =
        static_cast<std::size_t>(std::count(output.begin(), slip.first, kEndOfNeedle));
    const auto all = static_cast<std::size_t>(
        std::count(document.answer().begin(), document.answer().end(), kEndOfNeedle));
    const auto answer = std::find(output.begin(), output.end(), kAnswer);
    const auto first = static_cast<std::size_t>(answer - output.begin());
    const std::string value =
        answer == output.end()
            ? "no answer"
            : words(output.subspan(first, std::min<std::size_t>(3, output.size() - first)));
    return fraction(lines, all) + " lines to the first slip, " + value;
  };
  line("  the document says", conclusion(cot.answer(), cot), true);
  for (const Result& r : results) {
    line("  " + r.title, conclusion(r.cot_output, cot), has_right_value(r.cot_output, cot));
  }
}

/// On a terminal a bar in place, elsewhere one line for each plan that is done; on stderr.
class Progress {
 public:
  /// @param unit  what is counted.
  explicit Progress(std::size_t total, std::string unit = "documents")
      : total_(total), unit_(std::move(unit)) {}

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
      std::fprintf(stderr, "%s: done, %zu of %zu %s in %.0f s\n", title_.c_str(), done_, total_,
                   unit_.c_str(), seconds());
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
  std::string unit_;
  std::size_t done_ = 0;
  std::string title_;
  bool is_terminal_ = isatty(STDERR_FILENO) != 0;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

}  // namespace needle_lm
