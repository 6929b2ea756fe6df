// The runtime's logits behind the last positions of a sequence, for comparisons with other programs.
//
//   forced_logits FILE COUNT OUT ID...   into OUT the rows behind the last COUNT positions as float32, by float
//                                        activations; FILE: compact or GGUF
//   forced_logits FILE COUNT OUT int8 ID...   the same by int8 activations
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <vector>

#include "runtime/engine.h"

int main(int argc, char** argv) {
  if (argc < 5) return 2;
  try {
    const bool int8 = std::strcmp(argv[4], "int8") == 0;
    pare::EngineOptions options;
    options.threads = 1;
    options.int8_activations = int8;
    const auto engine = pare::Engine::open(argv[1], options);
    std::vector<std::int32_t> ids;
    for (int i = int8 ? 5 : 4; i < argc; ++i) ids.push_back(std::atoi(argv[i]));
    const auto vocab = static_cast<std::size_t>(engine->config().vocab_size);
    const auto count = static_cast<std::size_t>(std::atoi(argv[2]));
    if (count == 0 || count > ids.size()) return 2;
    pare::Session session(engine, static_cast<std::int64_t>(ids.size()));
    std::vector<float> logits(count * vocab);
    // One by one, as tokens come in generation.
    const std::size_t first = ids.size() - count;
    if (first > 0) session.feed(std::span(ids).first(first));
    for (std::size_t i = 0; i < count; ++i) {
      session.feed(std::span(ids).subspan(first + i, 1));
      session.logits(0, 1, logits.data() + i * vocab);
    }
    std::FILE* file = std::fopen(argv[3], "wb");
    if (file == nullptr || std::fwrite(logits.data(), sizeof(float), logits.size(), file) != logits.size()) return 1;
    return std::fclose(file) == 0 ? 0 : 1;
  } catch (const std::exception& problem) {
    std::fprintf(stderr, "%s\n", problem.what());
    return 1;
  }
}
