#include "distill/student.h"

#include <algorithm>
#include <charconv>
#include <numeric>

#include "core/error.h"

namespace pare {
namespace {

using torch::Tensor;

std::vector<std::int64_t> strongest_neurons(Decoder& teacher, int layer, std::int64_t keep) {
  const DecoderBlock block = teacher->block(layer);
  Tensor gate, up;
  if (!teacher->config().gated_mlp) {
    up = block->weight("mlp.up_proj");
  } else if (teacher->config().fused_gate_up) {
    const auto halves = block->weight("mlp.gate_up_proj").chunk(2, 0);
    gate = halves[0];
    up = halves[1];
  } else {
    gate = block->weight("mlp.gate_proj");
    up = block->weight("mlp.up_proj");
  }
  Tensor in = up.to(torch::kDouble).norm(2, {1});
  if (gate.defined()) in = gate.to(torch::kDouble).norm(2, {1}) * in;
  const Tensor score =
      (in * block->weight("mlp.down_proj").to(torch::kDouble).norm(2, {0})).to(torch::kCPU).contiguous();
  std::vector<std::int64_t> order(static_cast<std::size_t>(score.numel()));
  std::iota(order.begin(), order.end(), std::int64_t{0});
  const double* value = score.data_ptr<double>();
  std::stable_sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) { return value[a] > value[b]; });
  order.resize(static_cast<std::size_t>(keep));
  std::sort(order.begin(), order.end());
  return order;
}

}  // namespace

std::vector<int> parse_layers(const std::string& text, std::int64_t num_layers) {
  std::vector<int> layers;
  const std::string expected = "rising layer numbers below " + std::to_string(num_layers) + ", such as 0,2,3";
  for (std::size_t begin = 0; begin <= text.size();) {
    const std::size_t end = std::min(text.find(',', begin), text.size());
    int layer = -1;
    const auto [stop, error] = std::from_chars(text.data() + begin, text.data() + end, layer);
    if (error != std::errc() || stop != text.data() + end || layer < 0 || layer >= num_layers ||
        (!layers.empty() && layer <= layers.back()))
      throw usage_error("--keep-layers", expected, text);
    layers.push_back(layer);
    begin = end + 1;
  }
  return layers;
}

void require_one_mlp(const ModelConfig& teacher) {
  if (teacher.has_experts())
    throw usage_error("--ffn", "a teacher with one MLP a block", std::to_string(teacher.experts.count) + " experts",
                      "leave out --ffn; --keep-layers works");
}

Decoder cut_student(Decoder& teacher, const std::vector<int>& kept, std::int64_t ffn) {
  const torch::NoGradGuard no_grad;
  ModelConfig config = teacher->config();
  std::vector<int> layers = kept;
  if (layers.empty()) {
    layers.resize(static_cast<std::size_t>(config.num_layers));
    std::iota(layers.begin(), layers.end(), 0);
  }
  if (ffn < 0 || ffn > config.intermediate_size)
    throw usage_error("--ffn", "at most " + std::to_string(config.intermediate_size) + " neurons (the teacher's)",
                      std::to_string(ffn));
  const bool narrower = ffn > 0 && ffn < config.intermediate_size;
  if (narrower) require_one_mlp(config);
  const std::int64_t teacher_width = config.intermediate_size;
  config = with_layers(config, layers);
  if (narrower) config.intermediate_size = ffn;
  Decoder student(config);
  std::vector<Tensor> neurons;
  for (const int layer : layers)
    neurons.push_back(narrower ? torch::tensor(strongest_neurons(teacher, layer, ffn), torch::kLong) : Tensor());
  for (const TensorSpec& spec : expected_tensors(config)) {
    std::string from = spec.name;
    Tensor index;
    if (spec.layer >= 0) {
      const auto at = static_cast<std::size_t>(spec.layer);
      const std::string prefix = "model.layers." + std::to_string(spec.layer) + ".";
      from = "model.layers." + std::to_string(layers[at]) + "." + spec.name.substr(prefix.size());
      index = neurons[at];
    }
    Tensor values = teacher->tensor(from).detach();
    if (index.defined()) {
      index = index.to(values.device());
      if (spec.module == "mlp.gate_proj" || spec.module == "mlp.up_proj") values = values.index_select(0, index);
      if (spec.module == "mlp.gate_up_proj")
        values = values.index_select(0, torch::cat({index, index + teacher_width}));
      if (spec.module == "mlp.down_proj" && spec.role == TensorRole::kLinear) values = values.index_select(1, index);
    }
    student->tensor(spec.name).copy_(values);
  }
  return student;
}

}  // namespace pare
