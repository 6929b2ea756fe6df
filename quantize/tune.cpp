#include "quantize/tune.h"

#include <omp.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <map>
#include <numbers>
#include <optional>

#include "core/error.h"
#include "core/safetensors.h"
#include "model/decoder.h"
#include "model/threads.h"
#include "quantize/kl_model.h"
#include "quantize/scales.h"

namespace pare {
namespace {

using torch::Tensor;

constexpr double kBeta1 = 0.9, kBeta2 = 0.99, kEps = 1e-12, kWarmup = 0.05;
constexpr const char* kMetaKey = "pare.tune";
constexpr double kSaveSeconds = 120;
constexpr double kLatentReach = 0.35;  // of a code
constexpr std::int64_t kCurvatureWindows = 64;
constexpr std::uint64_t kCurvatureSeed = 0x63757276;
constexpr double kMiddleCode = 7.5;    // of those from 0 to 15
constexpr double kShiftRate = 8;       // of a centre in steps of the code, against that of the scale's logarithm

// One trained row of numbers and its Adam moments.
struct Trained {
  Tensor value, first, second;
  explicit Trained(Tensor start) : value(std::move(start)) {
    first = torch::zeros_like(value);
    second = torch::zeros_like(value);
  }
  void step(const Tensor& gradient, double lr, std::int64_t t) {
    first.mul_(kBeta1).add_(gradient, 1 - kBeta1);
    second.mul_(kBeta2).addcmul_(gradient, gradient, 1 - kBeta2);
    const double c1 = 1 - std::pow(kBeta1, static_cast<double>(t)), c2 = 1 - std::pow(kBeta2, static_cast<double>(t));
    value.addcdiv_(first, (second / c2).sqrt_().add_(kEps), -lr / c1);
  }
};

// Warm-up, then a cosine to zero at the last step.
double schedule(std::int64_t step, std::int64_t steps) {
  const double at = static_cast<double>(step) + 1, all = static_cast<double>(steps);
  const double warm = std::max(1.0, kWarmup * all);
  if (at < warm) return at / warm;
  return 0.5 * (1 + std::cos(std::numbers::pi * (at - warm) / std::max(1.0, all - warm)));
}

// A quantized matrix: weight = stored(exp(log_factor) * scale) * offset, offset = code - zero. With minima the scale
// turns about the centre of the codes: weight = scale * code + stored(centre + shift * scale as rounded - 7.5 * scale).
struct Matrix {
  const TensorPlan* plan = nullptr;
  Tensor weight;   // the decoder's parameter [rows, cols]
  Tensor scales;   // [rows, groups] as rounded
  Tensor zeros;    // [rows, groups, 1], undefined for symmetric codecs
  Tensor centres;  // [rows, groups] minimum + 7.5 scale as rounded, kQ4m only
  Tensor offsets;  // [rows, groups, size] int8
  Trained log_factors;
  std::optional<Trained> shifts;  // [rows, groups] of the centres, in steps of the code as rounded
  std::optional<Trained> latent;  // [rows, groups, size], offsets before rounding
  Tensor curvature;               // latent only: second derivative of the KL by each weight, [rows, groups, size]
  Tensor kept;                    // latent only: 0 where a pruned zero stays, else undefined
  double low = 0, high = 0;       // of a code

  Tensor stored_scales() const {
    // + 0: no negative zero
    return (scales * log_factors.value.exp()).clamp(-65504.0, 65504.0).to(torch::kHalf).to(torch::kFloat) + 0.0;
  }
  // [rows, groups] under these stored scales; undefined without minima
  Tensor stored_minima(const Tensor& stored) const {
    if (!centres.defined()) return {};
    return (centres + shifts->value * scales - kMiddleCode * stored).clamp(-65504.0, 65504.0).to(torch::kHalf).to(
        torch::kFloat);
  }
  Tensor rounded() const {
    Tensor q = latent->value.round();
    const Tensor base = zeros.defined() ? zeros : torch::zeros({1}, q.options());
    q = torch::maximum(torch::minimum(q, high - base), low - base);
    return kept.defined() ? q * kept : q;
  }
};

// A norm or a bias.
struct Vector {
  const TensorPlan* plan = nullptr;
  Tensor parameter;
  double size = 0;  // root mean square of what it multiplies by: steps are relative to it
  Trained trained;
};

class Tuner {
 public:
  Tuner(const TuneJob& job, Context& context)
      : job_(job),
        context_(context),
        models_(job.original, job.rounded, job.device, job.threads, job.windows.length),
        device_(models_.device()) {
    const torch::NoGradGuard no_grad;
    for (const TensorPlan& plan : job.plan) add(plan);
    for (Matrix& matrix : matrices_) trained_.push_back(matrix.weight);
    for (Vector& vector : vectors_) trained_.push_back(vector.parameter);
    for (Tensor& parameter : trained_) parameter.set_requires_grad(true);
  }

