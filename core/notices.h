// The texts that go with a model into everything that is made of it: its licence, its notice and its card.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "core/file.h"

namespace pare {

inline constexpr const char* kModelCard = "README.md";

// LICENSE, LICENSE.txt, LICENSE.md, NOTICE.
const std::vector<std::string>& licence_file_names();
// Whether `name` is one of them or the card: what is published as it stands, without being read.
bool is_notice(const std::string& name);
// Why folder/name is not taken along: what a link out of the folder leads to is not the model's (links into the blobs
// of a Hugging Face cache are), nor is more than 1 MiB a licence. "": nothing against it, or no such file.
std::string notice_obstacle(const fs::path& folder, const std::string& name);
// The text, or nothing where there is none or something against it.
std::optional<std::string> read_notice(const fs::path& folder, const std::string& name);

// "ORG/NAME" where `folder` is a snapshot in a Hugging Face cache (models--ORG--NAME/snapshots/COMMIT), else "".
std::string cached_model_name(const fs::path& folder);

}  // namespace pare
