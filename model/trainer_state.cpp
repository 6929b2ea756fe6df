#include "model/trainer_state.h"

#include <ATen/Parallel.h>

#include <cmath>
#include <cstring>

#include "core/error.h"
#include "core/safetensors.h"
#include "model/fused.h"

namespace pare {
namespace {

constexpr const char* kMetaKey = "pare.training";

}  // namespace

FlatParameters::FlatParameters(Decoder& decoder, const std::string& keep_zeros, const torch::Device& device,
                               const std::vector<torch::Tensor>& companions, bool frozen) {
  const torch::NoGradGuard no_grad;
  const auto specs = frozen ? std::vector<TensorSpec>() : expected_tensors(decoder->config());
  if (frozen)
    for (torch::Tensor& parameter : decoder->parameters()) parameter.set_requires_grad(false);
  std::int64_t total = 0;
  const auto reserve = [&](std::int64_t count, bool matrix) {
    ranges_.push_back({total, count, matrix});
    total += (count + 15) / 16 * 16;  // every parameter begins on 64 bytes
  };
  for (const TensorSpec& spec : specs)
    reserve(decoder->tensor(spec.name).numel(), spec.role != TensorRole::kNorm && spec.role != TensorRole::kBias);
  for (const torch::Tensor& companion : companions) reserve(companion.numel(), true);
  const auto options = torch::TensorOptions(device).dtype(torch::kFloat);
  w_ = torch::zeros({total}, options);
  g_ = torch::zeros({total}, options);
  m_ = torch::zeros({total}, options);
  v_ = torch::zeros({total}, options);
  const auto adopt = [&](torch::Tensor parameter, const Range& range) {
    const torch::Tensor view = w_.narrow(0, range.begin, range.count).view(parameter.sizes());
    view.copy_(parameter);
    parameter.set_data(view);
    parameter.mutable_grad() = g_.narrow(0, range.begin, range.count).view(parameter.sizes());
    return view;
  };
  for (std::size_t i = 0; i < companions.size(); ++i) adopt(companions[i], ranges_[specs.size() + i]);
  for (std::size_t i = 0; i < specs.size(); ++i) {
    const Range& range = ranges_[i];
    const torch::Tensor view = adopt(decoder->tensor(specs[i].name), range);
    if (specs[i].role != TensorRole::kLinear || keep_zeros == "off") continue;
    const torch::Tensor zero = view == 0;
    const auto zeros = zero.sum().item<std::int64_t>();
    if (zeros == 0 || (keep_zeros == "auto" && static_cast<double>(zeros) <= kPrunedShare * static_cast<double>(range.count)))
      continue;
    if (!keep_.defined()) keep_ = torch::ones({total}, options.dtype(torch::kByte));
    keep_.narrow(0, range.begin, range.count).copy_(zero.logical_not().view(-1));
    kept_zeros_ += zeros;
  }
}

void FlatParameters::take_best() {
  const torch::NoGradGuard no_grad;
  if (best_.defined()) w_.copy_(best_);
}

void FlatParameters::share(Ranks& ranks) {
  for (const torch::Tensor* tensor : {&w_, &m_, &v_}) ranks.broadcast(*tensor);
  torch::Tensor kept = torch::full({1}, best_.defined() ? 1 : 0, torch::kLong);
  ranks.broadcast(kept);
  if (kept.item<std::int64_t>() == 0) return;
  if (!best_.defined()) best_ = torch::empty_like(w_);
  ranks.broadcast(best_);
}

void FlatParameters::clear_gradients() { g_.zero_(); }

double FlatParameters::gradient_norm() const { return std::sqrt(sum_of_squares(g_)); }

std::string FlatParameters::hash() const {
  const torch::Tensor host = w_.to(torch::kCPU).contiguous();
  return hash_bytes(std::as_bytes(std::span(host.data_ptr<float>(), static_cast<std::size_t>(host.numel()))));
}

void FlatParameters::step(double lr, double beta1, double beta2, double decay, double clip_factor, std::int64_t t) {
  const torch::NoGradGuard no_grad;
  const double correction1 = 1 - std::pow(beta1, static_cast<double>(t));
  const double correction2 = 1 - std::pow(beta2, static_cast<double>(t));
  constexpr double kEps = 1e-8;
  if (w_.device().is_cpu()) {
    AdamStep a;
    a.lr = static_cast<float>(lr);
    a.beta1 = static_cast<float>(beta1);
    a.beta2 = static_cast<float>(beta2);
    a.eps = static_cast<float>(kEps);
    a.correction1 = static_cast<float>(correction1);
    a.correction2 = static_cast<float>(correction2);
    a.clip = static_cast<float>(clip_factor);
    const std::uint8_t* keep = keep_.defined() ? keep_.data_ptr<std::uint8_t>() : nullptr;
    constexpr std::int64_t kChunk = 1 << 15;
    for (const Range& range : ranges_) {
      at::parallel_for(0, (range.count + kChunk - 1) / kChunk, 1, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i) {
          const std::int64_t at = range.begin + i * kChunk;
          optimizer_kernels().adamw(a, range.decay ? static_cast<float>(decay) : 0.0f,
                                    keep == nullptr ? nullptr : keep + at, std::min(kChunk, range.count - i * kChunk),
                                    w_.data_ptr<float>() + at, g_.data_ptr<float>() + at, m_.data_ptr<float>() + at,
                                    v_.data_ptr<float>() + at);
        }
      });
    }
    return;
  }
  g_.mul_(clip_factor);
  m_.mul_(beta1).add_(g_, 1 - beta1);
  v_.mul_(beta2).addcmul_(g_, g_, 1 - beta2);
  for (const Range& range : ranges_)
    if (range.decay) w_.narrow(0, range.begin, range.count).mul_(1 - lr * decay);
  w_.addcdiv_(m_, (v_ / correction2).sqrt_().add_(kEps), -lr / correction1);
  if (keep_.defined()) w_.mul_(keep_);
}

