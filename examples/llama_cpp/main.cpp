// SPDX-License-Identifier: MIT
// A pretrained model in an unpatched libllama, its attention and KV cache taken over by Headwise.
#include <charconv>
#include <cstdio>
#include <cstring>
#include <exception>
#include <filesystem>
#include <string>
#include <string_view>
#include <system_error>

#include "chat.hpp"
#include "checks.hpp"
#include "measure.hpp"
#include "model.hpp"
#include "setup.hpp"

namespace {

using namespace in_llama;

constexpr const char* kUsage =
    "usage: in_llama COMMAND --model FILE.gguf [options]\n"
    "  demo     logits, batch, rollback, chat and memory, shortened\n"
    "  logits   every token's logits beside stock's two attention paths and beside double\n"
    "  batch    sequences of unlike lengths in one batch, and rollback\n"
    "  chat     a conversation that outgrows the stock cache\n"
    "  read     perplexity and bytes over a long text\n"
    "  memory   estimated, held and resident bytes at --tokens (8192)\n"
    "  speed    milliseconds a token at --tokens (8192), stock and ours in turns\n"
    "options\n"
    "  --tokens N      length of the text\n"
    "  --text PATH     a file, or a folder of files (/usr/share/common-licenses)\n"
    "  --heads TSV     scores of the model's KV heads; without, random heads stream\n"
    "  --sparsity S    share of KV heads that stream (0.5)\n"
    "  --sink N, --recent N    what they keep (64, 256)\n"
    "  --threads N     (2)\n";

/// The number that all of `text` is.
/// @throws ConfigError for another text, or one out of [least, most].
template <class T>
T number(const std::string& option, const std::string& text, T least, T most) {
  T value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size() || value < least || value > most) {
    headwise::fail<headwise::ConfigError>(option, " is ", text, ", expected a number in [", least,
                                          ", ", most, "]");
  }
  return value;
}

struct Arguments {
  std::string command;
  std::string model;
  std::string text = "/usr/share/common-licenses";
  std::string heads;
  double sparsity = 0.5;
  headwise::Window window{.sink = 64, .recent = 256};
  int num_threads = 2;
  std::int64_t num_tokens = 0;
};

Arguments parse(int argc, char** argv) {
  Arguments arguments;
  if (argc < 2) headwise::fail<headwise::ConfigError>("no command\n", kUsage);
  arguments.command = argv[1];
  for (int i = 2; i < argc; i += 2) {
    const std::string option = argv[i];
    if (i + 1 == argc) headwise::fail<headwise::ConfigError>(option, " needs a value");
    const std::string value = argv[i + 1];
    constexpr std::int64_t kMost = 1 << 20;
    if (option == "--model") {
      arguments.model = value;
    } else if (option == "--text") {
      arguments.text = value;
    } else if (option == "--heads") {
      arguments.heads = value;
    } else if (option == "--sparsity") {
      arguments.sparsity = number(option, value, 0.0, 1.0);
    } else if (option == "--sink") {
      arguments.window.sink = number<std::int64_t>(option, value, 0, kMost);
    } else if (option == "--recent") {
      arguments.window.recent = number<std::int64_t>(option, value, 1, kMost);
    } else if (option == "--threads") {
      arguments.num_threads = number(option, value, 1, 1024);
    } else if (option == "--tokens") {
      arguments.num_tokens = number<std::int64_t>(option, value, 256, kMost);
    } else {
      headwise::fail<headwise::ConfigError>(option, ": no such option\n", kUsage);
    }
  }
  return arguments;
}

bool run(const std::string& command, Setup setup) {
  if (command == "logits") return check_logits(setup);
  if (command == "batch") return check_ragged_batch(setup) && check_rollback(setup);
  if (command == "chat") return check_chat(setup);
  if (command == "read") return read_text(setup);
  if (command == "memory") return check_memory(setup, setup.tokens_or(8192));
  if (command == "speed") return measure_speed(setup, setup.tokens_or(8192));
  bool right = true;
  const auto run_with = [&](const char* each, std::int64_t num_tokens) {
    setup.num_tokens = num_tokens;
    right = run(each, setup) && right;
  };
  run_with("logits", 512);
  run_with("batch", 0);
  run_with("chat", 1024);
  run_with("memory", 8192);
  return right;
}

bool is_command(std::string_view command) {
  for (const char* each : {"demo", "logits", "batch", "chat", "read", "memory", "speed"}) {
    if (command == each) return true;
  }
  return false;
}

}  // namespace

int main(int argc, char** argv) try {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  const Arguments arguments = parse(argc, argv);
  if (!is_command(arguments.command)) {
    headwise::fail<headwise::ConfigError>(arguments.command, ": no such command\n", kUsage);
  }
  if (arguments.model.empty()) headwise::fail<headwise::ConfigError>("--model is missing");
  const Model model(arguments.model);
  const headwise::LayerShape& layer = model.shape().layer(0);
  std::printf("%s: %d layers, first one %d query and %d KV heads of width %d\n",
              std::filesystem::path(arguments.model).filename().c_str(), model.shape().num_layers(),
              layer.num_qo_heads(), layer.num_kv_heads, layer.k_dim);
  const bool right =
      run(arguments.command, {model, arguments.text, arguments.heads, arguments.sparsity,
                              arguments.window, arguments.num_threads, arguments.num_tokens});
  std::puts(right ? "ok" : "WRONG");
  return right ? 0 : 1;
} catch (const headwise::ConfigError& error) {
  return std::fprintf(stderr, "%s\n", error.what()), 2;
} catch (const headwise::FormatError& error) {
  return std::fprintf(stderr, "%s\n", error.what()), 2;
} catch (const std::exception& error) {
  return std::fprintf(stderr, "%s\n", error.what()), 1;
}
