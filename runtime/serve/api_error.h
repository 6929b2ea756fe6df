// What a client did wrong, or what keeps the server from answering, in the form of OpenAI's errors.
#pragma once

#include <exception>
#include <string>

#include "core/json.h"

namespace pare::serve {

struct ApiError : std::exception {
  ApiError(int http_status, std::string text, std::string field = {}, std::string short_name = {})
      : status(http_status), message(std::move(text)), param(std::move(field)), code(std::move(short_name)) {}
  const char* what() const noexcept override { return message.c_str(); }
  Json body() const {
    const auto or_null = [](const std::string& value) { return value.empty() ? Json(nullptr) : Json(value); };
    const char* type = status < 500 && status != 429 ? "invalid_request_error" : "server_error";
    return {{"error", {{"message", message}, {"type", type}, {"param", or_null(param)}, {"code", or_null(code)}}}};
  }

  int status;
  std::string message, param, code;  // the last two may be empty
};

}  // namespace pare::serve
