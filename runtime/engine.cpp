#include "runtime/engine.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <optional>

#include "core/error.h"
#include "runtime/forward.h"
#include "runtime/kernels.h"
#include "runtime/session_state.h"
#include "runtime/team.h"

namespace pare {
namespace {

class MappedEngine : public Engine {
 public:
  // `path`: the compact file; `opened`: what it was made of, or itself; `no_tokenizer`: why it carries none, if known.
  MappedEngine(const fs::path& path, const EngineOptions& options, fs::path opened,
               std::exception_ptr no_tokenizer = nullptr)
      : kernels_(choose_kernels(options.kernels)),
        file_(path),
        weights_(view_weights(file_)),
        options_(options),
        opened_(std::move(opened)),
        no_tokenizer_(std::move(no_tokenizer)) {
    if (options_.threads < 0 || options_.threads > kMaxThreads) {
      throw usage_error("threads", "0 to " + std::to_string(kMaxThreads), std::to_string(options_.threads));
    }
    if (options_.threads == 0) options_.threads = std::min(processors(), kMaxThreads);
    options_.kernels = kernels_.name;
    // A file of floats meets no int8 activations: it stays exact.
    const bool rounds = options_.int8_activations && std::any_of(file_.tensors().begin(), file_.tensors().end(),
                                                                 [](const auto& t) { return !t.codec.is_float(); });
    if (options_.kv.empty()) options_.kv = kv_name(rounds ? KvType::kMixed : KvType::kF32);
    kv_ = parse_kv(options_.kv);
  }

  const fs::path& path() const override { return opened_; }
  const CompactFile& file() const override { return file_; }
  const ModelConfig& config() const override { return file_.config(); }
  const EngineOptions& options() const override { return options_; }
  const Tokenizer& tokenizer() const override {
    std::call_once(tokenizer_once_, [this] {
      const std::optional<std::string> text = file_.embedded("tokenizer.json");
      if (!text && no_tokenizer_) std::rethrow_exception(no_tokenizer_);
      if (!text) {
        throw input_error(opened_.string(), "an embedded tokenizer", "none",
                          "export the model again from a folder that has tokenizer.json");
      }
      tokenizer_.emplace(Tokenizer::from_text(*text, opened_.string() + ": tokenizer.json"));
    });
    return *tokenizer_;
  }
  const Kernels& kernels() const { return kernels_; }
  const Weights& weights() const { return weights_; }
  KvType kv() const { return kv_; }

