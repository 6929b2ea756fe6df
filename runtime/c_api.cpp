#include <algorithm>
#include <cstddef>
#include <cstring>
#include <new>

#include "core/error.h"
#include "core/version.h"
#include "runtime/engine.h"
#include "runtime/pare.h"

struct pare_model {
  std::shared_ptr<const pare::Engine> engine;
};

struct pare_session {
  std::shared_ptr<const pare::Engine> engine;
  pare::Session session;
  std::int64_t limit;
};

struct pare_sampler {
  pare::Sampler sampler;
};

namespace {

thread_local std::string g_last_error;
thread_local int g_last_status = PARE_OK;

int report(int status, const char* text) {
  g_last_status = status;
  try {
    g_last_error = text;
  } catch (...) {
    g_last_error.clear();
  }
  return status;
}

// Runs `body`, turning every exception into a status and a text: none may cross into C.
template <class Body>
int guarded(Body body) {
  try {
    body();
    return PARE_OK;
  } catch (const pare::Error& e) {
    return report(static_cast<int>(e.code()), e.what());
  } catch (const std::bad_alloc&) {
    return report(PARE_RESOURCES, "out of memory");
  } catch (const std::exception& e) {
    return report(PARE_FAILURE, e.what());
  } catch (...) {
    return report(PARE_FAILURE, "unknown failure");
  }
}

// The count that `body` returns, or minus the status.
template <class Body>
std::int64_t counted(Body body) {
  std::int64_t count = 0;
  const int status = guarded([&] { count = body(); });
  return status == PARE_OK ? count : -status;
}

void require(bool condition, const char* place, const char* expected, const char* found) {
  if (!condition) throw pare::usage_error(place, expected, found);
}

pare::EngineOptions engine_options(const pare_options* given) {
  pare::EngineOptions chosen;
  if (given == nullptr) return chosen;
  constexpr std::size_t kFirstSize = offsetof(pare_options, kv) + sizeof(pare_options::kv);  // of version 2
  require(given->size >= kFirstSize, "pare_options", "size from PARE_OPTIONS_INIT", "less");
  const auto* bytes = reinterpret_cast<const unsigned char*>(given);
  for (std::size_t i = sizeof(pare_options); i < given->size; ++i)
    require(bytes[i] == 0, "pare_options", "fields that this version of the library has", "a later one, not zero");
  chosen.threads = given->threads;
  chosen.int8_activations = given->float_activations == 0;
  if (given->kernels != nullptr) chosen.kernels = given->kernels;
  if (given->kv != nullptr) chosen.kv = given->kv;
  return chosen;
}

std::vector<pare::Session*> sessions_of(pare_session* const* sessions, int64_t count, const char* place) {
  require(count >= 0 && count <= PARE_MOST_SESSIONS && (sessions != nullptr || count == 0), place,
          "sessions, PARE_MOST_SESSIONS at most", "NULL or another number");
  std::vector<pare::Session*> all;
  for (int64_t i = 0; i < count; ++i) {
    require(sessions[i] != nullptr, place, "sessions", "NULL");
    all.push_back(&sessions[i]->session);
  }
  return all;
}

}  // namespace

const char* pare_version(void) {
  return pare::kVersion;
}
int pare_api_version(void) {
  return PARE_API_VERSION;
}
const char* pare_last_error(void) {
  return g_last_error.c_str();
}
int pare_last_status(void) {
  return g_last_status;
}

pare_model* pare_open(const char* path, const pare_options* options) {
  pare_model* model = nullptr;
  guarded([&] {
    require(path != nullptr, "pare_open", "a path", "NULL");
    model = new pare_model{pare::Engine::open_compact(path, engine_options(options))};
  });
  return model;
}

void pare_close(pare_model* model) {
  delete model;
}

int pare_verify(const pare_model* model) {
  return guarded([&] {
    require(model != nullptr, "pare_verify", "a model", "NULL");
    const pare::CompactFile& file = model->engine->file();
    std::string changed;
    for (const std::string& name : file.verify()) changed += (changed.empty() ? "" : ", ") + name;
    if (!changed.empty())
      throw pare::input_error(file.path().string(), "the bytes that were written", "others in " + changed);
  });
}

