// The compact file: one file, itself well-formed safetensors, in the order the kernels want (runtime/FORMAT.md).
#pragma once

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/codec.h"
#include "core/config.h"
#include "core/safetensors.h"

namespace pare {

struct CompactTensor {
  std::string name;
  Codec codec;
  std::vector<std::int64_t> shape;       // logical
  std::span<const std::byte> payload;    // starts on 64 bytes in the file; kernel order for codes, row-major for floats
  std::string hash;                      // XXH3-128 of the payload
};

class CompactFile {
 public:
  // Checks structure (version, shapes, payload sizes, alignment, every tensor of the config present); hashes only in verify().
  explicit CompactFile(const fs::path& path);
  static bool is_compact(const fs::path& path);  // cheap: a regular file with our metadata key

  const ModelConfig& config() const { return config_; }
  const std::vector<CompactTensor>& tensors() const { return tensors_; }
  const CompactTensor& tensor(std::string_view name) const;
  // Embedded files by name: "tokenizer.json", "config.json", "generation_config.json", "tokenizer_config.json",
  // "chat_template.jinja", "recipe", "report".
  std::optional<std::string> embedded(const std::string& name) const;
  std::string file_hash() const { return file_hash_; }
  int version() const { return version_; }
  std::uint64_t file_bytes() const;
  std::uint64_t tensor_bytes() const;    // payloads of weights only, padding counted
  std::vector<std::string> embedded_names() const;
  void release(const CompactTensor& tensor) const;  // drop its pages from memory
  // Recomputes all hashes; returns the names that differ ("pare.report" for the report, "file" for the file hash).
  // Empty: intact.
  std::vector<std::string> verify() const;
  const fs::path& path() const;

 private:
  std::shared_ptr<SafetensorsFile> file_;
  ModelConfig config_;
  std::vector<CompactTensor> tensors_;
  std::map<std::string, std::size_t, std::less<>> by_name_;
  std::map<std::string, std::span<const std::byte>> embedded_;
  std::string file_hash_, report_hash_;
  int version_ = 0;
};

// Streaming writer. Plan all tensors first, then add them in plan order; finish_payload() makes temporary() a file
// the runtime can open and be measured on; seal() stores the deterministic report, patches the file hash, and
// renames into place. Destroyed before seal() it leaves nothing behind.
class CompactWriter {
 public:
  struct Plan {
    std::string name;
    Codec codec;
    std::vector<std::int64_t> shape;
  };
  CompactWriter(fs::path path, std::vector<Plan> plan, std::map<std::string, std::string> embedded);
  ~CompactWriter();
  void add(const QuantizedTensor& tensor);     // next planned tensor has a quantized codec
  // Next planned tensor has a float codec (converted). as_stored: values that it holds bit for bit, finite or not.
  void add(const float* values, bool as_stored = false);
  const fs::path& finish_payload();
  void seal(const std::string& report_json);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace pare
