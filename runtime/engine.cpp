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

namespace {

// `asked` beyond what the configuration says extrapolates rotary positions; learned ones end.
std::int64_t limit_of(const ModelConfig& config, std::int64_t asked) {
  if (asked <= 0) return config.max_position_embeddings;
  return config.learned_positions ? std::min(asked, config.max_position_embeddings) : asked;
}

}  // namespace

struct Session::Impl {
  Impl(std::shared_ptr<const Engine> engine_, std::int64_t max)
      : engine(std::static_pointer_cast<const MappedEngine>(std::move(engine_))),
        limit(limit_of(engine->config(), max)),
        cache(engine->config()),
        forward(engine->config(), engine->weights(), engine->kernels(), engine->options().threads,
                engine->options().int8_activations) {}

  std::shared_ptr<const MappedEngine> engine;
  std::int64_t limit;
  std::int64_t position = 0;
  std::int64_t rows = 0;  // of the last feed
  // Where LongRoPE switches, keys of the shorter sequence do not fit any more: the ids are kept and fed again.
  std::vector<std::int32_t> history;  // of all positions; LongRoPE only
  std::int64_t cached = 0;            // positions that the cache holds
  bool beyond = false;                // for which side of the switch
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
  const ModelConfig& config = s.engine->config();
  const std::int64_t begin = s.position, sequence = begin + count;
  s.rows = 0;
  if (count == 0) return;
  const bool beyond = rope_beyond(config, sequence);
  if (beyond != s.beyond) s.cached = 0;
  s.beyond = beyond;
  s.hidden.reserve(std::max(count, std::min(begin - s.cached, Forward::kBatch)) * config.hidden_size);
  while (s.cached < begin) {  // what the switch made stale
    const std::int64_t n = std::min(Forward::kBatch, begin - s.cached);
    s.forward.run(std::span(s.history).subspan(static_cast<std::size_t>(s.cached), static_cast<std::size_t>(n)),
                  s.cached, sequence, s.cache, s.hidden.data());
    s.cached += n;
  }
  // Where memory runs out, the positions before this call still stand.
  for (std::int64_t first = 0; first < count; first += Forward::kBatch) {
    const std::int64_t n = std::min(Forward::kBatch, count - first);
    s.forward.run(ids.subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(n)), begin + first, sequence,
                  s.cache, s.hidden.data() + first * config.hidden_size);
  }
  if (config.rope_long) s.history.insert(s.history.end(), ids.begin(), ids.end());
  s.position = s.cached = sequence;
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

std::uint64_t Session::cache_bytes() const {
  return impl_->cache.bytes();
}

void Session::reset() {
  impl_->position = 0;
  impl_->rows = 0;
  impl_->cached = 0;
  impl_->beyond = false;
  impl_->history.clear();
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