 private:
  const Kernels& kernels_;
  CompactFile file_;
  Weights weights_;
  EngineOptions options_;
  fs::path opened_;
  std::exception_ptr no_tokenizer_;
  KvType kv_ = KvType::kF32;
  mutable std::once_flag tokenizer_once_;
  mutable std::optional<Tokenizer> tokenizer_;
};

}  // namespace

std::shared_ptr<const Engine> Engine::open_compact(const fs::path& file, const EngineOptions& options,
                                                   const fs::path& origin, std::exception_ptr no_tokenizer) {
  return std::make_shared<MappedEngine>(file, options, origin.empty() ? file : origin, std::move(no_tokenizer));
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
        cache(engine->config(), engine->kv(), Forward::kBatch),
        forward(engine->config(), engine->weights(), engine->kernels(), engine->options().threads,
                engine->options().int8_activations) {}

  std::shared_ptr<const MappedEngine> engine;
  std::int64_t limit;
  std::int64_t position = 0;
  std::int64_t rows = 0;  // of the last feed
  // Where LongRoPE switches, keys of the shorter sequence do not fit any more, and a call that did not finish may have
  // pushed what a window sees out of its ring: then the ids are fed again.
  std::vector<std::int32_t> history;  // of all positions
  std::int64_t cached = 0;            // positions that the cache holds
  bool beyond = false;                // for which side of the switch
  std::atomic<bool> stop{false};
  KvCache cache;
  Forward forward;
  FloatBuffer hidden;    // [rows, hidden_size], before the final norm
  FloatBuffer kept;      // the last row of the last feed, while another one runs
  FloatBuffer gathered;  // of several sessions

  // Throws unless `ids` may follow.
  void check(std::span<const std::int32_t> ids) const;
  // Makes the cache fit what stands before `count` more ids, and room for them and for their hidden states.
  void prepare(std::int64_t count);
  void appended(std::span<const std::int32_t> ids);
  [[noreturn]] void stopped();
  // Runs `body` for sessions that it may fail: what it did to them is then undone, but for rows before the last one.
  template <class Body>
  static void attempt(std::span<Session* const> sessions, Body body);
  StateShape shape() const;
  StateContent content() const;
};

Session::Session(std::shared_ptr<const Engine> engine, std::int64_t max_positions)
    : impl_(std::make_unique<Impl>(std::move(engine), max_positions)) {}
Session::~Session() = default;
Session::Session(Session&&) noexcept = default;

void Session::Impl::check(std::span<const std::int32_t> ids) const {
  const auto count = static_cast<std::int64_t>(ids.size());
  const std::string place = engine->path().string();
  if (count > limit - position) {
    throw input_error(place, "at most " + std::to_string(limit) + " positions (context full)",
                      std::to_string(count) + " more at position " + std::to_string(position),
                      "shorten the text or split it into windows");
  }
  for (const std::int32_t id : ids) {
    if (id < 0 || id >= engine->config().vocab_size) {
      throw input_error(place, "token ids from 0 to " + std::to_string(engine->config().vocab_size - 1),
                        std::to_string(id));
    }
  }
}

void Session::Impl::stopped() {
  stop.store(false);
  throw Error(ExitCode::kInterrupted, engine->path().string(), "a call that ends by itself",
              "a request to stop");
}

template <class Body>
void Session::Impl::attempt(std::span<Session* const> sessions, Body body) {
  std::vector<bool> had_rows;
  for (Session* const session : sessions) {
    Impl& s = *session->impl_;
    const std::int64_t width = s.engine->config().hidden_size;
    s.kept.reserve(width);
    if (s.rows > 0) std::copy_n(s.hidden.data() + (s.rows - 1) * width, width, s.kept.data());
    had_rows.push_back(s.rows > 0);
  }
  try {
    for (Session* const session : sessions)
      if (session->impl_->stop.load()) session->impl_->stopped();
    body();
  } catch (...) {
    for (std::size_t i = 0; i < sessions.size(); ++i) {
      Impl& s = *sessions[i]->impl_;
      s.rows = had_rows[i] ? 1 : 0;
      if (had_rows[i]) std::copy_n(s.kept.data(), s.engine->config().hidden_size, s.hidden.data());
      if (!s.cache.holds(s.cached)) s.cached = 0;
    }
    throw;
  }
}

void Session::Impl::prepare(std::int64_t count) {
  const std::int64_t sequence = position + count;
  // Doubled, so that feeding one by one stays linear.
  if (const auto needed = static_cast<std::size_t>(sequence); needed > history.capacity())
    history.reserve(std::max(needed, 2 * history.capacity()));
  const bool now_beyond = rope_beyond(engine->config(), sequence);
  if (now_beyond != beyond && cached > 0) {
    cached = 0;
    cache.restart();
  }
  beyond = now_beyond;
  if (cached == 0) cache.restart();
  hidden.reserve(std::max(count, std::min(position - cached, Forward::kBatch)) * engine->config().hidden_size);
  while (cached < position) {  // what the switch made stale
    const Forward::Part part{&cache, cached, std::min(Forward::kBatch, position - cached), sequence, &stop};
    const std::span<const std::int32_t> stale{history.data() + cached, static_cast<std::size_t>(part.count)};
    if (!forward.run(stale, {&part, 1}, hidden.data())) stopped();
    cached += part.count;
  }
}

void Session::Impl::appended(std::span<const std::int32_t> ids) {
  history.insert(history.end(), ids.begin(), ids.end());
  rows = static_cast<std::int64_t>(ids.size());
  position = cached = position + rows;
}

void Session::feed(std::span<const std::int32_t> ids) {
  Impl& s = *impl_;
  const auto count = static_cast<std::int64_t>(ids.size());
  s.check(ids);
  if (count == 0) {
    s.rows = 0;
    return;
  }
  Session* const self = this;
  Impl::attempt({&self, 1}, [&] {
    s.prepare(count);
    const std::int64_t step = Forward::call_size(count);
    for (std::int64_t first = 0; first < count; first += step) {
      const std::int64_t n = std::min(step, count - first);
      const Forward::Part part{&s.cache, s.position + first, n, s.position + count, &s.stop};
      float* to = s.hidden.data() + first * s.engine->config().hidden_size;
      if (!s.forward.run(ids.subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(n)), {&part, 1}, to))
        s.stopped();
    }
  });
  s.appended(ids);
}

