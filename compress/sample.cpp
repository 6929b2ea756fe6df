#include "compress/sample.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <limits>
#include <mutex>
#include <vector>

#include "core/error.h"

namespace pare {
namespace {

// What a document begins with: the prefix the tokenizer would put there, else the end of the one before it.
std::vector<std::int32_t> first_ids(const Engine& engine) {
  std::vector<std::int32_t> ids = engine.tokenizer().prefix_ids();
  if (ids.empty() && !engine.config().eos_ids.empty())
    ids.push_back(static_cast<std::int32_t>(engine.config().eos_ids[0]));
  if (ids.empty()) {
    for (const char* piece : {"<|endoftext|>", "<|end_of_text|>", "</s>", "<s>"}) {
      const std::int32_t id = engine.tokenizer().id(piece);
      if (id >= 0) return {id};
    }
    ids.push_back(0);
  }
  return ids;
}

// Documents of one stream.
std::vector<std::string> sample_stream(const std::shared_ptr<const Engine>& engine, std::int64_t tokens,
                                       std::uint64_t seed) {
  const Tokenizer& tokenizer = engine->tokenizer();
  const ModelConfig& config = engine->config();
  const std::vector<std::int32_t> first = first_ids(*engine);
  const std::int64_t context = std::min(tokens, config.max_position_embeddings);
  if (context <= static_cast<std::int64_t>(first.size()))
    throw failure("sampling", "a context longer than the prefix", std::to_string(context));
  Sampler sampler({1.0, 1.0, seed});
  Session session(engine, context);
  std::vector<float> logits(static_cast<std::size_t>(config.vocab_size));
  std::vector<std::string> documents;
  std::int64_t spent = 0;
  while (spent < tokens) {
    session.reset();
    session.feed(first);
    session.logits(static_cast<std::int64_t>(first.size()) - 1, 1, logits.data());
    spent += static_cast<std::int64_t>(first.size());
    std::vector<std::int32_t> ids;
    while (spent < tokens) {
      if (interrupt_requested()) return documents;  // whoever runs the streams throws
      // Ids that the tokenizer does not know cannot become text.
      for (std::int64_t i = tokenizer.size(); i < config.vocab_size; ++i)
        logits[static_cast<std::size_t>(i)] = -std::numeric_limits<float>::infinity();
      const std::int32_t id = sampler(logits);
      ++spent;
      const bool ends = std::find(config.eos_ids.begin(), config.eos_ids.end(), id) != config.eos_ids.end() ||
                        std::find(first.begin(), first.end(), id) != first.end();
      if (ends) break;
      ids.push_back(id);
      if (session.position() >= context) break;
      session.feed({&id, 1});
      session.logits(0, 1, logits.data());
    }
    std::string text = tokenizer.decode(ids);
    if (text.find_first_not_of(" \t\r\n") != std::string::npos) documents.push_back(std::move(text));
  }
  return documents;
}

}  // namespace

void sample_text(const std::shared_ptr<const Engine>& engine, std::int64_t streams, std::int64_t tokens,
                 std::uint64_t seed, const fs::path& out, int threads, Progress& progress) {
  std::vector<std::vector<std::string>> documents(static_cast<std::size_t>(streams));
  engine->tokenizer();  // built on first use, before the threads
  std::atomic<std::int64_t> done{0};
  std::exception_ptr problem;
  std::mutex mutex;
  progress.begin("sampling text", streams * tokens);
#pragma omp parallel for schedule(dynamic) num_threads(threads > 0 ? threads : omp_get_num_procs())
  for (std::int64_t i = 0; i < streams; ++i) {
    if (interrupt_requested()) continue;
    try {
      documents[static_cast<std::size_t>(i)] = sample_stream(
          engine, tokens, seed * 0x9e3779b97f4a7c15u + static_cast<std::uint64_t>(i) * 0xbf58476d1ce4e5b9u + 1);
    } catch (...) {
      const std::lock_guard lock(mutex);
      if (!problem) problem = std::current_exception();
    }
    progress.update((done += 1) * tokens, std::to_string(done) + " of " + std::to_string(streams) + " documents");
  }
  if (problem) std::rethrow_exception(problem);
  throw_if_interrupted("sampling text", "run the same command again");
  std::string lines;
  for (const auto& stream : documents)
    for (const auto& text : stream)
      lines += Json{{"text", text}}.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
  progress.end();
  if (lines.empty())
    throw failure("sampling text", "text from the model", "only end-of-text tokens and blanks", "give --text");
  write_text(out, lines);
}

}  // namespace pare
