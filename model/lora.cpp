#include "model/lora.h"

#include <algorithm>
#include <cmath>
#include <set>

#include "core/error.h"
#include "core/placement.h"
#include "core/safetensors.h"
#include "core/uniform.h"

namespace pare {
namespace {

using torch::Tensor;

std::string last_name(const std::string& module) {
  return module.substr(module.rfind('.') + 1);
}

}  // namespace

Lora::Lora(Decoder decoder, const LoraSettings& settings, std::uint64_t seed, const torch::Device& device)
    : decoder_(std::move(decoder)), settings_(settings) {
  const auto specs = expected_tensors(decoder_->config());
  std::set<std::string> names;
  for (const TensorSpec& spec : specs)
    if (spec.role == TensorRole::kLinear && spec.layer >= 0) names.insert(last_name(spec.module));
  for (const std::string& target : settings_.targets) {
    const bool known = std::any_of(specs.begin(), specs.end(), [&](const TensorSpec& spec) {
      return spec.role == TensorRole::kLinear && spec.layer >= 0 &&
             (spec.module == target || last_name(spec.module) == target);
    });
    std::string list;
    for (const std::string& name : names) list += (list.empty() ? "" : ", ") + name;
    if (!known) throw usage_error("--lora-targets", "linears of this model: " + list, target);
  }
  std::uint64_t place = 0;
  for (const TensorSpec& spec : specs) {
    if (spec.role != TensorRole::kLinear || spec.layer < 0) continue;
    const auto& targets = settings_.targets;
    const bool chosen = targets.empty() || std::any_of(targets.begin(), targets.end(), [&](const std::string& target) {
                          return spec.module == target || last_name(spec.module) == target;
                        });
    if (!chosen) continue;
    const std::int64_t out = spec.shape[0], in = spec.shape[1];
    Tensor a = torch::empty({settings_.rank, in});
    const double bound = 1 / std::sqrt(static_cast<double>(in));
    for (std::int64_t i = 0; i < a.numel(); ++i)
      a.data_ptr<float>()[i] = static_cast<float>(bound * (2 * uniform_at(seed, place++) - 1));
    parameters_.push_back(a.to(device).requires_grad_());
    parameters_.push_back(torch::zeros({out, settings_.rank}, torch::TensorOptions(device)).requires_grad_());
    places_.push_back({spec.layer, spec.module, spec.name});
  }
  const double scale = settings_.alpha / static_cast<double>(settings_.rank);
  for (std::size_t i = 0; i < places_.size(); ++i)
    decoder_->block(places_[i].layer)->adapt(places_[i].module, parameters_[2 * i], parameters_[2 * i + 1], scale);
}

std::int64_t Lora::parameter_count() const {
  std::int64_t count = 0;
  for (const Tensor& parameter : parameters_) count += parameter.numel();
  return count;
}

std::pair<std::string, double> Lora::most_zeros() const {
  std::pair<std::string, double> most;
  Decoder decoder = decoder_;
  for (const Place& place : places_) {
    const Tensor& weight = decoder->tensor(place.tensor);
    const double share = static_cast<double>((weight == 0).sum().item<std::int64_t>()) /
                         static_cast<double>(std::max<std::int64_t>(weight.numel(), 1));
    if (share > most.second || most.first.empty()) most = {place.tensor, share};
  }
  return most;
}

void Lora::merge() {
  const torch::NoGradGuard no_grad;
  const double scale = settings_.alpha / static_cast<double>(settings_.rank);
  for (std::size_t i = 0; i < places_.size(); ++i) {
    Tensor& weight = decoder_->tensor(places_[i].tensor);
    weight.add_(torch::mm(parameters_[2 * i + 1], parameters_[2 * i]), scale);
    decoder_->block(places_[i].layer)->adapt(places_[i].module, Tensor(), Tensor(), 0);
  }
}

void check_peft_names(const ModelConfig& config) {
  const std::string expected = "a family whose linears transformers keeps one by one under these names";
  if (config.has_experts())
    throw usage_error("--adapter", expected, config.family + ", whose experts lie in joint tensors",
                      "leave --adapter out: the merged model is written all the same");
  for (const TensorSpec& spec : expected_tensors(config))
    if (spec.role == TensorRole::kLinear && placement(config, spec))
      throw usage_error("--adapter", expected, config.family + ", which keeps " + spec.name + " elsewhere",
                        "leave --adapter out: the merged model is written all the same");
}

void write_peft_adapter(const Lora& lora, const fs::path& folder, const std::string& base_model) {
  std::vector<TensorDecl> entries;
  std::set<std::string> names;
  for (std::size_t i = 0; i < lora.places_.size(); ++i) {
    const std::string& tensor = lora.places_[i].tensor;
    const std::string module = "base_model.model." + tensor.substr(0, tensor.rfind(".weight"));
    names.insert(last_name(lora.places_[i].module));
    for (const int part : {0, 1}) {
      const Tensor& values = lora.parameters_[2 * i + static_cast<std::size_t>(part)];
      entries.push_back(
          {module + (part == 0 ? ".lora_A.weight" : ".lora_B.weight"), DType::kF32, values.sizes().vec()});
    }
  }
  SafetensorsWriter writer(folder / "adapter_model.safetensors", entries, {{"format", "pt"}});
  for (const Tensor& parameter : lora.parameters_) {
    const Tensor host = parameter.detach().to(torch::kCPU).contiguous();
    writer.write(
        {reinterpret_cast<const std::byte*>(host.data_ptr<float>()), static_cast<std::size_t>(host.numel()) * 4});
  }
  writer.finish();
  const Json config{{"peft_type", "LORA"},
                    {"task_type", "CAUSAL_LM"},
                    {"base_model_name_or_path", base_model},
                    {"r", lora.settings_.rank},
                    {"lora_alpha", lora.settings_.alpha},
                    {"lora_dropout", 0.0},
                    {"bias", "none"},
                    {"fan_in_fan_out", false},
                    {"use_rslora", false},
                    {"inference_mode", true},
                    {"target_modules", std::vector<std::string>(names.begin(), names.end())}};
  write_text(folder / "adapter_config.json", config.dump(2) + "\n");
}

}  // namespace pare