int64_t pare_vocab_size(const pare_model* model) {
  return model == nullptr ? 0 : model->engine->config().vocab_size;
}

int64_t pare_context_size(const pare_model* model) {
  return model == nullptr ? 0 : model->engine->config().max_position_embeddings;
}

int pare_is_end(const pare_model* model, int32_t id) {
  if (model == nullptr) return 0;
  const auto& ends = model->engine->config().eos_ids;
  return std::find(ends.begin(), ends.end(), id) != ends.end() ? 1 : 0;
}

int64_t pare_tokenize(const pare_model* model, const char* text, size_t bytes, int add_special, int32_t* ids,
                      int64_t capacity) {
  return counted([&] {
    require(model != nullptr && (text != nullptr || bytes == 0) && (ids != nullptr || capacity <= 0), "pare_tokenize",
            "a model, a text and room for ids", "NULL");
    const auto found = model->engine->tokenizer().encode(
        bytes == 0 ? std::string_view() : std::string_view(text, bytes), add_special != 0, true);
    const auto fits = std::min<int64_t>(static_cast<int64_t>(found.size()), std::max<int64_t>(capacity, 0));
    std::copy(found.begin(), found.begin() + fits, ids);
    return static_cast<int64_t>(found.size());
  });
}

int64_t pare_detokenize(const pare_model* model, const int32_t* ids, int64_t count, char* text, int64_t capacity) {
  return counted([&] {
    require(model != nullptr && count >= 0 && (ids != nullptr || count == 0) && (text != nullptr || capacity <= 0),
            "pare_detokenize", "a model, ids and room for text", "NULL or a negative count");
    const std::string found = model->engine->tokenizer().decode({ids, static_cast<std::size_t>(count)}, true);
    const auto size = static_cast<int64_t>(found.size());
    const int64_t fits = std::min(size, std::max<int64_t>(capacity, 0));
    if (fits > 0) std::memcpy(text, found.data(), static_cast<std::size_t>(fits));
    if (fits < capacity) text[fits] = '\0';
    return size;
  });
}

pare_session* pare_session_open(const pare_model* model, int64_t max_positions) {
  pare_session* session = nullptr;
  guarded([&] {
    require(model != nullptr, "pare_session_open", "a model", "NULL");
    require(max_positions >= 0, "pare_session_open", "max_positions >= 0", "a negative number");
    const int64_t limit = max_positions > 0 ? max_positions : model->engine->config().max_position_embeddings;
    session = new pare_session{model->engine, pare::Session(model->engine, max_positions), limit};
  });
  return session;
}

void pare_session_close(pare_session* session) {
  delete session;
}

int pare_session_reset(pare_session* session) {
  return guarded([&] {
    require(session != nullptr, "pare_session_reset", "a session", "NULL");
    session->session.reset();
  });
}

int pare_session_truncate(pare_session* session, int64_t position) {
  return guarded([&] {
    require(session != nullptr, "pare_session_truncate", "a session", "NULL");
    require(position >= 0 && position <= session->session.position(), "pare_session_truncate",
            "a position from 0 to pare_session_position()", "another");
    session->session.truncate(position);
  });
}

int64_t pare_session_position(const pare_session* session) {
  return session == nullptr ? 0 : session->session.position();
}

int pare_feed(pare_session* session, const int32_t* ids, int64_t count) {
  return guarded([&] {
    require(session != nullptr && count >= 0 && (ids != nullptr || count == 0), "pare_feed", "a session and ids",
            "NULL or a negative count");
    session->session.feed({ids, static_cast<std::size_t>(count)});
  });
}

int pare_logits(pare_session* session, int64_t first, int64_t count, float* out) {
  return guarded([&] {
    require(session != nullptr && (out != nullptr || count == 0), "pare_logits", "a session and room for logits",
            "NULL");
    const int64_t rows = session->session.rows();
    require(first >= 0 && count >= 0 && first <= rows && count <= rows - first, "pare_logits",
            "rows of the last pare_feed()", "other rows");
    session->session.logits(first, count, out);
  });
}

