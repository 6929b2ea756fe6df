// Checkpoint: a Hugging Face model folder, what stages take and give, or a file with a model. Weights are either float
// tensors or codes (a folder written by `quantize`); whoever asks for floats gets exactly the unpacked codes.
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

class GptqLinear;
class TensorStore;

class Checkpoint {
 public:
  // Reads config.json, generation_config.json and all headers, and checks that every expected tensor is there once
  // with its shape and nothing is left over (rotary inv_freq and a redundant tied lm_head are dropped as
  // transformers does). All problems are listed in one error (exit 3).
  // Quantized folders: compressed-tensors pack-quantized (int2/3/4/8, group or channel) and int-quantized (int8,
  // channel, with or without int8 inputs), plus codes.pare; GPTQ of 4 and 8 bits (core/gptq_folder.h), whose linears
  // are codes where a codec holds them and F32 otherwise (notes() says so).
  explicit Checkpoint(const fs::path& folder);
  // A folder, or a file: GGUF (core/gguf_arch.h) or compact.
  static Checkpoint open(const fs::path& path);

  const fs::path& folder() const { return folder_; }  // or the file
  bool is_file() const { return store_ != nullptr; }
  std::vector<std::string> notes() const;              // what opening it had to decide
  bool is_gptq() const;                                // a folder with linears of quant_method gptq
  const GptqLinear* gptq(std::string_view name) const;   // what is stored where the folder has it as one, else nullptr
  // The text of one of side_file_names(), or nothing; of licence files only what notice_obstacle() has nothing against. Of files, what they say in its place.
  std::optional<std::string> side_file(const std::string& name) const;
  // The text of a tokenizer.json, also where the model has another form of it; nothing where it has none. Exit 3.
  std::optional<std::string> tokenizer_text() const;
  const ModelConfig& config() const { return config_; }
  const std::vector<TensorSpec>& tensors() const { return specs_; }
  const TensorSpec& spec(std::string_view name) const;
  bool has(std::string_view name) const;

  DType dtype(std::string_view name) const;              // of the stored float tensor; F32 for codes
  std::string float_dtype() const;                       // "bfloat16": the dtype most weights are stored in
  Codec codec(std::string_view name) const;              // kF32/kF16/kBf16 or the quantized codec
  bool is_quantized(std::string_view name) const { return !codec(name).is_float(); }
  QuantizedTensor codes(std::string_view name) const;    // is_quantized only
  const TensorView& view(std::string_view name) const;   // float tensors only
  void read_f32(std::string_view name, float* out) const;            // all elements, unpacked
  std::vector<float> read_f32(std::string_view name) const;
  // Rows [first, first + count) of a float matrix.
  void read_rows_f32(std::string_view name, std::int64_t first, std::int64_t count, float* out) const;
  std::uint64_t tensor_bytes() const;                    // as stored, scales and packed codes counted, tied once
  void release(std::string_view name) const;             // drop its pages from memory

  // Content hash over config, tokenizer files and tensor bytes; cached beside nothing, costs one read.
  std::string content_hash() const;

 private:
  explicit Checkpoint(std::shared_ptr<TensorStore> store, const fs::path& path);
  fs::path folder_;
  std::shared_ptr<TensorStore> store_;  // of a file; null: a folder
  ModelConfig config_;
  std::vector<TensorSpec> specs_;
  std::map<std::string, std::size_t, std::less<>> spec_of_;
  struct Source;
  const Source& source(std::string_view name) const;
  std::map<std::string, std::shared_ptr<Source>, std::less<>> sources_;
  std::shared_ptr<ShardedTensors> shards_;
  std::shared_ptr<SafetensorsFile> side_;  // codes.pare
};

// Writes a model folder through a FolderTransaction that the caller owns. put_* may come in any order, each expected
// tensor exactly once; data goes to disk at once (bounded memory) and survives a crash: a new writer on the same
// work folder reports what is already there with has(). finish() assembles shards of at most 5 GB with the
// Hugging Face names, writes config.json (with quantization_config if any tensor has codes) and removes the pieces.
enum class FolderForm {
  kCompressedTensors,  // what that form cannot express: floats, and the codes in codes.pare
  kGptq, kGptqV2       // core/gptq_folder.h; every linear of codes has to have the same codec, other codes become floats
};

class CheckpointWriter {
 public:
  // dtype: storage of float tensors, "float32" | "float16" | "bfloat16".
  CheckpointWriter(fs::path work_folder, ModelConfig config, std::string dtype);
  ~CheckpointWriter();

  bool has(std::string_view name) const;
  void put(std::string_view name, const float* values);              // converted to dtype, shape from the config
  // In a type of its own, F32, F16 or BF16, which has to hold the values bit for bit, finite or not.
  void put_stored(std::string_view name, DType dtype, const float* values);
  void put_codes(std::string_view name, const QuantizedTensor& codes);
  // Puts a whole group (one decoder block, say) as one durable piece: either all of it is there after a crash or none.
  void begin_piece(const std::string& piece);
  void end_piece();
  bool has_piece(const std::string& piece) const;
  // A tensor put earlier, here or before a crash: unpacked codes, or the floats as stored (resume replays with it).
  void read_f32(std::string_view name, float* out) const;
  // The same for rows [first, first + count), before finish().
  void read_rows_f32(std::string_view name, std::int64_t first, std::int64_t count, float* out) const;
  // Its pages may leave memory; reading it again brings them back.
  void release(std::string_view name) const;
  // Copies tokenizer, chat template and generation files byte for byte from the original folder.
  void copy_side_files(const fs::path& from);
  void put_side_file(const std::string& name, std::string_view text);
  void set_form(FolderForm form);  // of finish()
  void finish();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// Names of the files besides weights and config.json that belong to a model and are copied between folders.
const std::vector<std::string>& side_file_names();

}  // namespace pare
