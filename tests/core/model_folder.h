// A small model folder made on the spot.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <string>
#include <vector>

#include "core/checkpoint.h"
#include "core/error.h"
#include "tests/scratch.h"

namespace pare::testing {

inline void write_bytes(const fs::path& path, std::string_view bytes) {
  std::ofstream(path, std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

inline std::string safetensors_bytes(const std::string& header, const std::string& data) {
  const std::uint64_t length = header.size();
  std::string out(reinterpret_cast<const char*>(&length), 8);
  return out + header + data;
}

// The message of the pare::Error that `run` throws, with its exit code in front: "3 place: ...".
template <class F>
std::string error_of(F run) {
  try {
    run();
  } catch (const Error& problem) {
    return std::to_string(static_cast<int>(problem.code())) + " " + problem.what();
  }
  return "no error";
}

inline bool contains(const std::string& text, const std::string& part) { return text.find(part) != std::string::npos; }

// Two blocks, 128 wide, so that every group size divides something; tied.
inline Json small_config() {
  return Json::parse(R"({"architectures":["LlamaForCausalLM"],"model_type":"llama","hidden_size":128,
    "intermediate_size":96,"num_hidden_layers":2,"num_attention_heads":4,"num_key_value_heads":2,"vocab_size":50,
    "max_position_embeddings":64,"rms_norm_eps":1e-05,"rope_theta":10000.0,"hidden_act":"silu",
    "tie_word_embeddings":true,"bos_token_id":1,"eos_token_id":2,"torch_dtype":"float32","my_own_key":[1,{"a":null}]})");
}

inline std::vector<float> values_of(const TensorSpec& spec) {
  std::size_t count = 1;
  for (const std::int64_t size : spec.shape) count *= static_cast<std::size_t>(size);
  std::vector<float> values(count);
  std::uint32_t state = 12345u + static_cast<std::uint32_t>(spec.name.size() * 7919 + static_cast<unsigned char>(spec.name[spec.name.size() / 2]));
  for (float& value : values) {
    state = state * 1664525u + 1013904223u;
    value = static_cast<float>(static_cast<std::int32_t>(state)) * 0x1p-34f;
  }
  return values;
}

// Random codes; every code, zero and scale pattern of the codec occurs.
inline QuantizedTensor random_codes(const Codec& codec, std::int64_t rows, std::int64_t cols, std::uint32_t seed) {
  QuantizedTensor tensor;
  tensor.codec = codec;
  tensor.rows = rows;
  tensor.cols = cols;
  const auto next = [&] {
    seed = seed * 1664525u + 1013904223u;
    return seed >> 8;
  };
  const CodeRange range = code_range(codec.kind);
  const auto count = static_cast<std::uint32_t>(range.high - range.low + 1);
  for (std::int64_t i = 0; i < rows * cols; ++i)
    tensor.codes.push_back(static_cast<std::int8_t>(range.low + static_cast<int>(next() % count)));
  for (std::int64_t i = 0; i < rows * codec.groups(cols); ++i) {
    tensor.scales.push_back(static_cast<std::uint16_t>(next() % 0x3c00));  // 0 up to 1, subnormals too
    if (codec.kind == CodecKind::kQ4 && tensor.scales.back() % 3 == 1) tensor.scales.back() |= 0x8000u;
    if (codec.kind == CodecKind::kQ4a) tensor.zeros.push_back(static_cast<std::uint8_t>(next() % 16));
    if (codec.kind == CodecKind::kQ4m)  // -2 to 2, subnormals too
      tensor.minima.push_back(static_cast<std::uint16_t>(next() % 0x4000 | (next() % 2) << 15));
  }
  return tensor;
}

inline bool same(const QuantizedTensor& a, const QuantizedTensor& b) {
  return a.codec == b.codec && a.rows == b.rows && a.cols == b.cols && a.codes == b.codes && a.scales == b.scales &&
         a.zeros == b.zeros && a.minima == b.minima;
}

// A folder with these tensors as F32 (all expected ones unless `specs` is given).
inline void write_folder(const fs::path& folder, const Json& config, std::vector<TensorSpec> specs = {}) {
  fs::create_directories(folder);
  write_bytes(folder / "config.json", config.dump(2));
  if (specs.empty()) specs = expected_tensors(parse_config(config, nullptr, "config.json"));
  std::vector<TensorDecl> decls;
  for (const TensorSpec& spec : specs) decls.push_back({spec.name, DType::kF32, spec.shape});
  SafetensorsWriter writer(folder / "model.safetensors", decls, {{"format", "pt"}});
  for (const TensorSpec& spec : specs) {
    const std::vector<float> values = values_of(spec);
    writer.write(std::as_bytes(std::span(values)));
  }
  writer.finish();
}

}  // namespace pare::testing
