#include "core/placement.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <stdexcept>

#include "core/arch/arch.h"

namespace pare {
namespace {

const Family& family_of(const ModelConfig& config) {
  const Family* family = find_family(config.family);
  if (family == nullptr) throw std::logic_error("placement: no family " + config.family);
  return *family;
}

// The elements of a transposed matrix, a few columns of one row at a time, so that both sides stay in cache lines.
template <std::size_t kSize>
void take_transposed(const Placement& place, std::int64_t cols, const std::byte* stored, std::int64_t first,
                     std::int64_t count, std::byte* out) {
  constexpr std::int64_t kTile = 16;
  const std::int64_t width = place.stored_rows();
  for (std::int64_t c0 = 0; c0 < cols; c0 += kTile)
    for (std::int64_t r = 0; r < count; ++r)
      for (std::int64_t c = c0; c < std::min(cols, c0 + kTile); ++c)
        std::memcpy(out + static_cast<std::size_t>(r * cols + c) * kSize,
                    stored + static_cast<std::size_t>(c * width + place.row(first + r)) * kSize, kSize);
}

template <std::size_t kSize>
void put_transposed(const Placement& place, std::int64_t rows, std::int64_t cols, const std::byte* own,
                    std::byte* stored) {
  constexpr std::int64_t kTile = 16;
  const std::int64_t width = place.stored_rows();
  for (std::int64_t c0 = 0; c0 < cols; c0 += kTile)
    for (std::int64_t r = 0; r < rows; ++r)
      for (std::int64_t c = c0; c < std::min(cols, c0 + kTile); ++c)
        std::memcpy(stored + static_cast<std::size_t>(c * width + place.row(r)) * kSize,
                    own + static_cast<std::size_t>(r * cols + c) * kSize, kSize);
}

std::int64_t columns(const TensorSpec& spec) { return spec.shape.size() == 2 ? spec.shape[1] : 1; }

}  // namespace

Placement renamed(std::string name, const TensorSpec& spec) {
  return {std::move(name), spec.shape, false, 0, spec.shape[0], spec.shape[0]};
}

std::optional<Placement> placement(const ModelConfig& config, const TensorSpec& spec) {
  const Family& family = family_of(config);
  if (family.place == nullptr) return std::nullopt;
  return family.place(config, spec);
}

bool rearranged(const Placement& place, const TensorSpec& spec) {
  return place.transposed || place.shape != spec.shape;
}

std::vector<StoredTensor> stored_tensors(const ModelConfig& config, const std::vector<TensorSpec>& specs) {
  std::vector<StoredTensor> tensors;
  std::map<std::string, std::size_t> known;
  for (const TensorSpec& spec : specs) {
    Placement place = placement(config, spec).value_or(renamed(spec.name, spec));
    const auto [found, added] = known.emplace(place.name, tensors.size());
    if (added) tensors.push_back({place.name, place.shape, place.transposed, {}, {}});
    tensors[found->second].parts.push_back(&spec);
    tensors[found->second].places.push_back(std::move(place));
  }
  return tensors;
}

void take_rows_from(const Placement& place, const TensorSpec& spec, const std::byte* stored, std::size_t size,
                    std::int64_t first, std::int64_t count, std::byte* out) {
  const std::int64_t cols = columns(spec);
  if (place.transposed) {
    const auto take = size == 2 ? take_transposed<2> : size == 4 ? take_transposed<4> : take_transposed<8>;
    return take(place, cols, stored, first, count, out);
  }
  const std::size_t row = static_cast<std::size_t>(cols) * size;
  for (std::int64_t r = 0; r < count; ++r)
    std::memcpy(out + static_cast<std::size_t>(r) * row, stored + static_cast<std::size_t>(place.row(first + r)) * row,
                row);
}

void put_into(const Placement& place, const TensorSpec& spec, const std::byte* own, std::size_t size,
              std::byte* stored) {
  const std::int64_t rows = spec.shape[0], cols = columns(spec);
  if (place.transposed) {
    const auto put = size == 2 ? put_transposed<2> : size == 4 ? put_transposed<4> : put_transposed<8>;
    return put(place, rows, cols, own, stored);
  }
  const std::size_t row = static_cast<std::size_t>(cols) * size;
  for (std::int64_t r = 0; r < rows; ++r)
    std::memcpy(stored + static_cast<std::size_t>(place.row(r)) * row, own + static_cast<std::size_t>(r) * row, row);
}

std::string base_prefix(const ModelConfig& config) { return family_of(config).prefix; }

bool is_buffer(const ModelConfig& config, std::string_view name) {
  if (name.ends_with(".rotary_emb.inv_freq")) return true;
  const auto buffers = family_of(config).buffers;
  return std::any_of(buffers.begin(), buffers.end(), [&](const char* suffix) { return name.ends_with(suffix); });
}

bool has_packed_form(const ModelConfig& config, const TensorSpec& spec, const Codec& codec) {
  return is_module(config, spec) && codec.kind != CodecKind::kQ4a && codec.kind != CodecKind::kQ4m;
}

bool is_module(const ModelConfig& config, const TensorSpec& spec) {
  if (spec.role != TensorRole::kLinear && spec.role != TensorRole::kHead) return false;
  const auto place = placement(config, spec);
  return !place || (!place->transposed && (spec.role != TensorRole::kHead || place->name == spec.name));
}

}  // namespace pare