static_assert(Session::kMostFedTogether == Forward::kBatch);

void Session::feed_each(std::span<Session* const> sessions, std::span<const std::int32_t> ids) {
  std::vector<std::span<const std::int32_t>> texts;
  for (std::size_t i = 0; i < ids.size(); ++i) texts.push_back(ids.subspan(i, 1));
  feed_each(sessions, texts);
}

void Session::feed_each(std::span<Session* const> sessions, std::span<const std::span<const std::int32_t>> texts) {
  std::vector<std::int32_t> ids;
  for (const std::span<const std::int32_t> text : texts) ids.insert(ids.end(), text.begin(), text.end());
  const bool empty = std::any_of(texts.begin(), texts.end(), [](const auto& text) { return text.empty(); });
  if (sessions.size() != texts.size() || empty || ids.size() > static_cast<std::size_t>(kMostFedTogether)) {
    throw usage_error("feed_each", "ids for every session, " + std::to_string(kMostFedTogether) + " at most",
                      std::to_string(ids.size()) + " ids for " + std::to_string(texts.size()) + " of " +
                          std::to_string(sessions.size()) + " sessions");
  }
  if (sessions.empty()) return;
  for (std::size_t i = 0; i < sessions.size(); ++i) {
    const bool own = sessions[i]->impl_->engine == sessions[0]->impl_->engine;
    if (!own || std::find(sessions.begin(), sessions.begin() + static_cast<std::ptrdiff_t>(i), sessions[i]) !=
                    sessions.begin() + static_cast<std::ptrdiff_t>(i)) {
      throw usage_error("feed_each", "different sessions of one engine", own ? "one twice" : "another engine");
    }
    sessions[i]->impl_->check(texts[i]);
  }
  Impl& first = *sessions[0]->impl_;
  const std::int64_t width = first.engine->config().hidden_size;
  first.gathered.reserve(static_cast<std::int64_t>(ids.size()) * width);
  Impl::attempt(sessions, [&] {
    std::vector<Forward::Part> parts;
    for (std::size_t i = 0; i < sessions.size(); ++i) {
      Impl& s = *sessions[i]->impl_;
      const auto count = static_cast<std::int64_t>(texts[i].size());
      s.prepare(count);
      parts.push_back({&s.cache, s.position, count, s.position + count, &s.stop});
    }
    if (first.forward.run(ids, parts, first.gathered.data())) return;
    for (Session* const session : sessions)
      if (session->impl_->stop.load()) session->impl_->stopped();
  });
  const float* rows = first.gathered.data();
  for (std::size_t i = 0; i < sessions.size(); ++i) {
    Impl& s = *sessions[i]->impl_;
    const auto count = static_cast<std::int64_t>(texts[i].size());
    std::copy_n(rows, count * width, s.hidden.data());
    rows += count * width;
    s.appended(texts[i]);
  }
}