  TuneResult run(CheckpointWriter& writer);

 private:
  void add(const TensorPlan& plan);
  void add_matrix(const TensorPlan& plan, const Tensor& weight);
  void measure_curvature();
  void compute_weights();
  void update(const std::vector<Tensor>& gradients, std::int64_t step);
  std::int64_t write(CheckpointWriter& writer, bool improved);
  void save(std::int64_t step, double kl_before);
  std::int64_t restore(double& kl_before);
  std::vector<std::pair<std::string, Tensor*>> state();

  const TuneJob& job_;
  Context& context_;
  KlModel models_;
  torch::Device device_;
  std::vector<Matrix> matrices_;
  std::vector<Vector> vectors_;
  std::vector<Tensor> trained_;
};

void Tuner::add(const TensorPlan& plan) {
  Tensor& parameter = models_.quantized()->tensor(plan.spec.name);
  if (plan.codec) return add_matrix(plan, parameter);
  const bool norm = plan.spec.role == TensorRole::kNorm;
  if (!norm && plan.spec.role != TensorRole::kBias) return;
  const Tensor factor = norm ? norm_factor(job_.original.config(), parameter) : parameter;
  const double size = std::sqrt(factor.square().mean().item<double>());
  if (size > 0) vectors_.push_back({&plan, parameter, size, Trained(parameter.detach().clone())});
}

void Tuner::add_matrix(const TensorPlan& plan, const Tensor& weight) {
  const QuantizedTensor codes = job_.rounded.codes(plan.spec.name);
  const std::int64_t rows = codes.rows, groups = codes.codec.groups(codes.cols), size = codes.cols / groups;
  Tensor scales = torch::empty({rows, groups}), zeros;
  for (std::size_t i = 0; i < codes.scales.size(); ++i) scales.data_ptr<float>()[i] = f16_to_f32(codes.scales[i]);
  Tensor offsets = torch::empty({rows, groups, size}, torch::kChar);
  std::copy(codes.codes.begin(), codes.codes.end(), offsets.data_ptr<std::int8_t>());
  if (!codes.zeros.empty()) {
    zeros = torch::empty({rows, groups, 1});
    for (std::size_t i = 0; i < codes.zeros.size(); ++i) zeros.data_ptr<float>()[i] = codes.zeros[i];
    offsets = (offsets.to(torch::kFloat) - zeros).to(torch::kChar);
    zeros = zeros.to(device_);
  }
  Tensor centres;
  if (!codes.minima.empty()) {
    centres = scales * kMiddleCode;
    for (std::size_t i = 0; i < codes.minima.size(); ++i) centres.data_ptr<float>()[i] += f16_to_f32(codes.minima[i]);
    centres = centres.to(device_);
  }
  Matrix matrix{&plan, weight, scales.to(device_), zeros, centres, offsets.to(device_),
                Trained(torch::zeros_like(scales).to(device_)), {}, {}, {}, {}, 0, 0};
  if (centres.defined()) matrix.shifts.emplace(torch::zeros_like(scales).to(device_));
  const CodeRange range = code_range(codes.codec.kind);
  matrix.low = range.low;
  matrix.high = range.high;
  if (job_.settings.code_steps > 0 && plan.spec.role == TensorRole::kLinear) {
    const Tensor original = models_.original()->tensor(plan.spec.name).view({rows, groups, size});
    // Towards where the original lies, but well inside of what rounds to the code that stands there: the first steps,
    // before gradients have averaged, would else throw over what the sweep has chosen.
    const Tensor code = matrix.offsets.to(torch::kFloat), scale = matrix.scales.unsqueeze(-1);
    const Tensor above =
        centres.defined() ? original - matrix.stored_minima(matrix.scales).unsqueeze(-1) : original;
    const Tensor place = torch::where(scale != 0, above / torch::where(scale != 0, scale, torch::ones_like(scale)),
                                      torch::zeros_like(original));
    matrix.latent.emplace(torch::maximum(torch::minimum(place, code + kLatentReach), code - kLatentReach));
    // With minima zeros lie in groups of zeros alone, whose scale is 0 and stays so; code 0 is the least weight there.
    const Tensor zero = original == 0;
    if (!centres.defined() && zero.to(torch::kFloat).mean().item<double>() >= 0.05)
      matrix.kept = zero.logical_not().to(torch::kFloat);
  }
  matrices_.push_back(std::move(matrix));
}

void Tuner::measure_curvature() {
  std::vector<Tensor> parameters;
  std::vector<Matrix*> owners;
  for (Matrix& matrix : matrices_) {
    if (!matrix.latent) continue;
    owners.push_back(&matrix);
    parameters.push_back(models_.original()->tensor(matrix.plan->spec.name));
  }
  for (Tensor& parameter : parameters) parameter.set_requires_grad(true);
  const std::vector<Tensor> found =
      models_.curvature(job_.windows, std::min(job_.windows.count, kCurvatureWindows), kCurvatureSeed, parameters);
  for (Tensor& parameter : parameters) parameter.set_requires_grad(false);
  for (std::size_t i = 0; i < owners.size(); ++i) owners[i]->curvature = found[i].view(owners[i]->offsets.sizes());
}

void Tuner::compute_weights() {
  const torch::NoGradGuard no_grad;
  for (Matrix& m : matrices_) {
    if (m.latent) m.offsets = m.rounded().to(torch::kChar);
    const Tensor scale = m.stored_scales(), minimum = m.stored_minima(scale);
    Tensor weight = m.offsets.to(torch::kFloat) * scale.unsqueeze(-1);
    if (minimum.defined()) weight += minimum.unsqueeze(-1);
    m.weight.view(m.offsets.sizes()).copy_(weight);
  }
  const auto type = job_.dtype == "bfloat16"  ? torch::kBFloat16
                    : job_.dtype == "float16" ? torch::kHalf
                                              : torch::kFloat;
  for (Vector& v : vectors_) v.parameter.copy_(v.trained.value.to(type).to(torch::kFloat));
}

void Tuner::update(const std::vector<Tensor>& gradients, std::int64_t step) {
  const torch::NoGradGuard no_grad;
  const TuneSettings& s = job_.settings;
  const double lr = s.lr * schedule(step, s.code_steps + s.steps);
  for (std::size_t i = 0; i < matrices_.size(); ++i) {
    if (!gradients[i].defined()) continue;
    Matrix& m = matrices_[i];
    const Tensor g = gradients[i].view(m.offsets.sizes()), scale = m.stored_scales();
    if (m.shifts) {
      const Tensor sum = g.sum(-1);
      m.log_factors.step(((g * m.offsets).sum(-1) - kMiddleCode * sum) * scale, lr, step + 1);
      m.shifts->step(sum * m.scales, kShiftRate * lr, step + 1);
    } else {
      m.log_factors.step((g * m.offsets).sum(-1) * scale, lr, step + 1);
    }
    if (!m.latent) continue;
    // The gradient at the code, and with a weight that rises from 0 to 1 what it lacks to that at the latent code, by the
    // second derivative: in the end a code moves only where that lowers the loss, and does not swing between two.
    Tensor pull = g * scale.unsqueeze(-1);
    const double settled = static_cast<double>(step) / static_cast<double>(s.code_steps);
    pull.addcmul_(m.curvature * scale.square().unsqueeze(-1), m.latent->value - m.offsets, settled);
    if (m.kept.defined()) pull.mul_(m.kept);
    m.latent->step(pull, s.code_lr * schedule(step, s.code_steps), step + 1);
    if (step + 1 == s.code_steps) {  // from here on codes stay as they are
      m.offsets = m.rounded().to(torch::kChar);
      m.latent.reset();
      m.curvature = Tensor();
    } else {  // no further than where the rounding would not follow
      const Tensor base = m.zeros.defined() ? m.zeros : torch::zeros({1}, pull.options());
      m.latent->value = torch::maximum(torch::minimum(m.latent->value, m.high + 0.5 - base), m.low - 0.5 - base);
    }
  }
  for (std::size_t i = 0; i < vectors_.size(); ++i) {
    const Tensor& g = gradients[matrices_.size() + i];
    if (g.defined()) vectors_[i].trained.step(g, lr * vectors_[i].size, step + 1);
  }
}

std::vector<std::pair<std::string, Tensor*>> Tuner::state() {
  std::vector<std::pair<std::string, Tensor*>> parts;
  const auto put = [&](const std::string& name, Trained& t) {
    parts.emplace_back(name + ".value", &t.value);
    parts.emplace_back(name + ".first", &t.first);
    parts.emplace_back(name + ".second", &t.second);
  };
  for (Matrix& m : matrices_) {
    put(m.plan->spec.name + ".log_factors", m.log_factors);
    if (m.shifts) put(m.plan->spec.name + ".shifts", *m.shifts);
    if (m.latent)
      put(m.plan->spec.name + ".latent", *m.latent);
    else if (job_.settings.code_steps > 0)
      parts.emplace_back(m.plan->spec.name + ".offsets", &m.offsets);
  }
  for (Vector& v : vectors_) put(v.plan->spec.name, v.trained);
  return parts;
}

void Tuner::save(std::int64_t step, double kl_before) {
  std::vector<TensorDecl> entries;
  std::vector<Tensor> hosts;
  for (const auto& [name, tensor] : state()) {
    hosts.push_back(tensor->to(torch::kCPU).contiguous());
    entries.push_back({name, tensor->scalar_type() == torch::kChar ? DType::kI8 : DType::kF32, {tensor->numel()}});
  }
  SafetensorsWriter writer(job_.state, entries, {{kMetaKey, Json{{"step", step}, {"kl_before", kl_before}}.dump()}});
  for (const Tensor& host : hosts) writer.write({static_cast<const std::byte*>(host.data_ptr()), host.nbytes()});
  writer.finish();
}

std::int64_t Tuner::restore(double& kl_before) {
  const torch::NoGradGuard no_grad;
  const SafetensorsFile file(job_.state);
  const auto meta = file.metadata().find(kMetaKey);
  if (meta == file.metadata().end())
    throw input_error(job_.state.string(), "the state of a tuning run", "no " + std::string(kMetaKey));
  const Json values = parse_json(meta->second, job_.state.string());
  const auto step = values.at("step").get<std::int64_t>();
  kl_before = values.at("kl_before").get<double>();
  if (step >= job_.settings.code_steps)
    for (Matrix& m : matrices_) m.latent.reset();
  for (const auto& [name, tensor] : state()) {
    const TensorView* view = file.find(name);
    Tensor host = torch::empty(tensor->sizes(), torch::TensorOptions().dtype(tensor->scalar_type()));
    if (view == nullptr || view->data.size() != host.nbytes())
      throw input_error(job_.state.string(), std::to_string(host.nbytes()) + " bytes of " + name,
                        view == nullptr ? "none" : std::to_string(view->data.size()), "remove it to begin tuning anew");
    std::memcpy(host.data_ptr(), view->data.data(), view->data.size());
    tensor->copy_(host);
  }
  return step;
}

std::int64_t Tuner::write(CheckpointWriter& writer, bool improved) {
  const torch::NoGradGuard no_grad;
  std::int64_t moved = 0;
  std::map<std::string, const Matrix*> matrices;
  std::map<std::string, const Vector*> vectors;
  for (const Matrix& m : matrices_) matrices[m.plan->spec.name] = &m;
  for (const Vector& v : vectors_) vectors[v.plan->spec.name] = &v;
  for (const TensorPlan& plan : job_.plan) {
    const std::string& name = plan.spec.name;
    if (!plan.codec) {
      if (writer.has(name)) continue;
      const auto tuned = vectors.find(name);
      const std::vector<float> values = job_.rounded.read_f32(name);
      const Tensor better = improved && tuned != vectors.end()
                                ? tuned->second->trained.value.to(torch::kCPU).contiguous()
                                : torch::Tensor();
      writer.put(name, better.defined() ? better.data_ptr<float>() : values.data());
      continue;
    }
    QuantizedTensor codes = job_.rounded.codes(name);
    if (improved) {
      const Matrix& m = *matrices.at(name);
      const Tensor scales = m.stored_scales().to(torch::kCPU).contiguous();
      for (std::size_t i = 0; i < codes.scales.size(); ++i) codes.scales[i] = f32_to_f16(scales.data_ptr<float>()[i]);
      if (m.centres.defined()) {
        const Tensor minima = m.stored_minima(m.stored_scales()).to(torch::kCPU).contiguous();
        for (std::size_t i = 0; i < codes.minima.size(); ++i) codes.minima[i] = f32_to_f16(minima.data_ptr<float>()[i]);
      }
      Tensor offsets = m.offsets.to(torch::kFloat);
      if (m.zeros.defined()) offsets = offsets + m.zeros;
      const Tensor host = offsets.to(torch::kChar).to(torch::kCPU).contiguous();
      for (std::size_t i = 0; i < codes.codes.size(); ++i) {
        moved += codes.codes[i] != host.data_ptr<std::int8_t>()[i];
        codes.codes[i] = host.data_ptr<std::int8_t>()[i];
      }
    }
    if (!writer.has(name)) writer.put_codes(name, codes);
  }
  return moved;
}

TuneResult Tuner::run(CheckpointWriter& writer) {
  const SingleThreadedTorch single;  // parallelism is over windows
  const std::int64_t steps = job_.settings.code_steps + job_.settings.steps;
  TuneResult result;
  std::int64_t step = 0;
  if (fs::exists(job_.state)) {
    step = restore(result.kl_before);
    context_.progress->note("Tuning continues from step " + std::to_string(step));
  } else {
    result.kl_before = models_.divergence(job_.validation);  // of the codes as rounded
  }
  if (step < job_.settings.code_steps) measure_curvature();
  context_.progress->begin("tune", steps);
  auto saved = std::chrono::steady_clock::now();
  double smoothed = 0;
  for (; step < steps; ++step) {
    compute_weights();
    double kl = 0;
    std::vector<Tensor> sums;
    try {
      throw_if_interrupted("tuning", "the same command continues here");
      sums = models_.gradients(job_.windows, step * job_.settings.batch, job_.settings.batch, trained_, kl);
    } catch (const Error& error) {
      if (error.code() == ExitCode::kInterrupted) save(step, result.kl_before);
      throw;
    }
    bool finite = std::isfinite(kl);
    for (const Tensor& sum : sums) finite = finite && (!sum.defined() || std::isfinite(sum.sum().item<double>()));
    if (!finite)
      throw failure("tuning at step " + std::to_string(step + 1), "finite loss and gradients", "NaN or infinity",
                    "a smaller --tune-lr");
    update(sums, step);
    smoothed = smoothed == 0 ? kl : 0.95 * smoothed + 0.05 * kl;
    char text[64];
    std::snprintf(text, sizeof text, "KL %.5f", smoothed);
    context_.progress->update(step + 1, text);
    const auto now = std::chrono::steady_clock::now();
    if (std::chrono::duration<double>(now - saved).count() < kSaveSeconds) continue;
    save(step + 1, result.kl_before);
    saved = now;
  }
  context_.progress->end();
  save(step, result.kl_before);
  compute_weights();
  result.kl_after = models_.divergence(job_.validation);
  result.improved = result.kl_after < result.kl_before;
  if (!result.improved)
    context_.progress->note("Tuning did not lower the KL on text it was not tuned on: the codes stay as they were rounded");
  result.codes_moved = write(writer, result.improved);
  return result;
}

}  // namespace

TuneResult tune(const TuneJob& job, CheckpointWriter& writer, Context& context) {
  return Tuner(job, context).run(writer);
}

std::uint64_t tune_peak_bytes(const ModelConfig& config, const std::vector<TensorPlan>& plan, std::int64_t length,
                              bool codes_move, int threads) {
  const auto workers = static_cast<std::uint64_t>(threads > 0 ? threads : omp_get_num_procs());
  const auto model = static_cast<std::uint64_t>(parameter_count(config)) * 4;
  std::uint64_t scales = 0, codes = 0, latent = 0;
  for (const TensorPlan& tensor : plan) {
    if (!tensor.codec) continue;
    const auto count = static_cast<std::uint64_t>(tensor.spec.shape[0] * tensor.spec.shape[1]);
    scales += static_cast<std::uint64_t>(tensor.spec.shape[0] * tensor.codec->groups(tensor.spec.shape[1])) * 4;
    codes += count;
    if (tensor.spec.role == TensorRole::kLinear) latent += count * 4;
  }
  const std::uint64_t graph = static_cast<std::uint64_t>(config.num_layers) * 2 * block_work_bytes(config, length);
  const std::uint64_t head = static_cast<std::uint64_t>(config.vocab_size * config.hidden_size) * 4;
  // Original, quantized, the sum of gradients and those of each thread's window, of the head in three pieces; the largest
  // matrix once more while its weights are made.
  return model * (3 + workers) + head * (2 + 2 * workers) + scales * 4 + codes + (codes_move ? 4 * latent : 0) + workers * graph;
}

}  // namespace pare
