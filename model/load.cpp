// Checkpoint <-> module: every tensor of the config is read, and written, exactly once.
#include <malloc.h>

#include "core/error.h"
#include "model/decoder.h"

namespace pare {
namespace {

using torch::Tensor;

void fill(const Checkpoint& checkpoint, const std::string& name, Tensor& parameter) {
  parameter.copy_(load_tensor(checkpoint, name, torch::kCPU));
  checkpoint.release(name);
}

}  // namespace

Tensor load_tensor(const Checkpoint& checkpoint, const std::string& name, const torch::Device& device) {
  const TensorSpec& spec = checkpoint.spec(name);
  Tensor values = torch::empty(spec.shape, torch::kFloat);
  checkpoint.read_f32(name, values.data_ptr<float>());
  return values.to(device);
}

Decoder load_decoder(const Checkpoint& checkpoint, const torch::Device& device) {
  const torch::NoGradGuard no_grad;
  Decoder decoder(checkpoint.config());
  for (const TensorSpec& spec : checkpoint.tensors()) fill(checkpoint, spec.name, decoder->tensor(spec.name));
  decoder->to(device);
  return decoder;
}

DecoderBlock load_block(const Checkpoint& checkpoint, int layer, const torch::Device& device) {
  const torch::NoGradGuard no_grad;
#if defined(__GLIBC__)
  malloc_trim(0);  // what the block before used: the heap would keep it, in pieces (see prepare_threads)
#endif
  DecoderBlock block(checkpoint.config(), layer);
  auto parameters = block->named_parameters();
  const std::string prefix = "model.layers." + std::to_string(layer) + ".";
  for (const TensorSpec& spec : checkpoint.tensors())
    if (spec.layer == layer) fill(checkpoint, spec.name, parameters[spec.name.substr(prefix.size())]);
  block->to(device);
  return block;
}

void write_decoder(Decoder& decoder, const std::string& dtype, const fs::path& like, const fs::path& folder) {
  const torch::NoGradGuard no_grad;
  CheckpointWriter writer(folder, decoder->config(), dtype);
  for (const TensorSpec& spec : expected_tensors(decoder->config())) {
    const Tensor values = decoder->tensor(spec.name).to(torch::kCPU, torch::kFloat).contiguous();
    writer.put(spec.name, values.data_ptr<float>());
  }
  if (!like.empty()) writer.copy_side_files(like);
  writer.finish();
}

void save_decoder(Decoder& decoder, const std::string& dtype, const fs::path& like, const fs::path& out) {
  FolderTransaction transaction(out);
  write_decoder(decoder, dtype, like, transaction.work());
  transaction.commit();
}

}  // namespace pare
