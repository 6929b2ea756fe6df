#include <algorithm>
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
  std::int64_t rows = 0;           // of the last feed
  std::vector<std::int32_t> seen;  // fed ids: the text decoder needs what came before
};

struct pare_sampler {
  pare::Sampler sampler;
};

namespace {

thread_local std::string g_last_error;

int report(int status, const char* text) {
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

void require(bool condition, const char* place, const char* expected, const char* found) {
  if (!condition) throw pare::usage_error(place, expected, found);
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

pare_model* pare_open(const char* path, const pare_options* options) {
  pare_model* model = nullptr;
  guarded([&] {
    require(path != nullptr, "pare_open", "a path", "NULL");
    pare::EngineOptions chosen;
    if (options != nullptr) {
      chosen.threads = options->threads;
      if (options->kernels != nullptr) chosen.kernels = options->kernels;
      chosen.int8_activations = options->float_activations == 0;
    }
    model = new pare_model{pare::Engine::open(path, chosen)};
  });
  return model;
}

void pare_close(pare_model* model) {
  delete model;
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
  int64_t count = -1;
  guarded([&] {
    require(model != nullptr && (text != nullptr || bytes == 0) && (ids != nullptr || capacity <= 0), "pare_tokenize",
            "a model, a text and room for ids", "NULL");
    const auto found = model->engine->tokenizer().encode(
        bytes == 0 ? std::string_view() : std::string_view(text, bytes), add_special != 0, true);
    const auto fits = std::min<int64_t>(static_cast<int64_t>(found.size()), std::max<int64_t>(capacity, 0));
    std::copy(found.begin(), found.begin() + fits, ids);
    count = static_cast<int64_t>(found.size());
  });
  return count;
}

int64_t pare_detokenize(const pare_model* model, const int32_t* ids, int64_t count, char* text, int64_t capacity) {
  int64_t bytes = -1;
  guarded([&] {
    require(model != nullptr && count >= 0 && (ids != nullptr || count == 0) && (text != nullptr || capacity <= 0),
            "pare_detokenize", "a model, ids and room for text", "NULL or a negative count");
    const std::string found = model->engine->tokenizer().decode({ids, static_cast<std::size_t>(count)}, true);
    const auto size = static_cast<int64_t>(found.size());
    const int64_t fits = std::min(size, std::max<int64_t>(capacity, 0));
    if (fits > 0) std::memcpy(text, found.data(), static_cast<std::size_t>(fits));
    if (fits < capacity) text[fits] = '\0';
    bytes = size;
  });
  return bytes;
}

pare_session* pare_session_open(const pare_model* model, int64_t max_positions) {
  pare_session* session = nullptr;
  guarded([&] {
    require(model != nullptr, "pare_session_open", "a model", "NULL");
    require(max_positions >= 0, "pare_session_open", "max_positions >= 0", "a negative number");
    const int64_t limit = max_positions > 0 ? max_positions : model->engine->config().max_position_embeddings;
    session = new pare_session{model->engine, pare::Session(model->engine, max_positions), limit, 0, {}};
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
    session->rows = 0;
    session->seen.clear();
  });
}

int64_t pare_session_position(const pare_session* session) {
  return session == nullptr ? 0 : session->session.position();
}

int pare_feed(pare_session* session, const int32_t* ids, int64_t count) {
  return guarded([&] {
    require(session != nullptr && count >= 0 && (ids != nullptr || count == 0), "pare_feed", "a session and ids",
            "NULL or a negative count");
    // Before feeding, so that nothing can fail after it; doubled, so that feeding one by one stays linear.
    auto& seen = session->seen;
    const std::size_t needed = seen.size() + static_cast<std::size_t>(count);
    if (needed > seen.capacity()) seen.reserve(std::max(needed, 2 * seen.capacity()));
    session->session.feed({ids, static_cast<std::size_t>(count)});
    session->rows = count;
    seen.insert(seen.end(), ids, ids + count);
  });
}

int pare_logits(pare_session* session, int64_t first, int64_t count, float* out) {
  return guarded([&] {
    require(session != nullptr && (out != nullptr || count == 0), "pare_logits", "a session and room for logits",
            "NULL");
    require(first >= 0 && count >= 0 && first <= session->rows && count <= session->rows - first, "pare_logits",
            "rows of the last pare_feed()", "other rows");
    session->session.logits(first, count, out);
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
  int32_t id = -1;
  guarded([&] {
    require(sampler != nullptr && logits != nullptr && count > 0, "pare_sample", "a sampler and logits",
            "NULL or none");
    id = sampler->sampler({logits, static_cast<std::size_t>(count)});
  });
  return id;
}

int64_t pare_generate(pare_session* session, pare_sampler* sampler, int64_t max_tokens, pare_on_token on_token,
                      void* user) {
  int64_t made = -1;
  guarded([&] {
    require(session != nullptr && sampler != nullptr, "pare_generate", "a session and a sampler", "NULL");
    require(session->rows > 0, "pare_generate", "something fed before", "nothing");
    const auto& config = session->engine->config();
    const auto& ends = config.eos_ids;
    std::vector<float> logits(static_cast<std::size_t>(config.vocab_size));
    pare::StreamDecoder decoder(session->engine->tokenizer());
    for (const std::int32_t id : session->seen) decoder.push(id);
    int64_t count = 0;
    while (count < max_tokens) {
      session->session.logits(session->rows - 1, 1, logits.data());
      const std::int32_t id = sampler->sampler(logits);
      if (std::find(ends.begin(), ends.end(), id) != ends.end()) break;
      ++count;
      std::string text = decoder.push(id);
      const bool last = count == max_tokens || session->session.position() >= session->limit;
      if (last) text += decoder.finish();
      const bool stop = on_token != nullptr && on_token(user, id, text.c_str()) != 0;
      if (last || stop) break;
      session->session.feed({&id, 1});
      session->rows = 1;
      session->seen.push_back(id);
    }
    made = count;
  });
  return made;
}