int pare_feed_each(pare_session* const* sessions, const int32_t* ids, int64_t count) {
  return guarded([&] {
    const auto all = sessions_of(sessions, count, "pare_feed_each");
    require(ids != nullptr || count == 0, "pare_feed_each", "ids", "NULL");
    pare::Session::feed_each(all, {ids, all.size()});
  });
}

int pare_logits_each(pare_session* const* sessions, int64_t count, float* out) {
  return guarded([&] {
    const auto all = sessions_of(sessions, count, "pare_logits_each");
    require(out != nullptr || count == 0, "pare_logits_each", "room for logits", "NULL");
    pare::Session::logits_each(all, out);
  });
}

void pare_cancel(pare_session* session) {
  if (session != nullptr) session->session.cancel();
}

void pare_cancel_clear(pare_session* session) {
  if (session != nullptr) session->session.clear_cancel();
}

int pare_session_save(const pare_session* session, const char* path) {
  return guarded([&] {
    require(session != nullptr && path != nullptr, "pare_session_save", "a session and a path", "NULL");
    session->session.save(path);
  });
}

int pare_session_load(pare_session* session, const char* path) {
  return guarded([&] {
    require(session != nullptr && path != nullptr, "pare_session_load", "a session and a path", "NULL");
    session->session.load(path);
  });
}

int64_t pare_session_pack(const pare_session* session, void* state, int64_t capacity) {
  return counted([&] {
    require(session != nullptr && (state != nullptr || capacity <= 0), "pare_session_pack", "a session and room",
            "NULL");
    const auto size = static_cast<int64_t>(session->session.state_bytes());
    if (size > capacity) return size;
    auto* to = static_cast<std::byte*>(state);
    session->session.save([&](std::span<const std::byte> bytes) { to = std::copy(bytes.begin(), bytes.end(), to); });
    return size;
  });
}

int pare_session_unpack(pare_session* session, const void* state, size_t bytes) {
  return guarded([&] {
    require(session != nullptr && (state != nullptr || bytes == 0), "pare_session_unpack", "a session and a state",
            "NULL");
    session->session.load({static_cast<const std::byte*>(state), bytes}, "state");
  });
}

pare_sampler* pare_sampler_open(double temperature, double top_p, uint64_t seed) {
  pare_sampler* sampler = nullptr;
  guarded([&] { sampler = new pare_sampler{pare::Sampler({temperature, top_p, seed})}; });
  return sampler;
}

void pare_sampler_close(pare_sampler* sampler) {
  delete sampler;
}

int32_t pare_sample(pare_sampler* sampler, const float* logits, int64_t count) {
  return static_cast<int32_t>(counted([&] {
    require(sampler != nullptr && logits != nullptr && count > 0, "pare_sample", "a sampler and logits",
            "NULL or none");
    return static_cast<std::int64_t>(sampler->sampler({logits, static_cast<std::size_t>(count)}));
  }));
}

int64_t pare_generate(pare_session* session, pare_sampler* sampler, int64_t max_tokens, pare_on_token on_token,
                      void* user) {
  return counted([&] {
    require(session != nullptr && sampler != nullptr, "pare_generate", "a session and a sampler", "NULL");
    require(session->session.rows() > 0, "pare_generate", "something fed before", "nothing");
    const auto& config = session->engine->config();
    const auto& ends = config.eos_ids;
    std::vector<float> logits(static_cast<std::size_t>(config.vocab_size));
    pare::StreamDecoder decoder(session->engine->tokenizer());
    for (const std::int32_t id : session->session.ids()) decoder.push(id);
    int64_t count = 0;
    while (count < max_tokens) {
      session->session.logits(session->session.rows() - 1, 1, logits.data());
      const std::int32_t id = sampler->sampler(logits);
      if (std::find(ends.begin(), ends.end(), id) != ends.end()) break;
      ++count;
      std::string text = decoder.push(id);
      const bool last = count == max_tokens || session->session.position() >= session->limit;
      if (last) text += decoder.finish();
      const bool stop = on_token != nullptr && on_token(user, id, text.c_str()) != 0;
      if (last || stop) break;
      session->session.feed({&id, 1});
    }
    return count;
  });
}
