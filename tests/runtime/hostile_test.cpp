// One crafted file for every class of attack that is on record against readers of model files. Each is refused with its
// place and the reason, quickly, within bounded memory, and nothing is written.
#include <sys/resource.h>
#include <sys/stat.h>

#include <chrono>
#include <ctime>
#include <functional>

#include "core/chat_template.h"
#include "core/gguf_file.h"
#include "core/tokenizer.h"
#include "runtime/engine.h"
#include "runtime/export.h"
#include "runtime/gguf_export.h"
#include "tests/core/gguf_bytes.h"
#include "tests/core/model_folder.h"
#include "tests/runtime/tiny_model.h"

namespace pare {
namespace {

using testing::contains;
using testing::error_of;
using testing::GgufBytes;
using testing::GgufModelParts;
using testing::safetensors_bytes;
using testing::Scratch;
using testing::write_bytes;

using Bytes = GgufBytes;

std::string u32(std::uint32_t value) { return Bytes::number(value); }
std::string u64(std::uint64_t value) { return Bytes::number(value); }

// ---- what a user does with a file that he was given

// pare export FILE --codec q4: every weight is read and rounded.
void convert(const fs::path& path, const fs::path& out) {
  Context context;
  ExportOptions options;
  options.out = out;
  options.codec = "q4";
  export_compact(Checkpoint::open(path), options, context);
}

// pare export FILE --to gguf --codec q8
void convert_to_gguf(const fs::path& path, const fs::path& out) {
  const Checkpoint model = Checkpoint::open(path);
  Context context;
  GgufOptions options;
  options.out = out;
  options.codec = "q8";
  export_gguf(model, plan_gguf(model, options), options, context);
}

// pare export FILE --to folder --out FILE
void write_over_itself(const fs::path& path, const fs::path&) {
  Context context;
  export_folder(Checkpoint::open(path), path, context);
}

// pare run FILE
void open_in_the_runtime(const fs::path& path, const fs::path&) { Engine::open(path, {}); }

// pare tokenize FILE
void tokenize(const fs::path& path, const fs::path&) {
  const Checkpoint model = Checkpoint::open(path);
  const Tokenizer tokenizer = Tokenizer::from_text(model.tokenizer_text().value(), path.string() + ": tokenizer");
  tokenizer.encode(std::string(200, 'a') + "!");
}

// pare run FILE --chat
void talk(const fs::path& path, const fs::path&) {
  const Checkpoint model = Checkpoint::open(path);
  const auto file = [&](const std::string& name) { return model.side_file(name); };
  const Json messages = Json::array({{{"role", "user"}, {"content", "hi"}}});
  ChatTemplate::find(file, path.string()).render(messages, true, std::tm{});
}

// ---- makers; the file or folder that is given to the user

std::string layout(const std::string& tensors) { return "{" + tensors + "}"; }

fs::path model_with(const fs::path& folder, const std::string& weights, const std::string& file = "model.safetensors") {
  testing::write_folder(folder / "m", testing::small_config());
  fs::remove(folder / "m" / "model.safetensors");
  write_bytes(folder / "m" / file, weights);
  return folder / "m";
}

fs::path sharded(const fs::path& folder, const std::string& shard) {
  testing::write_folder(folder / "m", testing::small_config());
  fs::rename(folder / "m" / "model.safetensors", folder / "secret.safetensors");
  Json map = Json::object();
  const SafetensorsFile secret(folder / "secret.safetensors");
  for (const TensorView& view : secret.tensors()) map[view.name] = shard;
  write_bytes(folder / "m" / "model.safetensors.index.json", Json{{"weight_map", map}}.dump());
  return folder / "m";
}

fs::path gguf(const fs::path& folder, const std::string& bytes) {
  write_bytes(folder / "bad.gguf", bytes);
  return folder / "bad.gguf";
}

fs::path gguf_model(const fs::path& folder, const std::function<void(GgufModelParts&)>& change) {
  GgufModelParts parts;
  change(parts);
  parts.write(folder / "bad.gguf");
  return folder / "bad.gguf";
}

// A good model whose last bytes are gone: its tensors lie about what the file holds.
fs::path lying_gguf(const fs::path& folder) {
  GgufModelParts().write(folder / "good.gguf");
  const std::string good = read_text(folder / "good.gguf");
  return gguf(folder, good.substr(0, good.size() - 96));
}

fs::path compact(const fs::path& folder, const std::function<void(std::string&)>& change) {
  testing::write_tiny_model(folder / "good.pare", testing::tiny_config("llama", 32, 64, 4, 2, 8, 64, true),
                            {CodecKind::kQ8, 32}, 5);
  std::string bytes = read_text(folder / "good.pare");
  change(bytes);
  write_bytes(folder / "bad.pare", bytes);
  return folder / "bad.pare";
}

void replace_in(std::string& bytes, const std::string& what, const std::string& with) {
  ASSERT_EQ(what.size(), with.size());
  const std::size_t at = bytes.find(what);
  ASSERT_NE(at, std::string::npos) << what;
  bytes.replace(at, what.size(), with);
}

// Protocol 0: os.system("touch FILE") where it is loaded as a pickle.
std::string pickle(const fs::path& folder) {
  return "cos\nsystem\n(S'touch " + (folder / "ran").string() + "'\ntR.";
}

fs::path tokenizer_with(const fs::path& folder, const std::string& pattern) {
  testing::write_folder(folder / "m", testing::small_config());
  const Json json = {{"version", "1.0"},
                     {"added_tokens", Json::array()},
                     {"normalizer", nullptr},
                     {"pre_tokenizer", {{"type", "Split"}, {"pattern", {{"Regex", pattern}}}, {"behavior", "Isolated"},
                                        {"invert", false}}},
                     {"post_processor", nullptr},
                     {"decoder", nullptr},
                     {"model", {{"type", "BPE"}, {"unk_token", nullptr}, {"vocab", {{"a", 0}, {"!", 1}}},
                                {"merges", Json::array()}}}};
  write_bytes(folder / "m" / "tokenizer.json", json.dump());
  return folder / "m";
}

fs::path config_with(const fs::path& folder, const std::string& key, const Json& value) {
  testing::write_folder(folder / "m", testing::small_config());
  Json config = testing::small_config();
  config[key] = value;
  write_bytes(folder / "m" / "config.json", config.dump());
  return folder / "m";
}

// A GPTQ folder of version 1, 4 bits in groups of 32, with another quantization_config or other bytes of a tensor.
fs::path gptq(const fs::path& folder, const Json& changes, const std::string& tensor = {},
              const std::string& bytes = {}) {
  const ModelConfig config = parse_config(testing::small_config(), nullptr, "");
  fs::create_directories(folder / "codes");
  CheckpointWriter writer(folder / "codes", config, "float32");
  for (const TensorSpec& spec : expected_tensors(config)) {
    if (spec.role == TensorRole::kLinear)
      writer.put_codes(spec.name, testing::random_codes(Codec::parse("q4g32", ""), spec.shape[0], spec.shape[1], 5));
    else
      writer.put(spec.name, testing::values_of(spec).data());
  }
  writer.finish();
  Context context;
  export_folder(Checkpoint(folder / "codes"), folder / "m", context, FolderForm::kGptq);
  Json json = read_json(folder / "m" / "config.json");
  json["quantization_config"].update(changes);
  write_bytes(folder / "m" / "config.json", json.dump());
  if (tensor.empty()) return folder / "m";
  std::string all = read_text(folder / "m" / "model.safetensors");
  const SafetensorsFile file(folder / "m" / "model.safetensors");
  const auto at = file.find(tensor)->data.data() - file.file().bytes().data();
  all.replace(static_cast<std::size_t>(at), bytes.size(), bytes);
  write_bytes(folder / "m" / "model.safetensors", all);
  return folder / "m";
}

// One block, whose widths are lists; shapes as with one number.
fs::path deci(const fs::path& folder, const std::string& key, const GgufValue& value) {
  return gguf_model(folder, [&](auto& p) {
    p.become("deci");
    p.set("deci.attention.head_count", std::vector<std::int32_t>{4});
    p.set("deci.attention.head_count_kv", std::vector<std::int32_t>{2});
    p.set("deci.feed_forward_length", std::vector<std::int32_t>{64});
    p.set("deci." + key, value);
  });
}

fs::path poisoned(const fs::path& folder, float value) {
  testing::write_folder(folder / "m", testing::small_config());
  std::string bytes = read_text(folder / "m" / "model.safetensors");
  const SafetensorsFile file(folder / "m" / "model.safetensors");
  const auto at = file.find("model.layers.1.mlp.up_proj.weight")->data.data() - file.file().bytes().data();
  std::memcpy(bytes.data() + at + 400, &value, sizeof value);
  write_bytes(folder / "m" / "model.safetensors", bytes);
  return folder / "m";
}

struct Crafted {
  const char* name;
  const char* record;  // where the class is known from
  std::function<fs::path(const fs::path& folder)> make;
  const char* place;
  const char* says;
  std::function<void(const fs::path& path, const fs::path& out)> use = convert;
  int code = 3;
};

constexpr const char* kOneTensor = R"("a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]})";

