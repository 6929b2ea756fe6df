// llama.cpp as a client of our GGUF files, through its public interface (llama.h): built by tests/interop/llama_cpp.py
// against a checkout and its build folder, never by this project's own build.
//
//   llama_client tokenize FILE < TEXTS        a line of hex digits in, a line of ids out (specials parsed, none added)
//   llama_client greedy FILE COUNT OUT ID...  COUNT tokens in a row from the ids, without stopping at ends; on stdout
//                                             their ids, into OUT the logits behind every position as float32
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <string>
#include <vector>

#include "llama.h"

namespace {

[[noreturn]] void fail(const std::string& text) {
  std::fprintf(stderr, "llama_client: %s\n", text.c_str());
  std::exit(1);
}

llama_model* load(const char* path, bool vocabulary) {
  llama_model_params params = llama_model_default_params();
  params.vocab_only = vocabulary;
  params.check_tensors = !vocabulary;
  params.use_extra_bufts = false;  // the plain kernels of each type
  llama_model* model = llama_model_load_from_file(path, params);
  if (model == nullptr) fail(std::string("cannot load ") + path);
  return model;
}

int tokenize(const char* path) {
  const llama_vocab* vocab = llama_model_get_vocab(load(path, true));
  std::string hex;
  while (std::getline(std::cin, hex)) {
    std::string text;
    for (std::size_t i = 0; i + 1 < hex.size(); i += 2)
      text += static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16));
    std::vector<llama_token> ids(text.size() * 4 + 16);
    const int count = llama_tokenize(vocab, text.data(), static_cast<int>(text.size()), ids.data(),
                                     static_cast<int>(ids.size()), false, true);
    if (count < 0) fail("more tokens than bytes");
    for (int i = 0; i < count; ++i) std::printf("%s%d", i ? " " : "", ids[static_cast<std::size_t>(i)]);
    std::printf("\n");
  }
  return 0;
}

int greedy(const char* path, int count, const char* out, std::vector<llama_token> ids) {
  llama_model* model = load(path, false);
  const int vocab = llama_vocab_n_tokens(llama_model_get_vocab(model));
  llama_context_params params = llama_context_default_params();
  params.n_ctx = static_cast<std::uint32_t>(ids.size()) + static_cast<std::uint32_t>(count);
  params.n_batch = params.n_ubatch = params.n_ctx;
  params.type_k = params.type_v = GGML_TYPE_F32;
  params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
  params.n_threads = params.n_threads_batch = 1;
  llama_context* context = llama_init_from_model(model, params);
  if (context == nullptr) fail("no context");
  std::FILE* file = std::fopen(out, "wb");
  if (file == nullptr) fail(std::string("cannot write ") + out);
  std::vector<llama_token> next = ids;
  for (int step = 0; step < count; ++step) {
    if (llama_decode(context, llama_batch_get_one(next.data(), static_cast<int>(next.size()))) != 0)
      fail("decode failed at step " + std::to_string(step));
    const float* logits = llama_get_logits_ith(context, -1);
    if (logits == nullptr ||
        std::fwrite(logits, sizeof(float), static_cast<std::size_t>(vocab), file) != static_cast<std::size_t>(vocab))
      fail("logits");
    int best = 0;
    for (int i = 1; i < vocab; ++i)
      if (logits[i] > logits[best]) best = i;
    std::printf("%s%d", step ? " " : "", best);
    next = {best};
  }
  std::printf("\n");
  std::fclose(file);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  llama_log_set(
      [](ggml_log_level level, const char* text, void*) {
        if (level >= GGML_LOG_LEVEL_WARN && level != GGML_LOG_LEVEL_CONT) std::fputs(text, stderr);
      },
      nullptr);
  llama_backend_init();
  if (argc == 3 && std::strcmp(argv[1], "tokenize") == 0) return tokenize(argv[2]);
  if (argc >= 6 && std::strcmp(argv[1], "greedy") == 0) {
    std::vector<llama_token> ids;
    for (int i = 5; i < argc; ++i) ids.push_back(std::atoi(argv[i]));
    return greedy(argv[2], std::atoi(argv[3]), argv[4], ids);
  }
  fail("tokenize FILE, or greedy FILE COUNT OUT ID...");
}
