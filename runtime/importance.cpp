#include "runtime/importance.h"

#include <cmath>

#include "core/error.h"
#include "core/gguf_file.h"

namespace pare {
namespace {

constexpr std::string_view kSums = ".in_sum2", kCounts = ".counts";

std::vector<float> numbers(const GgufView& view, const std::string& place) {
  if (view.type != GgmlType::kF32) throw input_error(place + ": " + view.name, "F32", ggml_type_name(view.type));
  std::vector<float> out(static_cast<std::size_t>(view.elements()));
  ggml_to_f32(view.type, view.data.data(), view.elements(), out.data());
  for (const float value : out)
    if (!std::isfinite(value) || value < 0)
      throw input_error(place + ": " + view.name, "finite numbers of at least 0", std::to_string(value),
                        "compute the importance matrix again");
  return out;
}

}  // namespace

Importances Importances::read(const fs::path& path) {
  Importances out;
  out.place_ = path.string();
  if (!GgufFile::is_gguf(path))
    throw input_error(out.place_, "a GGUF file of llama-imatrix", "another file",
                      "llama-imatrix writes one with --output-format gguf");
  const GgufFile file(path);
  for (const GgufView& view : file.tensors()) {
    if (!view.name.ends_with(kSums)) continue;
    const std::string name = view.name.substr(0, view.name.size() - kSums.size());
    const std::string place = out.place_ + ": " + view.name;
    Matrix matrix;
    matrix.columns = view.shape.back();
    matrix.parts = view.elements() / matrix.columns;
    const GgufView* counted = file.find(name + std::string(kCounts));
    if (counted == nullptr || counted->elements() != matrix.parts)
      throw input_error(place, std::to_string(matrix.parts) + " numbers in " + name + std::string(kCounts),
                        counted == nullptr ? "none" : std::to_string(counted->elements()));
    matrix.means = numbers(view, out.place_);
    const std::vector<float> counts = numbers(*counted, out.place_);
    for (std::int64_t part = 0; part < matrix.parts; ++part) {
      const float count = counts[static_cast<std::size_t>(part)];
      matrix.seen.push_back(count > 0);
      for (std::int64_t i = part * matrix.columns; count > 0 && i < (part + 1) * matrix.columns; ++i) {
        float& mean = matrix.means[static_cast<std::size_t>(i)];
        mean /= count;
        if (!std::isfinite(mean))
          throw input_error(place, "sums that their counts divide", "a count of " + std::to_string(count),
                            "compute the importance matrix again");
      }
    }
    out.matrices_.emplace(name, std::move(matrix));
  }
  if (out.matrices_.empty())
    throw input_error(out.place_, "tensors named *.in_sum2", "none", "this is no file of llama-imatrix");
  return out;
}

bool Importances::has(const std::string& name, std::int64_t parts, std::int64_t columns) const {
  const auto found = matrices_.find(name);
  if (found == matrices_.end()) return false;
  const Matrix& matrix = found->second;
  if (matrix.columns != columns || (matrix.parts != 1 && matrix.parts != parts))
    throw input_error(place_ + ": " + name, std::to_string(parts) + " x " + std::to_string(columns) + " inputs",
                      std::to_string(matrix.parts) + " x " + std::to_string(matrix.columns),
                      "it was computed with another model");
  return true;
}

const float* Importances::of(const std::string& name, std::int64_t part, std::int64_t columns) const {
  const auto found = matrices_.find(name);
  if (found == matrices_.end()) return nullptr;
  const std::int64_t at = found->second.parts == 1 ? 0 : part;
  return found->second.seen[static_cast<std::size_t>(at)] ? found->second.means.data() + at * columns : nullptr;
}

}  // namespace pare