const std::vector<Crafted>& crafted() {
  using F = const fs::path&;
  static const std::vector<Crafted> kCases = {
      // ---- safetensors: the rules of its specification, each once broken in some reader
      {"SafetensorsHeaderBeyondTheFile", "length taken on trust",
       [](F f) { return model_with(f, u64(1ull << 26) + "{}"); }, "model.safetensors", "the file is cut off"},
      {"SafetensorsHeaderBeyondItsLimit", "headers of more than 100 MB, and sums that wrap",
       [](F f) { return model_with(f, u64(~0ull - 7) + "{}"); }, "model.safetensors", "at most 100000000 bytes"},
      {"SafetensorsPolyglotInAHole", "audit of safetensors: another file hidden between tensors",
       [](F f) {
         return model_with(f, safetensors_bytes(layout(std::string(kOneTensor) +
                                R"(,"b":{"dtype":"F32","shape":[1],"data_offsets":[8,12]})"), "aaaaPK\3\4bbbb"));
       }, "tensor b", "there is a hole"},
      {"SafetensorsPolyglotBehindTheEnd", "audit of safetensors: another file behind the tensors",
       [](F f) { return model_with(f, safetensors_bytes(layout(kOneTensor), "aaaaPK\5\6")); },
       "model.safetensors", "bytes follow the last tensor"},
      {"SafetensorsOverlap", "two tensors of the same bytes",
       [](F f) {
         return model_with(f, safetensors_bytes(layout(std::string(kOneTensor) +
                                R"(,"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]})"), "aaaa"));
       }, "tensor b", "overlap"},
      {"SafetensorsShapeWraps", "product of a shape that overflows",
       [](F f) {
         return model_with(f, safetensors_bytes(layout(
             R"("a":{"dtype":"F32","shape":[4294967296,4294967296,4294967296],"data_offsets":[0,4]})"), "aaaa"));
       }, "tensor a", "overflowing"},
      {"SafetensorsTwiceTheSameKey", "what one reader checks is not what another loads",
       [](F f) {
         return model_with(f, safetensors_bytes(layout(std::string(kOneTensor) + "," + kOneTensor), "aaaa"));
       }, "model.safetensors", "\"a\" twice"},
      {"SafetensorsNesting", "recursion of the JSON parser",
       [](F f) { return model_with(f, safetensors_bytes(R"({"a":)" + std::string(1 << 20, '['), "")); },
       "model.safetensors", "a list"},
      {"SafetensorsNotFinite", "weights that are no numbers, which rounding would spread over a group",
       [](F f) { return poisoned(f, std::nanf("")); }, "up_proj.weight", "finite"},
      {"SafetensorsInfinite", "the same to GGUF", [](F f) { return poisoned(f, HUGE_VALF); }, "up_proj.weight",
       "finite", convert_to_gguf},
      // ---- pickles are never loaded
      {"PickleBesideTheConfig", "CVE-2025-32434, CVE-2026-24747: code that runs when weights are loaded",
       [](F f) { return model_with(f, pickle(f), "pytorch_model.bin"); }, "m", "saved as safetensors"},
      {"PickleUnderAnotherName", "the same, called model.safetensors",
       [](F f) { return model_with(f, pickle(f)); }, "model.safetensors", "this is not a safetensors file"},
      // ---- files that a file names
      {"ShardAboveTheFolder", "CVE-2022-25882, CVE-2024-27318: a path with ..",
       [](F f) { return sharded(f, "../secret.safetensors"); }, "index.json", "a plain file name inside the folder"},
      {"ShardOfAnAbsolutePath", "CVE-2026-27489", [](F f) { return sharded(f, (f / "secret.safetensors").string()); },
       "index.json", "a plain file name inside the folder"},
      {"ShardWithAZeroByte", "a name that ends earlier for the system",
       [](F f) { return sharded(f, std::string("a\0b", 3)); }, "index.json", "a plain file name"},
      {"ShardThatIsADevice", "CVE-2026-34447: a link out of the folder, to what has no end",
       [](F f) {
         fs::create_symlink("/dev/zero", f / "zero");
         const fs::path model = sharded(f, "zero.safetensors");
         fs::create_symlink("/dev/zero", model / "zero.safetensors");
         return model;
       }, "zero.safetensors", "a regular file"},
      {"ShardThatIsAPipe", "a reader that waits for ever",
       [](F f) {
         const fs::path model = sharded(f, "pipe.safetensors");
         EXPECT_EQ(::mkfifo((model / "pipe.safetensors").c_str(), 0600), 0);
         return model;
       }, "pipe.safetensors", "a regular file"},
      // ---- GGUF
      {"GgufManyTensors", "CVE-2024-23496: number of tensors",
       [](F f) { return gguf(f, Bytes().counts(~0ull / 2, 0).raw("")); }, "bad.gguf: byte", "tensors in the rest"},
      {"GgufManyKeys", "CVE-2024-23605: number of keys",
       [](F f) { return gguf(f, Bytes().counts(0, 0x0fffffffffffffff).raw(std::string(64, '\1'))); },
       "bad.gguf: byte", "keys in the rest"},
      {"GgufLongText", "CVE-2024-21836: length of a text, plus one wraps to nothing",
       [](F f) { return gguf(f, Bytes().counts(0, 1).raw(u64(~0ull) + std::string(64, 'k'))); },
       "bad.gguf: byte", "cut off or damaged"},
      {"GgufLongArray", "CVE-2024-21825: length of an array, times the size of an element",
       [](F f) { return gguf(f, Bytes().pair("k", 9, u32(5) + u64(1ull << 62) + std::string(64, '\0')).bytes()); },
       "bad.gguf: byte", "elements in the rest"},
      {"GgufManyDimensions", "CVE-2024-21802: info->ne, dimensions beyond their array",
       [](F f) { return gguf(f, Bytes().counts(1, 0).raw(Bytes::text("t") + u32(9) + std::string(200, '\1'))); },
       "bad.gguf: byte", "1 to 4 dimensions"},
      {"GgufNegativeDimension", "the same with a sign",
       [](F f) {
         return gguf(f, Bytes().tensor("t", {-32, 4}, 0, 0).bytes(512));
       }, "bad.gguf: byte", "dimensions above 0"},
      {"GgufSizeWraps", "CVE-2025-53630: sum of the tensors' sizes",
       [](F f) {
         Bytes file;
         for (std::uint64_t i = 0; i < 64; ++i)
           file.tensor("t" + std::to_string(i), {1ll << 56}, 0, i << 58);
         return gguf(f, file.bytes(64));
       }, "bad.gguf: t0", "the file is cut off"},
      {"GgufSizeWrapsAgain", "CVE-2026-27940: the mend of the former, passed by sizes that are whole blocks",
       [](F f) {
         Bytes file;
         file.tensor("small", {8}, 0, 0).tensor("huge", {1ll << 40, 1ll << 23}, 8, 32);
         return gguf(f, file.bytes(64));
       }, "bad.gguf: byte", "at most 2^56 elements"},
      {"GgufBytesWrap", "CVE-2026-33298: product of dimensions and size of a block",
       [](F f) {
         return gguf(f, Bytes().tensor("t", {256, (1ll << 62) / 3, 4}, 12, 0).bytes(144));
       }, "bad.gguf: byte", "at most 2^56 elements"},
      {"GgufPaddingWraps", "an offset that alignment carries over the end of the numbers",
       [](F f) { return gguf(f, Bytes().tensor("t", {8}, 0, ~0ull - 15).bytes(64)); }, "bad.gguf: t", "an offset of 0"},
      {"GgufAlignment", "an alignment of 0x80000000",
       [](F f) { return gguf(f, Bytes().pair("general.alignment", 4, u32(1u << 31)).bytes()); },
       "general.alignment", "a power of two"},
      {"GgufAlignmentOfNothing", "a division by zero",
       [](F f) { return gguf(f, Bytes().pair("general.alignment", 4, u32(0)).bytes()); },
       "general.alignment", "a power of two"},
      {"GgufTensorLies", "CVE-2026-7482: a quantizer reads behind a tensor that is shorter than it says",
       lying_gguf, "output_norm.weight", "the file is cut off"},
      {"GgufScalesNotFinite", "blocks of which every product is no number",
       [](F f) {
         GgufModelParts().write(f / "good.gguf");
         std::string bytes = read_text(f / "good.gguf");
         const GgufFile file(f / "good.gguf");
         const auto at = file.find("blk.0.attn_q.weight")->data.data() - file.file().bytes().data();
         bytes.replace(static_cast<std::size_t>(at) + 18, 2, "\x00\x7e", 2);
         return gguf(f, bytes);
       }, "blk.0.attn_q.weight", "finite scales"},
      {"GgufTypeOfNoBlock", "sizes looked up behind the end of a table",
       [](F f) { return gguf(f, Bytes().tensor("t", {32}, 0x7fffffff, 0).bytes(64)); }, "bad.gguf: byte",
       "one of the types"},
      {"GgufBlocksBeyondReason", "memory asked for by a number in the header",
       [](F f) { return gguf_model(f, [](auto& p) { p.set("llama.block_count", 4000000000u); }); }, "bad.gguf",
       "block_count"},
      {"GgufTokenWithoutEnd", "CVE-2025-49847: a token longer than the buffer of its reader",
       [](F f) {
         return gguf_model(f, [](auto& p) {
           std::vector<std::string> tokens(1, std::string(1 << 16, 'x'));
           for (int i = 1; i < 40; ++i) tokens.push_back(std::to_string(i));
           p.set("tokenizer.ggml.tokens", tokens);
         });
       }, "bad.gguf", "at most 1024 bytes", tokenize},
      {"GgufTokenBeyondTheTokens", "CVE-2025-52566: a number of tokens that changes its sign",
       [](F f) {
         return gguf_model(f, [](auto& p) {
           p.set("tokenizer.ggml.add_bos_token", true);
           p.set("tokenizer.ggml.bos_token_id", 0x80000000u);
         });
       }, "bad.gguf", "an id below", tokenize},
      {"GgufTemplateThatRuns", "CVE-2024-34359, CVE-2026-5760: a chat template that reaches for Python",
       [](F f) {
         return gguf_model(f, [&](auto& p) {
           p.set("tokenizer.chat_template",
                 std::string("{% for c in ().__class__.__base__.__subclasses__() %}{{ c.__init__.__globals__['os']"
                             ".system('touch ") + (f / "ran").string() + "') }}{% endfor %}");
         });
       }, "chat_template.jinja: line 1", "__class__", talk},
      {"GgufTemplateWithoutEnd", "the same, to keep the machine busy",
       [](F f) {
         return gguf_model(f, [](auto& p) {
           p.set("tokenizer.chat_template", std::string("{% for a in range(99999) %}{% for b in range(99999) %}x"
                                                        "{% endfor %}{% endfor %}"));
         });
       }, "chat_template.jinja: line 1", "steps", talk},
      {"GgufOfZeros", "llama.cpp#13258: a header that was never written",
       [](F f) { return gguf(f, std::string(4096, '\0')); }, "bad.gguf", "another file"},
      {"GgufOverItself", "llama.cpp#12753: the output is the input, which is lost",
       [](F f) {
         GgufModelParts().write(f / "bad.gguf");
         return f / "bad.gguf";
       }, "bad.gguf", "does not exist yet", write_over_itself, 2},
      // ---- the compact file, config.json, tokenizer.json
      {"CompactPayloadLies", "a payload shorter than its shape",
       [](F f) { return compact(f, [](std::string& b) { b.resize(b.size() / 2); }); }, "bad.pare", "cut off",
       open_in_the_runtime},
      {"CompactOfAnotherShape", "a config inside that disagrees with the tensors",
       [](F f) {
         return compact(f, [](std::string& b) { replace_in(b, "\"hidden_size\":32", "\"hidden_size\":96"); });
       }, "bad.pare", "model.embed_tokens.weight has another shape than the config", open_in_the_runtime},
      {"ConfigOfAMillionBlocks", "memory asked for by a number in config.json",
       [](F f) { return config_with(f, "num_hidden_layers", 1000000000000); }, "num_hidden_layers",
       "1 to 10000"},
      {"ConfigOfNoHeads", "a division by zero", [](F f) { return config_with(f, "num_attention_heads", 0); },
       "num_attention_heads", "1 to 1048576"},
      {"ConfigOfHugeRows", "sizes whose product wraps",
       [](F f) { return config_with(f, "vocab_size", 4611686018427387904ll); }, "config.json", "1 to 67108864"},
      // ---- lists with a width for each block
      {"WidthsOfAnotherCount", "an entry behind the end of a list",
       [](F f) { return config_with(f, "intermediate_size", Json::array({96})); }, "config.json",
       "intermediate_size has 1 entries for 2 blocks"},
      {"WidthsBelowZero", "a size whose sign changes",
       [](F f) { return config_with(f, "intermediate_size", {96, -96}); }, "config.json", "has an entry -96"},
      {"WidthsThatWrap", "the same beyond 63 bits",
       [](F f) { return config_with(f, "num_key_value_heads", {2, UINT64_MAX - 1}); }, "config.json",
       "num_key_value_heads has an entry 18446744073709551614"},
      {"WidthsOfNoHeads", "a division by zero in one block",
       [](F f) { return config_with(f, "num_key_value_heads", {2, 0}); }, "config.json",
       "num_key_value_heads has an entry 0"},
      {"WidthsThatDoNotDivide", "heads behind the last head of keys",
       [](F f) { return config_with(f, "num_key_value_heads", {2, 3}); }, "config.json",
       "block 1 has 4 heads, no multiple of its 3"},
      {"WidthsInWidths", "a list where a number is read",
       [](F f) { return config_with(f, "intermediate_size", Json::parse("[96,[96]]")); }, "config.json",
       "has an entry [96]"},
      {"DeciOfAnotherCount", "an entry behind the end of a list",
       [](F f) { return deci(f, "feed_forward_length", std::vector<std::int32_t>{64, 64}); }, "bad.gguf",
       "feed_forward_length"},
      {"DeciBelowZero", "a size whose sign changes",
       [](F f) { return deci(f, "feed_forward_length", std::vector<std::int32_t>{-64}); }, "bad.gguf",
       "feed_forward_length"},
      {"DeciOfNoHeads", "a division by zero",
       [](F f) { return deci(f, "attention.head_count_kv", std::vector<std::int32_t>{0}); }, "bad.gguf",
       "attention.head_count_kv"},
      {"DeciThatDoesNotDivide", "heads behind the last head of keys",
       [](F f) { return deci(f, "attention.head_count_kv", std::vector<std::int32_t>{3}); }, "bad.gguf", "heads"},
      // ---- GPTQ
      {"GptqOfHugeGroups", "the number of groups: inputs plus group wraps",
       [](F f) { return gptq(f, {{"group_size", INT64_MAX}}); }, "quantization_config.group_size",
       "a number from 1 to 1048576"},
      {"GptqOfGroupsThatWrap", "2^64 - 1 read as -1, one group for all",
       [](F f) { return gptq(f, {{"group_size", UINT64_MAX}}); }, "quantization_config.group_size",
       "18446744073709551615"},
      {"GptqOfNoGroups", "a division by zero", [](F f) { return gptq(f, {{"group_size", 0}}); },
       "quantization_config.group_size", "found 0"},
      {"GptqOfOtherBits", "a shift by more bits than a word has", [](F f) { return gptq(f, {{"bits", 64}}); },
       "quantization_config.bits", "4 or 8"},
      {"GptqOfFewerGroups", "scales read behind their end", [](F f) { return gptq(f, {{"group_size", 16}}); },
       "qzeros", "instead of"},
      {"GptqGroupBeyondTheGroups", "scales looked up by a number in the file",
       [](F f) { return gptq(f, Json::object(), "model.layers.0.mlp.up_proj.g_idx", u32(4)); }, "up_proj.g_idx",
       "groups from 0 to 3"},
      {"GptqGroupBelowZero", "the same with a sign",
       [](F f) { return gptq(f, Json::object(), "model.layers.0.mlp.up_proj.g_idx", u32(~0u)); }, "up_proj.g_idx",
       "groups from 0 to 3"},
      {"GptqZeroPointThatWraps", "15 stored for 16 or 0, as readers disagree",
       [](F f) { return gptq(f, Json::object(), "model.layers.0.mlp.up_proj.qzeros", u32(~0u)); }, "up_proj.qzeros",
       "a stored 15"},
      {"GptqScalesNotFinite", "products that are no numbers",
       [](F f) { return gptq(f, Json::object(), "model.layers.0.mlp.up_proj.scales", std::string("\0\x7e", 2)); },
       "up_proj.scales", "finite scales"},
      {"ConfigNesting", "recursion of the JSON parser",
       [](F f) {
         testing::write_folder(f / "m", testing::small_config());
         write_bytes(f / "m" / "config.json", "{\"a\":" + std::string(1 << 20, '[') + "}");
         return f / "m";
       }, "config.json", "nesting"},
      {"TokenizerPatternWithoutEnd", "a pattern that backtracks for ever on ordinary text",
       [](F f) { return tokenizer_with(f, "(a|a)*(a|a)*(a|a)*(a|a)*!!"); }, "tokenizer pattern", "backtracks too much",
       tokenize, 1},
  };
  return kCases;
}

