// A GGUF file, read strictly: mapped, nothing trusted (ggml docs/gguf.md; versions 2 and 3, little endian).
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/gguf.h"
#include "core/json.h"

namespace pare {

// A view into the mapping; `data` has no alignment guarantee beyond that of the file.
struct GgufView {
  std::string name;
  GgmlType type = GgmlType::kF32;
  std::vector<std::int64_t> shape;  // row-major: [rows, columns]; the file holds it reversed
  std::span<const std::byte> data;
  std::int64_t elements() const;
};

// The number that was meant by a float: the shortest decimal that is this float (1e-06, not 9.99999997e-07).
double shortest_double(float value);

class GgufFile {
 public:
  // Errors: exit 3 with the byte where the file stops being one: cut off, counts and lengths beyond the file, types
  // that are unknown, keys or names twice, shapes that overflow or are no whole blocks, tensors that overlap, leave gaps
  // or reach beyond the end.
  explicit GgufFile(const fs::path& path);
  static bool is_gguf(const fs::path& path);  // cheap: a regular file that begins with GGUF

  const fs::path& path() const { return file_.path(); }
  int version() const { return version_; }
  std::uint64_t file_bytes() const { return file_.bytes().size(); }
  std::uint64_t tensor_bytes() const;  // without what pads them
  const MappedFile& file() const { return file_; }
  const std::vector<GgufView>& tensors() const { return tensors_; }  // in file order
  const GgufView* find(std::string_view name) const;

  std::vector<std::string> keys() const;  // in file order
  bool has(std::string_view key) const { return values_.find(key) != values_.end(); }
  // Values of a key, nothing where it is missing. Errors: exit 3 where it has another type.
  std::optional<std::int64_t> integer(std::string_view key) const;  // any whole-number type up to 2^62
  std::optional<double> number(std::string_view key) const;         // a float, finite, or a whole number
  std::optional<bool> flag(std::string_view key) const;
  std::optional<std::string> text(std::string_view key) const;      // valid UTF-8
  std::optional<std::vector<std::string>> texts(std::string_view key) const;
  std::optional<std::vector<std::int64_t>> integers(std::string_view key) const;
  std::optional<std::vector<float>> numbers(std::string_view key) const;  // F32 elements as they are
  bool is_array(std::string_view key) const;
  std::uint64_t array_size(std::string_view key) const;  // 0: no array
  Json shown(std::string_view key) const;  // for people: texts cut, of arrays the length and the first elements

 private:
  struct Value {
    std::uint32_t type = 0, element = 0;  // element: of an array
    std::uint64_t count = 1;
    std::uint64_t begin = 0;  // of the value's bytes, behind type and count
  };
  class Reader;
  const Value* value(std::string_view key) const;
  std::string place(std::string_view key) const;
  [[noreturn]] void wrong(std::string_view key, const char* wanted) const;

  MappedFile file_;
  int version_ = 0;
  std::vector<GgufView> tensors_;
  std::map<std::string, std::size_t, std::less<>> by_name_;
  std::map<std::string, Value, std::less<>> values_;
  std::vector<std::string> keys_;
};

}  // namespace pare
