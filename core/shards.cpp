#include "core/shards.h"

#include <cstdio>

namespace pare {

void write_tensors(const fs::path& path, std::span<const ShardTensor> tensors,
                   const std::map<std::string, std::string>& metadata) {
  std::vector<TensorDecl> decls;
  for (const ShardTensor& tensor : tensors) decls.push_back(tensor.decl);
  SafetensorsWriter writer(path, decls, metadata);
  for (const ShardTensor& tensor : tensors) tensor.write(writer);
  writer.finish();
}

void write_shards(const fs::path& folder, std::span<const ShardTensor> tensors, std::uint64_t shard_bytes) {
  std::vector<std::size_t> ends;
  std::uint64_t total = 0, in_shard = 0;
  for (std::size_t i = 0; i < tensors.size(); ++i) {
    const std::uint64_t bytes = tensors[i].decl.bytes();
    if (in_shard > 0 && in_shard + bytes > shard_bytes) {
      ends.push_back(i);
      in_shard = 0;
    }
    in_shard += bytes;
    total += bytes;
  }
  ends.push_back(tensors.size());
  const std::map<std::string, std::string> metadata = {{"format", "pt"}};
  if (ends.size() == 1) return write_tensors(folder / "model.safetensors", tensors, metadata);

  Json weight_map = Json::object();
  std::size_t begin = 0;
  for (std::size_t shard = 0; shard < ends.size(); ++shard) {
    char name[64];
    std::snprintf(name, sizeof name, "model-%05zu-of-%05zu.safetensors", shard + 1, ends.size());
    write_tensors(folder / name, tensors.subspan(begin, ends[shard] - begin), metadata);
    for (; begin < ends[shard]; ++begin) weight_map[tensors[begin].decl.name] = name;
  }
  const Json index = {{"metadata", {{"total_size", total}}}, {"weight_map", weight_map}};
  write_text(folder / "model.safetensors.index.json", index.dump(2) + "\n");
}

}  // namespace pare
