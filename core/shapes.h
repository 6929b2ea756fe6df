// The true configurations of published models, so that their size, memory and speed can be measured on random weights.
#pragma once

#include <span>
#include <string_view>

namespace pare {

struct PublishedShape {
  const char* name;        // "Llama-3.2-1B"
  const char* repository;  // where its config.json is published
  const char* config;      // the keys of that config.json that shape the model
};

std::span<const PublishedShape> shapes();
const PublishedShape* find_shape(std::string_view name);  // case does not matter

}  // namespace pare
