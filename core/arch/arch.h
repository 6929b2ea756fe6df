// The table of model families: one row and one file each. A family turns config.json into plain ModelConfig fields
// and refuses, by name, every ingredient that the forwards do not have.
#pragma once

#include <span>
#include <string>

#include "core/arch/reader.h"
#include "core/config.h"

namespace pare {

struct Family {
  const char* name;          // model_type
  const char* architecture;  // architectures[0]
  // Defaults of transformers' configuration class, for keys that a saved config.json leaves out.
  std::int64_t default_max_positions;
  std::int64_t default_kv_heads;  // 0: as many as heads
  std::int64_t default_eos;       // -1: none
  // What differs from the common block: biases, sliding windows.
  void (*read)(ConfigReader& reader, ModelConfig& config);
  // Keys special to the family, added to a config.json that already has the common ones.
  void (*write)(const ModelConfig& config, Json& out);
};

extern const Family kLlama, kMistral, kQwen2;

std::span<const Family* const> families();
const Family* find_family(std::string_view name);

}  // namespace pare