// ---- texts that are taken along without being read

// Whether a file or any file of a folder has these bytes in it.
bool holds(const fs::path& path, const std::string& what) {
  if (fs::is_regular_file(path)) return contains(read_text(path), what);
  for (const auto& entry : fs::recursive_directory_iterator(path))
    if (fs::is_regular_file(entry.path()) && contains(read_text(entry.path()), what)) return true;
  return false;
}

// Somebody who is given a model must not publish his own files with it.
TEST(HostileNotices, WhatIsNotTheModelsIsNotPublished) {
  const Scratch scratch("notices");
  testing::write_folder(scratch / "m", testing::small_config());
  const std::string secret = "license: of-somebody-else";
  write_bytes(scratch / "secret", "---\n" + secret + "\n---\n");
  for (const char* name : {"README.md", "LICENSE", "LICENSE.txt"})
    fs::create_symlink(scratch / "secret", scratch / "m" / name);
  fs::create_symlink("/dev/zero", scratch / "m" / "LICENSE.md");
  EXPECT_EQ(::mkfifo((scratch / "m" / "NOTICE").c_str(), 0600), 0);
  const Checkpoint model(scratch / "m");
  EXPECT_EQ(plan_folder(model, FolderForm::kCompressedTensors).size(), 4u);  // said; the card is not taken along anyway
  Context context;
  convert(scratch / "m", scratch / "m.pare");
  convert_to_gguf(scratch / "m", scratch / "m.gguf");
  export_folder(model, scratch / "out", context);
  for (const char* made : {"m.pare", "m.gguf", "out"}) EXPECT_FALSE(holds(scratch / made, secret)) << made;
  EXPECT_TRUE(holds(scratch / "out" / "README.md", "LICENSE is a link that leaves the folder"));
  // A file that says it is long costs nothing.
  fs::remove(scratch / "m" / "NOTICE");
  write_bytes(scratch / "m" / "NOTICE", "notice");
  fs::resize_file(scratch / "m" / "NOTICE", std::uintmax_t{1} << 34);
  EXPECT_EQ(Checkpoint(scratch / "m").side_file("NOTICE"), std::nullopt);
  fs::resize_file(scratch / "m" / "NOTICE", 6);
  EXPECT_EQ(Checkpoint(scratch / "m").side_file("NOTICE"), "notice");
  convert(scratch / "m", scratch / "again.pare");
  EXPECT_EQ(CompactFile(scratch / "again.pare").embedded("NOTICE"), "notice");
}

