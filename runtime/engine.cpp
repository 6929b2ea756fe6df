#include "runtime/engine.h"

#include <omp.h>

#include <algorithm>
#include <mutex>
#include <optional>

#include "core/error.h"
#include "runtime/forward.h"
#include "runtime/kernels.h"

namespace pare {
namespace {

constexpr int kMaxThreads = 1024;  // the OpenMP runtime ends the program when it cannot start a thread

class MappedEngine : public Engine {
 public:
  MappedEngine(const fs::path& path, const EngineOptions& options)
      : kernels_(choose_kernels(options.kernels)), file_(path), weights_(view_weights(file_)), options_(options) {
    if (options_.threads < 0 || options_.threads > kMaxThreads) {
      throw usage_error("threads", "0 to " + std::to_string(kMaxThreads), std::to_string(options_.threads));
    }
    if (options_.threads == 0) options_.threads = std::min(omp_get_num_procs(), kMaxThreads);
    options_.kernels = kernels_.name;
  }

  const CompactFile& file() const override { return file_; }
  const ModelConfig& config() const override { return file_.config(); }
  const EngineOptions& options() const override { return options_; }
  const Tokenizer& tokenizer() const override {
    std::call_once(tokenizer_once_, [this] {
      const std::optional<std::string> text = file_.embedded("tokenizer.json");
      if (!text) {
        throw input_error(file_.path().string(), "an embedded tokenizer", "none",
                          "export the model again from a folder that has tokenizer.json");
      }
      tokenizer_.emplace(Tokenizer::from_text(*text, file_.path().string() + ": tokenizer.json"));
    });
    return *tokenizer_;
  }
  const Kernels& kernels() const { return kernels_; }
  const Weights& weights() const { return weights_; }

 private:
  const Kernels& kernels_;
  CompactFile file_;
  Weights weights_;
  EngineOptions options_;
  mutable std::once_flag tokenizer_once_;
  mutable std::optional<Tokenizer> tokenizer_;
};

}  // namespace

std::shared_ptr<const Engine> Engine::open(const fs::path& compact_file, const EngineOptions& options) {
  return std::make_shared<MappedEngine>(compact_file, options);
}

struct Session::Impl {
  Impl(std::shared_ptr<const Engine> engine_, std::int64_t max)
      : engine(std::static_pointer_cast<const MappedEngine>(std::move(engine_))),
        limit(max > 0 ? max : engine->config().max_position_embeddings),
        cache(engine->config()),
        forward(engine->config(), engine->weights(), engine->kernels(), engine->options().threads,
                engine->options().int8_activations) {}

  std::shared_ptr<const MappedEngine> engine;
  std::int64_t limit;
  std::int64_t position = 0;
  std::int64_t rows = 0;  // of the last feed
  KvCache cache;
  Forward forward;
  FloatBuffer hidden;  // [rows, hidden_size], before the final norm
};

Session::Session(std::shared_ptr<const Engine> engine, std::int64_t max_positions)
    : impl_(std::make_unique<Impl>(std::move(engine), max_positions)) {}
Session::~Session() = default;
Session::Session(Session&&) noexcept = default;

void Session::feed(std::span<const std::int32_t> ids) {
  Impl& s = *impl_;
  const auto count = static_cast<std::int64_t>(ids.size());
  const std::string place = s.engine->file().path().string();
  if (count > s.limit - s.position) {
    throw input_error(place, "at most " + std::to_string(s.limit) + " positions (context full)",
                      std::to_string(s.position + count), "shorten the text or split it into windows");
  }
  for (const std::int32_t id : ids) {
    if (id < 0 || id >= s.engine->config().vocab_size) {
      throw input_error(place, "token ids from 0 to " + std::to_string(s.engine->config().vocab_size - 1),
                        std::to_string(id));
    }
  }
  s.hidden.reserve(count * s.engine->config().hidden_size);
  const std::int64_t begin = s.position;
  s.rows = 0;
  try {
    for (std::int64_t first = 0; first < count; first += Forward::kBatch) {
      const std::int64_t n = std::min(Forward::kBatch, count - first);
      s.forward.run(ids.subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(n)), s.position, s.cache,
                    s.hidden.data() + first * s.engine->config().hidden_size);
      s.position += n;
    }
  } catch (...) {  // out of memory: the positions before this call still stand
    s.position = begin;
    throw;
  }
  s.rows = count;
}

void Session::logits(std::int64_t first, std::int64_t count, float* out) {
  Impl& s = *impl_;
  if (first < 0 || count < 0 || first > s.rows || count > s.rows - first) {
    throw failure("logits", "rows of the last feed: 0 to " + std::to_string(s.rows),
                  std::to_string(first) + " to " + std::to_string(first + count));
  }
  s.forward.head(s.hidden.data() + first * s.engine->config().hidden_size, count, out);
}

std::int64_t Session::position() const {
  return impl_->position;
}

void Session::reset() {
  impl_->position = 0;
  impl_->rows = 0;
}

namespace {

class RuntimeLogits : public LogitsSource {
 public:
  explicit RuntimeLogits(std::shared_ptr<const Engine> engine) : engine_(engine), session_(std::move(engine)) {}
  std::string name() const override {
    return engine_->file().path().filename().string() + " (runtime, " + engine_->options().kernels + ")";
  }
  std::int64_t vocab_size() const override { return engine_->config().vocab_size; }
  void begin(std::span<const std::int32_t> ids) override {
    session_.reset();
    session_.feed(ids);
  }
  void logits(std::int64_t first, std::int64_t count, float* out) override { session_.logits(first, count, out); }

 private:
  std::shared_ptr<const Engine> engine_;
  Session session_;
};

}  // namespace

std::unique_ptr<LogitsSource> runtime_logits(std::shared_ptr<const Engine> engine) {
  return std::make_unique<RuntimeLogits>(std::move(engine));
}

}  // namespace pare
