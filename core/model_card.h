// The README.md of a folder that pare made: a Hugging Face model card
// (https://huggingface.co/docs/hub/model-cards) with the base model, its licence, every step that led here, and the
// figures that were measured.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "core/file.h"
#include "core/json.h"
#include "core/report.h"

namespace pare {

class Options;

struct ModelOrigin {
  std::string base;                                          // "" unknown
  std::vector<std::pair<std::string, std::string>> licence;  // license, license_name, license_link, where stated
  std::vector<std::string> steps;                            // of ours, so far
};
// What a folder's README.md, a GGUF file's keys or a compact file say of where a model comes from; where they say
// nothing its name, which a GGUF file has inside and a snapshot in a Hugging Face cache as ORG/NAME. (In GGUF files of
// others general.base_model is what the model itself was tuned from.)
ModelOrigin origin_of(const fs::path& model, bool folder_names = true);
// Base and licence for a file that has no name of its own for them: "pare.origin" of a compact file.
std::string origin_record(const ModelOrigin& origin);
inline constexpr const char* kOriginFile = "origin";
inline constexpr const char* kOriginKey = "pare.base_model";  // of a GGUF file that pare wrote

// The key of a GGUF file for "license", "license_name" or "license_link".
std::string gguf_key(const std::string& licence_key);

struct CardStep {
  fs::path from;         // the model that the step began with: a folder or a file; empty: nothing
  std::string command;   // "pare quantize --codec q4"
  Report figures;        // shown are the deterministic ones that describe a whole model
  std::string files;     // what else lies in the folder, in sentences; may be empty
};

// A command line for a shell of the options that are not at their defaults, without places: of paths and lists the last
// names, no outputs.
std::string command_of(const std::string& verb, const Options& options);

// Writes folder/README.md. Base model and licence are those of the README.md or GGUF keys of `from`, as far as they
// say; where `from` has a card of ours, its steps stand before this one. A model whose file holds codes is "quantized",
// one that was only converted has no relation to its base but being it. The same inputs give the same bytes.
void write_model_card(const fs::path& folder, const CardStep& step);

}  // namespace pare