// At most this much beyond what the process has: what a file of some kilobytes may cost.
class MemoryLimit {
 public:
  explicit MemoryLimit(std::uint64_t more) {
    ::getrlimit(RLIMIT_AS, &before_);
    std::uint64_t pages = 0;
    if (std::FILE* file = std::fopen("/proc/self/statm", "r")) {
      if (std::fscanf(file, "%lu", &pages) != 1) pages = 0;
      std::fclose(file);
    }
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)  // which reserve more than there is
    rlimit now = before_;
    now.rlim_cur = pages * 4096 + more;
    if (pages > 0) ::setrlimit(RLIMIT_AS, &now);
#else
    static_cast<void>(more);
#endif
  }
  ~MemoryLimit() { ::setrlimit(RLIMIT_AS, &before_); }
  MemoryLimit(const MemoryLimit&) = delete;
  MemoryLimit& operator=(const MemoryLimit&) = delete;

 private:
  rlimit before_{};
};

std::map<std::string, std::string> hashes(const fs::path& folder) {
  std::map<std::string, std::string> out;
  for (const auto& entry : fs::recursive_directory_iterator(folder))
    out[entry.path().string()] = fs::is_regular_file(entry.symlink_status()) ? hash_file(entry.path()) : "other";
  return out;
}

class HostileFile : public ::testing::TestWithParam<std::size_t> {};

