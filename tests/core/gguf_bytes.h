// GGUF files byte by byte, right and wrong ones.
#pragma once

#include <cstring>
#include <string>
#include <vector>

#include "core/gguf.h"
#include "tests/core/model_folder.h"

namespace pare::testing {

// A header put together by hand; the counts are those of what was added unless counts() says otherwise.
class GgufBytes {
 public:
  explicit GgufBytes(std::uint32_t version = 3) : version_(version) {}

  template <class T>
  static std::string number(T value) {
    return {reinterpret_cast<const char*>(&value), sizeof value};
  }
  static std::string text(const std::string& value) { return number<std::uint64_t>(value.size()) + value; }

  GgufBytes& counts(std::uint64_t tensors, std::uint64_t pairs) {
    said_ = true;
    tensor_count_ = tensors;
    pair_count_ = pairs;
    return *this;
  }
  GgufBytes& pair(const std::string& key, std::uint32_t type, const std::string& value) {
    pairs_ += text(key) + number(type) + value;
    if (!said_) ++pair_count_;
    return *this;
  }
  // Dimensions as the file holds them, the fastest first.
  GgufBytes& tensor(const std::string& name, const std::vector<std::int64_t>& dimensions, std::uint32_t type,
                    std::uint64_t offset) {
    tensors_ += text(name) + number(static_cast<std::uint32_t>(dimensions.size()));
    for (const std::int64_t size : dimensions) tensors_ += number(size);
    tensors_ += number(type) + number(offset);
    if (!said_) ++tensor_count_;
    return *this;
  }
  std::string bytes(std::size_t data = 0) const { return padded(raw(pairs_ + tensors_), data); }
  std::string raw(const std::string& rest) const {
    return "GGUF" + number(version_) + number(tensor_count_) + number(pair_count_) + rest;
  }

  static GgufBytes good() {
    GgufBytes file;
    file.pair("general.architecture", 8, text("none"));
    file.pair("a.number", 4, number<std::uint32_t>(7));
    file.pair("a.float", 6, number(1e-6f));
    file.pair("a.flag", 7, std::string(1, '\1'));
    file.pair("a.texts", 9, number<std::uint32_t>(8) + number<std::uint64_t>(3) + text("x") + text("") + text("yz"));
    file.tensor("a.weight", {32, 3}, 0, 0);
    file.tensor("b.weight", {64}, 8, 384);
    file.data_ = 384 + 68;
    return file;
  }

 private:
  std::string padded(std::string header, std::size_t data) const {
    if (data == 0) data = data_;
    if (data > 0) header.resize((header.size() + 31) / 32 * 32);
    return header + std::string(data, '\0');
  }
  std::uint32_t version_;
  std::uint64_t tensor_count_ = 0, pair_count_ = 0;
  bool said_ = false;
  std::size_t data_ = 0;
  std::string pairs_, tensors_;
};

// A Llama of one block, 32 wide, with 40 tokens: keys and tensors to be changed before they are written.
class GgufModelParts {
 public:
  GgufModelParts() {
    set("general.architecture", std::string("llama"));
    for (const auto& [key, value] : std::vector<std::pair<std::string, std::uint32_t>>{{"context_length", 64},
                                                                                       {"embedding_length", 32},
                                                                                       {"block_count", 1},
                                                                                       {"feed_forward_length", 64},
                                                                                       {"attention.head_count", 4},
                                                                                       {"attention.head_count_kv", 2},
                                                                                       {"rope.dimension_count", 8}})
      set("llama." + key, value);
    set("llama.attention.layer_norm_rms_epsilon", 1e-5f);
    set("llama.rope.freq_base", 10000.0f);
    std::vector<std::string> tokens;
    for (int i = 0; i < 37; ++i) tokens.emplace_back(1, static_cast<char>('A' + i));
    tokens[26] = "ab", tokens[27] = "<unk>";
    tokens.insert(tokens.end(), {"<s>", "</s>", "[PAD39]"});
    std::vector<std::int32_t> types(40, 1);
    types[27] = 2, types[37] = types[38] = 3, types[39] = 5;
    set("tokenizer.ggml.model", std::string("gpt2"));
    set("tokenizer.ggml.pre", std::string("gpt-2"));
    set("tokenizer.ggml.tokens", tokens);
    set("tokenizer.ggml.token_type", types);
    set("tokenizer.ggml.merges", std::vector<std::string>{"a b"});
    set("tokenizer.ggml.unknown_token_id", std::uint32_t{27});
    set("tokenizer.ggml.bos_token_id", std::uint32_t{37});
    set("tokenizer.ggml.eos_token_id", std::uint32_t{38});
    add("token_embd.weight", {40, 32}, GgmlType::kQ8_0);
    add("blk.0.attn_norm.weight", {32});
    add("blk.0.attn_q.weight", {32, 32}, GgmlType::kQ4_0);
    add("blk.0.attn_k.weight", {16, 32}, GgmlType::kF16);
    add("blk.0.attn_v.weight", {16, 32}, GgmlType::kBF16);
    add("blk.0.attn_output.weight", {32, 32}, GgmlType::kQ4_1);
    add("blk.0.ffn_norm.weight", {32});
    add("blk.0.ffn_gate.weight", {64, 32}, GgmlType::kQ5_0);
    add("blk.0.ffn_up.weight", {64, 32});
    add("blk.0.ffn_down.weight", {32, 64}, GgmlType::kIQ4_NL);
    add("output_norm.weight", {32});
  }

  void set(const std::string& key, GgufValue value) {
    for (auto& pair : metadata_)
      if (pair.first == key) {
        pair.second = std::move(value);
        return;
      }
    metadata_.emplace_back(key, std::move(value));
  }
  void erase(const std::string& key) {
    std::erase_if(metadata_, [&](const auto& pair) { return pair.first == key; });
  }
  // Of another architecture with the same keys.
  void become(const std::string& architecture) {
    for (auto& pair : metadata_)
      if (pair.first.starts_with("llama.")) pair.first.replace(0, 5, architecture);
    set("general.architecture", architecture);
  }
  void add(const std::string& name, std::vector<std::int64_t> shape, GgmlType type = GgmlType::kF32) {
    tensors_.push_back({name, type, std::move(shape)});
  }
  void drop(const std::string& name) {
    std::erase_if(tensors_, [&](const GgufTensor& tensor) { return tensor.name == name; });
  }
  void write(const fs::path& path) const {
    fs::remove(path);
    GgufWriter writer(path, metadata_, tensors_);
    for (const GgufTensor& tensor : tensors_) writer.write(std::vector<std::byte>(tensor.bytes()));
    writer.finish();
  }

 private:
  std::vector<std::pair<std::string, GgufValue>> metadata_;
  std::vector<GgufTensor> tensors_;
};

}  // namespace pare::testing