void FlatParameters::write(const fs::path& file, const Json& meta) const {
  const std::int64_t count = w_.numel();
  std::vector<TensorDecl> entries = {{"weights", DType::kF32, {count}},
                                                   {"first_moment", DType::kF32, {count}},
                                                   {"second_moment", DType::kF32, {count}}};
  std::vector<const torch::Tensor*> tensors = {&w_, &m_, &v_};
  if (best_.defined()) {
    entries.push_back({"best_weights", DType::kF32, {count}});
    tensors.push_back(&best_);
  }
  SafetensorsWriter writer(file, entries, {{kMetaKey, meta.dump()}});
  for (const torch::Tensor* tensor : tensors) {
    const torch::Tensor host = tensor->to(torch::kCPU).contiguous();
    writer.write({reinterpret_cast<const std::byte*>(host.data_ptr<float>()), static_cast<std::size_t>(count) * 4});
  }
  writer.finish();
}

Json FlatParameters::read(const fs::path& file) {
  const torch::NoGradGuard no_grad;
  const SafetensorsFile state(file);
  const auto meta = state.metadata().find(kMetaKey);
  if (meta == state.metadata().end()) throw input_error(file.string(), "a training state", "no " + std::string(kMetaKey));
  std::vector<std::pair<const char*, torch::Tensor*>> parts = {
      {"weights", &w_}, {"first_moment", &m_}, {"second_moment", &v_}};
  if (state.find("best_weights") != nullptr) {
    best_ = torch::empty_like(w_);
    parts.push_back({"best_weights", &best_});
  }
  for (const auto& [name, target] : parts) {
    const TensorView* view = state.find(name);
    if (view == nullptr || view->dtype != DType::kF32 || view->elements() != target->numel())
      throw input_error(file.string(), std::to_string(target->numel()) + " float32 values in " + name,
                        view == nullptr ? "none" : std::to_string(view->elements()));
    torch::Tensor host = torch::empty({target->numel()}, torch::kFloat);
    std::memcpy(host.data_ptr<float>(), view->data.data(), view->data.size());
    target->copy_(host);
  }
  return parse_json(meta->second, file.string() + ": " + kMetaKey);
}

}  // namespace pare