TEST_P(HostileFile, IsRefusedWithPlaceAndReason) {
  const Crafted& given = crafted()[GetParam()];
  SCOPED_TRACE(given.record);
  const Scratch scratch("hostile"), results("results");
  const fs::path path = given.make(scratch.path());
  const auto before = hashes(scratch.path());
  const auto begin = std::chrono::steady_clock::now();
  std::string said;
  {
    const MemoryLimit limit(std::uint64_t{192} << 20);
    said = error_of([&] { given.use(path, results / "out"); });
  }
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
  EXPECT_TRUE(said.starts_with(std::to_string(given.code) + " ")) << said;
  EXPECT_TRUE(contains(said, given.place)) << said;
  EXPECT_TRUE(contains(said, given.says)) << said;
  EXPECT_TRUE(contains(said, "expected") || contains(said, "found")) << said;
  EXPECT_LT(took.count(), 10);
  EXPECT_EQ(hashes(scratch.path()), before);  // nor did anything run: "ran" is not there
  EXPECT_TRUE(fs::is_empty(results.path()));
}

INSTANTIATE_TEST_SUITE_P(Classes, HostileFile, ::testing::Range<std::size_t>(0, crafted().size()),
                         [](const auto& given) { return crafted()[given.param].name; });

}  // namespace
}  // namespace pare
