#include "core/random_weights.h"

#include <xxhash.h>

#include <algorithm>
#include <cmath>
#include <numbers>

#include "core/codec.h"
#include "core/error.h"
#include "core/placement.h"
#include "core/shards.h"

namespace pare {
namespace {

constexpr std::int64_t kChunk = 1 << 20;  // elements made, converted and written at a time
constexpr std::int64_t kTile = 1 << 14;   // elements of one thread's turn; even, so that pairs stay together

// splitmix64's output function: https://prng.di.unimi.it/splitmix64.c
std::uint64_t mix(std::uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

std::uint64_t stream_of(std::uint64_t seed, std::string_view name) {
  return XXH3_64bits_withSeed(name.data(), name.size(), seed);
}

double deviation(const ModelConfig& config) {
  const auto found = config.source.find("initializer_range");
  if (found == config.source.end() || !found->is_number()) return 0.02;
  return found->get<double>();
}

}  // namespace

void random_normals(std::uint64_t seed, std::string_view name, std::int64_t first, std::int64_t count, float* out) {
  const std::uint64_t stream = stream_of(seed, name);
  for (std::int64_t i = first; i < first + count;) {
    const std::uint64_t bits = mix(stream + static_cast<std::uint64_t>(i / 2 + 1) * 0x9e3779b97f4a7c15u);
    const float u = (static_cast<float>(bits >> 40) + 0.5f) * 0x1p-24f;
    const float angle = 2 * std::numbers::pi_v<float> * (static_cast<float>((bits >> 16) & 0xffffff) * 0x1p-24f);
    const float radius = std::sqrt(-2 * std::log(u));
    if (i % 2 == 0) {
      out[i - first] = radius * std::cos(angle);
      if (++i == first + count) break;
    }
    out[i - first] = radius * std::sin(angle);
    ++i;
  }
}

void write_random_model(const fs::path& folder, const ModelConfig& config, std::uint64_t seed, Context& context) {
  const auto spread = static_cast<float>(deviation(config));
  const std::vector<TensorSpec> specs = expected_tensors(config);
  const std::vector<StoredTensor> stored = stored_tensors(config, specs);
  std::uint64_t bytes = 0;
  for (const StoredTensor& spec : stored) bytes += TensorDecl{spec.name, DType::kBF16, spec.shape}.bytes();
  std::error_code unknown;
  const fs::space_info space = fs::space(folder, unknown);
  if (!unknown && space.available < bytes + (1 << 20))
    throw Error(ExitCode::kResources, folder.string(), std::to_string(bytes) + " free bytes",
                std::to_string(space.available), "choose another disk or fewer --layers");

  std::vector<float> values(static_cast<std::size_t>(kChunk));
  std::vector<std::uint16_t> halves(values.size());
  std::uint64_t done = 0;
  const auto write = [&](const StoredTensor& spec, SafetensorsWriter& out) {
    const std::int64_t elements = TensorView{spec.name, DType::kBF16, spec.shape, {}}.elements();
    const TensorRole role = spec.parts[0]->role;  // that of all parts
    const bool matrix = role != TensorRole::kNorm && role != TensorRole::kBias;
    const float constant = role == TensorRole::kNorm && !config.norm_adds_one ? 1.0f : 0.0f;
    for (std::int64_t first = 0; first < elements; first += kChunk) {
      const std::int64_t count = std::min(kChunk, elements - first);
#pragma omp parallel for schedule(dynamic)
      for (std::int64_t tile = 0; tile < count; tile += kTile) {
        const std::int64_t n = std::min(kTile, count - tile);
        float* at = values.data() + tile;
        if (matrix) random_normals(seed, spec.name, first + tile, n, at);
        for (std::int64_t i = 0; i < n; ++i)
          halves[static_cast<std::size_t>(tile + i)] = f32_to_bf16(matrix ? at[i] * spread : constant);
      }
      out.write(std::as_bytes(std::span(halves.data(), static_cast<std::size_t>(count))));
      done += static_cast<std::uint64_t>(count) * 2;
      context.progress->update(static_cast<std::int64_t>(done >> 20), "MiB of random weights");
      throw_if_interrupted(folder.string(), "run the same command again");
    }
  };

  std::vector<ShardTensor> tensors;
  for (const StoredTensor& spec : stored)
    tensors.push_back({{spec.name, DType::kBF16, spec.shape}, [&](SafetensorsWriter& out) { write(spec, out); }});
  context.progress->begin("new", static_cast<std::int64_t>(bytes >> 20));
  write_shards(folder, tensors);
  write_text(folder / "config.json", write_config(config, "bfloat16").dump(2) + "\n");
  context.progress->end();
}

}  // namespace pare
