// Our models in the words of llama.cpp: which of its architectures computes a family, under which names and in which
// order of rows it wants the tensors, and the keys that describe the model.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "core/config.h"
#include "core/gguf.h"

namespace pare {

struct GgufArchitecture {
  const char* family;       // row of the arch table
  const char* name;         // general.architecture
  bool neighbours = false;  // rotary pairs are neighbours: rows of queries and keys change places
  bool free_heads = true;   // the width of the heads together may differ from the hidden size
  bool joined_qkv = false;  // q, k and v are one tensor
  bool slides = false;      // windows, in the blocks of a period
  bool llama3_rope = false, long_rope = false;
  bool o_bias = false, mlp_bias = false;
  bool untied = true, tied = true;
};

// Row for a family. Errors: exit 3 with every reason why llama.cpp would compute something else.
const GgufArchitecture& gguf_architecture(const ModelConfig& config, const std::string& place);
// Row for general.architecture and whether there are experts. Errors: exit 3, unknown.
const GgufArchitecture& gguf_architecture_named(const std::string& name, bool experts, const std::string& place);

// One tensor of a GGUF file: rows of one of ours, or of several in order (q, k, v; the experts of a block).
struct GgufPlacement {
  std::string name;
  std::vector<std::int64_t> shape;       // [rows, columns], [experts, rows, columns] or [length]
  std::vector<const TensorSpec*> parts;  // into the `specs` that were given
  bool neighbours = false;               // rows in llama.cpp's order
  bool adds_one = false;                 // norms that are kept as weight - 1 here
  bool always_f32 = false;               // vectors, routers, positions
};
std::vector<GgufPlacement> gguf_placements(const ModelConfig& config, const GgufArchitecture& arch,
                                           const std::vector<TensorSpec>& specs);

// Where neighbours are wanted: the row of ours that stands at `row` there, and the other way.
std::int64_t row_behind(std::int64_t row, std::int64_t head_dim);
std::int64_t row_before(std::int64_t row, std::int64_t head_dim);

// Vectors that are no weights: "rope_freqs.weight" and "rope_factors_long.weight", "rope_factors_short.weight".
std::vector<std::pair<std::string, std::vector<float>>> gguf_rope_tensors(const ModelConfig& config);

// 1 / sqrt of what llama.cpp divides attention by, of gemma2 and gemma3: their largest models, told by their number of
// blocks, have a rule of their own.
double gguf_attention_scale(const ModelConfig& config, const GgufArchitecture& arch);

// The GELU that published models of GPT-2 and GPT-NeoX have, for which there is no key.
Activation gguf_usual_gelu(const GgufArchitecture& arch);

using GgufPairs = std::vector<std::pair<std::string, GgufValue>>;
// "<arch>.*" keys. Notes: what holds for part of the context alone.
GgufPairs gguf_config_keys(const ModelConfig& config, const GgufArchitecture& arch, std::vector<std::string>& notes);

class GgufFile;
// The way back: keys and rope tensors as a config that parse_config takes. Errors: exit 3, missing keys, values beyond
// bounds, ingredients that are not supported.
ModelConfig gguf_config(const GgufFile& file, const GgufArchitecture& arch);

// tokenizer.ggml.* keys of a tokenizer.json, in core/gguf_tokenizer.cpp. `text`: of the tokenizer.json; `place`: of it;
// `chat`: the chat template. Notes say where llama.cpp differs on rare input.
GgufPairs gguf_tokenizer_keys(const std::string& text, const std::string& place, const ModelConfig& config,
                              const std::optional<std::string>& chat, std::vector<std::string>& notes);
// The way back, in core/gguf_tokenizer_read.cpp: the text of a tokenizer.json; nothing where the file has no
// vocabulary. Errors: exit 3 naming the key.
std::optional<std::string> gguf_tokenizer_json(const GgufFile& file, std::int64_t rows);
// tokenizer.ggml.token_type.
namespace gguf_token {
enum Type : std::int32_t { kNormal = 1, kUnknown = 2, kControl = 3, kUserDefined = 4, kUnused = 5, kByte = 6 };
}
// "type" of a part of a tokenizer.json, "" where it has none; a Sequence as its members, anything else as itself.
std::string component_type(const Json& component);
std::vector<Json> component_members(const Json& component, const char* key);

// The byte-level tokenizers that llama.cpp knows by name (tokenizer.ggml.pre), in core/gguf_pre_tokenizers.cpp.
struct GgufPreTokenizer {
  const char* name;
  bool nfc = false;  // the normalizer of the tokenizer.json, which llama.cpp does not apply
  // What splits the text, in order: "digits" (each alone), "gpt2" (ByteLevel's own pattern) or a pattern of Split.
  std::vector<std::string> splits;
  bool ignore_merges = false;
  bool bos = false;  // where a file does not say add_bos_token
};
const GgufPreTokenizer* find_pre_tokenizer(const Json& tokenizer);  // of a tokenizer.json; null: none of them
const GgufPreTokenizer* named_pre_tokenizer(const std::string& name);
std::string pre_tokenizer_names();
Json pre_tokenizer_json(const GgufPreTokenizer& row);

}  // namespace pare