void Session::logits_each(std::span<Session* const> sessions, float* out) {
  if (sessions.empty()) return;
  Impl& first = *sessions[0]->impl_;
  const std::int64_t width = first.engine->config().hidden_size;
  first.gathered.reserve(static_cast<std::int64_t>(sessions.size()) * width);
  for (std::size_t i = 0; i < sessions.size(); ++i) {
    const Impl& s = *sessions[i]->impl_;
    if (s.engine != first.engine || s.rows == 0)
      throw usage_error("logits_each", "sessions of one engine that were fed",
                    s.rows == 0 ? "one that was not" : "another engine");
    float* row = first.gathered.data() + static_cast<std::int64_t>(i) * width;
    std::copy_n(s.hidden.data() + (s.rows - 1) * width, width, row);
  }
  first.forward.head(first.gathered.data(), static_cast<std::int64_t>(sessions.size()), out);
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

std::int64_t Session::rows() const {
  return impl_->rows;
}

std::span<const std::int32_t> Session::ids() const {
  return impl_->history;
}

std::uint64_t Session::cache_bytes() const {
  return impl_->cache.bytes();
}

void Session::truncate(std::int64_t position) {
  Impl& s = *impl_;
  if (position < 0 || position > s.position) {
    throw failure("truncate", "a position from 0 to " + std::to_string(s.position), std::to_string(position));
  }
  if (position == 0) return reset();
  if (!can_truncate(position)) {
    throw failure("truncate", "a position near " + std::to_string(s.position) + " (sliding windows keep no more)",
                  std::to_string(position), "reset the session and feed the text again");
  }
  s.position = position;
  s.cached = std::min(s.cached, position);
  s.rows = 0;
  s.history.resize(static_cast<std::size_t>(position));
}

bool Session::can_truncate(std::int64_t position) const {
  return position == 0 || (position > 0 && position <= impl_->position && impl_->cache.holds(position));
}

void Session::reset() {
  impl_->position = 0;
  impl_->rows = 0;
  impl_->cached = 0;
  impl_->beyond = false;
  impl_->history.clear();
  impl_->cache.restart();
}

void Session::cancel() noexcept {
  impl_->stop.store(true);
}

void Session::clear_cancel() noexcept {
  impl_->stop.store(false);
}

StateShape Session::Impl::shape() const {
  const ModelConfig& c = engine->config();
  return {engine->file().file_hash(), cache.type(),  c.num_layers, c.num_kv_heads,
          c.head_dim,                 c.hidden_size, c.vocab_size};
}

StateContent Session::Impl::content() const {
  // What the cache holds for the other side of LongRoPE's switch does not fit what is fed next.
  const bool fits = beyond == rope_beyond(engine->config(), position);
  const std::int64_t width = engine->config().hidden_size;
  return {history, fits ? cached : 0, rows > 0 ? hidden.data() + (rows - 1) * width : nullptr};
}

std::uint64_t Session::state_bytes() const {
  return pare::state_bytes(impl_->shape(), impl_->cache, impl_->content());
}

void Session::save(const std::function<void(std::span<const std::byte>)>& write) const {
  write_state(impl_->shape(), impl_->cache, impl_->content(), write);
}

void Session::save(const fs::path& file) const {
  AtomicFile out(file);
  save([&](std::span<const std::byte> bytes) { out.write(bytes); });
  out.commit();
}

void Session::load(std::span<const std::byte> state, const std::string& place) {
  Impl& s = *impl_;
  StateReader reader(state, s.shape(), s.cache, place);
  if (reader.positions() > s.limit)
    throw input_error(place, "at most " + std::to_string(s.limit) + " positions", std::to_string(reader.positions()),
                      "open the session with more");
  s.hidden.reserve(s.engine->config().hidden_size);
  s.cache.reserve(reader.cached());
  // Nothing fails from here on.
  reader.fill(s.cache);
  if (reader.has_row()) reader.row(s.hidden.data());
  s.rows = reader.has_row() ? 1 : 0;
  s.position = reader.positions();
  s.cached = reader.cached();
  s.history = reader.take_ids();
  s.beyond = rope_beyond(s.engine->config(), s.position);
}

void Session::load(const fs::path& file) {
  const MappedFile mapped(file);
  load(mapped.bytes(), file.string());
}

namespace {

class RuntimeLogits : public LogitsSource {
 public:
  explicit RuntimeLogits(std::shared_ptr<const Engine> engine) : engine_(engine), session_(std::move(engine)) {}
  std::string name() const override {
    return engine_->path().filename().string() + " (runtime, " + engine_->options().kernels + ")";
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
