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

// Work on every parameter of an expert, and the name inside the block.
template <class Work>
void each_of_expert(DecoderBlock& block, const ModelConfig& config, std::int64_t expert, const Work& work) {
  const std::string prefix = config.experts.module + ".experts." + std::to_string(expert) + ".";
  for (auto& parameter : block->named_parameters())
    if (parameter.key().starts_with(prefix)) work(parameter.value(), parameter.key());
}

}  // namespace

Tensor load_tensor(const Checkpoint& checkpoint, const std::string& name, const torch::Device& device) {
  const TensorSpec& spec = checkpoint.spec(name);
  Tensor values = torch::empty(spec.shape, torch::kFloat);
  checkpoint.read_f32(name, values.data_ptr<float>());
  return values.to(device);
}

Decoder load_decoder(const Checkpoint& checkpoint, const torch::Device& device, bool float_inputs) {
  const torch::NoGradGuard no_grad;
  Decoder decoder(checkpoint.config());
  for (const TensorSpec& spec : checkpoint.tensors()) {
    fill(checkpoint, spec.name, decoder->tensor(spec.name));
    if (float_inputs || !checkpoint.codec(spec.name).int8_inputs) continue;
    if (spec.layer < 0) decoder->round_head_inputs();
    else decoder->block(spec.layer)->round_inputs(spec.module);
  }
  decoder->to(device);
  return decoder;
}

DecoderBlock load_block(const Checkpoint& checkpoint, int layer, const torch::Device& device, bool experts) {
  const torch::NoGradGuard no_grad;
#if defined(__GLIBC__)
  malloc_trim(0);  // what the block before used: the heap would keep it, in pieces (see prepare_threads)
#endif
  DecoderBlock block(checkpoint.config(), layer, experts);
  auto parameters = block->named_parameters();
  const std::string prefix = "model.layers." + std::to_string(layer) + ".";
  for (const TensorSpec& spec : checkpoint.tensors()) {
    if (spec.layer == layer && checkpoint.codec(spec.name).int8_inputs) block->round_inputs(spec.module);
    if (spec.layer != layer || (!experts && spec.expert >= 0)) continue;
    fill(checkpoint, spec.name, parameters[spec.name.substr(prefix.size())]);
  }
  block->to(device);
  return block;
}

void load_expert(const Checkpoint& checkpoint, DecoderBlock& block, std::int64_t expert, const torch::Device& device) {
  const torch::NoGradGuard no_grad;
  const std::string prefix = "model.layers." + std::to_string(block->layer()) + ".";
  each_of_expert(block, checkpoint.config(), expert, [&](Tensor& parameter, const std::string& name) {
    parameter.set_data(load_tensor(checkpoint, prefix + name, device));
    checkpoint.release(prefix + name);
  });
}

void drop_expert(DecoderBlock& block, const ModelConfig& config, std::int64_t expert) {
  each_of_expert(block, config, expert,
                 [](Tensor& parameter, const std::string&) { parameter.set_data(torch::empty({0, 0})); });
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
