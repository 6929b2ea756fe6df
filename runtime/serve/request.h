// Bodies of requests, read strictly: what is not known, or not done, is refused by name.
#pragma once

#include "runtime/serve/scheduler.h"
#include "runtime/serve/served_model.h"

namespace pare::serve {

struct Asked {
  Work work;
  bool chat = false;
  bool stream = false;
  bool usage_in_stream = false;
};

// POST /v1/completions and /v1/chat/completions. `seed`: where the body names none. Errors: ApiError.
Asked read_completion(const Json& body, const ServedModel& model, std::uint64_t seed);
Asked read_chat(const Json& body, const ServedModel& model, std::uint64_t seed);

}  // namespace pare::serve
