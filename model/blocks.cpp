#include "model/blocks.h"

#include <omp.h>

#include <algorithm>
#include <exception>
#include <random>

#include "core/corpus.h"
#include "core/error.h"
#include "model/activations.h"
#include "model/decoder.h"
#include "model/fused.h"
#include "model/threads.h"

namespace pare {
namespace {

// Windows whose inputs are held at a time; a constant, so that sums do not depend on the machine.
constexpr std::int64_t kShardWindows = 8;

bool held_out(std::int64_t window) { return window % kHeldOutEvery == kHeldOutEvery - 1; }

torch::Tensor stage_input(DecoderBlock& block, BlockStage stage, const torch::Tensor& hidden, const RopeTables& rope) {
  switch (stage) {
    case BlockStage::kQkv:
      return block->attention_input(hidden);
    case BlockStage::kO:
      return block->attention_mix(block->attention_input(hidden), rope);
    case BlockStage::kGateUp:
      return block->mlp_input(hidden);
    case BlockStage::kDown:
      return block->mlp_mix(block->mlp_input(hidden));
  }
  throw std::logic_error("block stage");
}

torch::Tensor with_attention(DecoderBlock& block, const torch::Tensor& hidden, const RopeTables& rope) {
  return block->attention_output(hidden, stage_input(block, BlockStage::kO, hidden, rope));
}

// What the MLP's linears compute from: with parallel residuals the block's input still, and attention is added later.
torch::Tensor past_attention(DecoderBlock& block, const torch::Tensor& hidden, const RopeTables& rope) {
  return block->parallel_residual() ? hidden : with_attention(block, hidden, rope);
}

// `mix`: what down_proj reads.
torch::Tensor past_mlp(DecoderBlock& block, const torch::Tensor& hidden, const RopeTables& rope,
                       const torch::Tensor& mix) {
  return block->mlp_output(block->parallel_residual() ? with_attention(block, hidden, rope) : hidden, mix);
}

torch::Tensor past_mlp(DecoderBlock& block, const torch::Tensor& hidden, const RopeTables& rope) {
  return past_mlp(block, hidden, rope, stage_input(block, BlockStage::kDown, hidden, rope));
}

// Inputs that one call of the visitor works with.
struct Step {
  BlockStage stage;
  std::int64_t expert = -1;
};

constexpr BlockStage kAttention[] = {BlockStage::kQkv, BlockStage::kO},
                     kMlp[] = {BlockStage::kGateUp, BlockStage::kDown};

// Rows times the square roots of their weights.
void weigh(std::span<const float> weights, std::int64_t columns, float* rows) {
  for (std::size_t t = 0; t < weights.size(); ++t) {
    const float factor = std::sqrt(weights[t]);
    float* row = rows + static_cast<std::int64_t>(t) * columns;
    for (std::int64_t j = 0; j < columns; ++j) row[j] *= factor;
  }
}

// Rows that one window adds to a shard's inputs.
struct WindowRows {
  std::int64_t count = 0;
  bool first = false;  // the window's first token is among them, as row 0
};

class Walk {
 public:
  Walk(const Checkpoint& checkpoint, const CalibrationWindows& windows, const WalkOptions& options, Context& context)
      : checkpoint_(checkpoint),
        config_(checkpoint.config()),
        windows_(windows),
        options_(options),
        context_(context),
        device_(parse_device(options.device)),
        threads_(!device_.is_cpu()     ? 1
                 : options.threads > 0 ? options.threads
                                       : omp_get_num_procs()),
        sum_threads_(options.threads > 0 ? options.threads : omp_get_num_procs()),
        window_size_(windows.length * config_.hidden_size) {}

  void run(BlockVisitor& visitor);

 private:
  using Advance = torch::Tensor (*)(DecoderBlock&, const torch::Tensor&, const RopeTables&);

  void embed(BlockVisitor& visitor);
  void advance(DecoderBlock& block, Activations& stream, Advance step);
  void leave_attention(DecoderBlock& block, int layer, BlockVisitor& visitor);
  // Carries a stream past the experts, one of them resident at a time; work(expert) may change its weights first.
  template <class Work>
  void through_experts(DecoderBlock& block, Activations& stream, const Work& work);
  void visit(DecoderBlock& block, int layer, Step step, BlockVisitor& visitor);
  // Runs work(linears) for the linears of a step with their original weights, then the block computes with what it
  // left.
  template <class Work>
  void with_linears(DecoderBlock& block, int layer, Step step, const Work& work);
  InputStatistics statistics(DecoderBlock& block, int layer, Step step, std::int64_t columns);
  // The input of the original stream. Its weights stay as they are, so where this input was all that the next step
  // waited for, the window goes on at once and does not compute it again.
  torch::Tensor reference_input(BlockStage stage, std::int64_t window);
  void count_routes(DecoderBlock& block);
  torch::Tensor expert_input(DecoderBlock& block, Step step, const torch::Tensor& hidden, bool all_tokens,
                             WindowRows& rows);
  void cap_first_tokens(std::vector<float>& inputs, std::vector<float>* paired, std::span<const WindowRows> windows,
                        std::int64_t columns);
  void take_sample(std::int64_t first, std::span<const WindowRows> windows, const std::vector<float>& inputs,
                   InputStatistics& result) const;
  double drift();

  torch::Tensor hidden(Activations& stream, std::int64_t window) const {
    const std::vector<std::int64_t> shape = {1, windows_.length, config_.hidden_size};
    if (float* values = stream.in_memory(window)) return torch::from_blob(values, shape, torch::kFloat).to(device_);
    torch::Tensor values = torch::empty(shape, torch::kFloat);
    stream.read(window, values.data_ptr<float>());
    return values.to(device_);
  }
  static void store(const torch::Tensor& tensor, float* out) {
    const torch::Tensor values = tensor.to(torch::kCPU, torch::kFloat).contiguous();
    std::copy_n(values.data_ptr<float>(), values.numel(), out);
  }
  // Runs `work` for windows [first, last), each on one thread.
  template <class Work>
  void each_window(std::int64_t first, std::int64_t last, const Work& work) {
    throw_if_interrupted("calibration", "the same command continues with the block that was not finished");
    std::exception_ptr problem;
#pragma omp parallel for schedule(dynamic) num_threads(threads_)
    for (std::int64_t w = first; w < last; ++w) {
      try {
        const torch::NoGradGuard no_grad;
        work(w);
      } catch (...) {
#pragma omp critical
        problem = std::current_exception();
      }
    }
    if (problem) std::rethrow_exception(problem);
  }

  const Checkpoint& checkpoint_;
  const ModelConfig& config_;
  const CalibrationWindows& windows_;
  const WalkOptions& options_;
  Context& context_;
  torch::Device device_;
  int threads_, sum_threads_;
  std::int64_t window_size_;
  RopeTables rope_;
  Activations original_, compressed_;        // hidden states [windows][length * hidden]
  Activations expert_sums_;                  // what the experts so far add to one of them
  std::vector<std::int64_t> expert_tokens_;  // of the block: tokens that chose each expert
  DecoderBlock reference_{nullptr};          // the block with original weights, where both streams advance in step
};

void Walk::embed(BlockVisitor& visitor) {
  std::vector<float> positions;  // [length, hidden_size]
  if (config_.learned_positions) {
    require_positions(config_, windows_.length, "calibration windows");
    positions.resize(static_cast<std::size_t>(window_size_));
    checkpoint_.read_rows_f32("model.embed_positions.weight", 0, windows_.length, positions.data());
    checkpoint_.release("model.embed_positions.weight");
  }
  const auto look_up = [&](Activations& stream, bool compressed) {
    stream = Activations(windows_.count, window_size_, options_.spill);
    const auto scale = static_cast<float>(config_.embedding_scale);
    std::vector<float> window(static_cast<std::size_t>(window_size_));
    for (std::int64_t w = 0; w < windows_.count; ++w) {
      for (std::int64_t t = 0; t < windows_.length; ++t) {
        const std::int64_t id = windows_.ids[static_cast<std::size_t>(w * windows_.length + t)];
        const auto row = std::span(window).subspan(static_cast<std::size_t>(t * config_.hidden_size),
                                                   static_cast<std::size_t>(config_.hidden_size));
        checkpoint_.read_rows_f32("model.embed_tokens.weight", id, 1, row.data());
        if (compressed) visitor.embedding(id, row);
        for (float& x : row) x *= scale;
      }
      for (std::size_t i = 0; i < positions.size(); ++i) window[i] += positions[i];
      stream.write(w, window.data());
    }
  };
  if (options_.original_stream || options_.cross) look_up(original_, false);
  look_up(compressed_, true);
  checkpoint_.release("model.embed_tokens.weight");
}

void Walk::advance(DecoderBlock& block, Activations& stream, Advance step) {
  if (stream.empty()) return;
  for (std::int64_t first = 0; first < windows_.count; first += kShardWindows) {
    each_window(first, std::min(first + kShardWindows, windows_.count), [&](std::int64_t w) {
      const torch::Tensor next = step(block, hidden(stream, w), rope_).to(torch::kCPU, torch::kFloat).contiguous();
      stream.write(w, next.data_ptr<float>());
    });
  }
}

// Scales row 0 of every window, so that its square counts at most kFirstTokenEnergy times the mean of the others.
void Walk::cap_first_tokens(std::vector<float>& inputs, std::vector<float>* paired, std::span<const WindowRows> windows,
                            std::int64_t columns) {
  if (!windows_.prefixed) return;
  for (std::size_t i = 0; i < windows.size(); ++i) {
    const std::int64_t rows = windows[i].count, w = static_cast<std::int64_t>(i);
    if (!windows[i].first || rows < 2) continue;
    double first = 0, others = 0;
    for (std::int64_t t = 0; t < rows; ++t) {
      const float* x = inputs.data() + (w * windows_.length + t) * columns;
      double energy = 0;
      for (std::int64_t j = 0; j < columns; ++j) energy += static_cast<double>(x[j]) * static_cast<double>(x[j]);
      (t == 0 ? first : others) += energy;
    }
    const double limit = kFirstTokenEnergy * others / static_cast<double>(rows - 1);
    if (first <= limit) continue;
    const float factor = static_cast<float>(std::sqrt(limit / first));
    for (std::vector<float>* list : {&inputs, paired}) {
      if (!list) continue;
      float* x = list->data() + w * windows_.length * columns;
      for (std::int64_t j = 0; j < columns; ++j) x[j] *= factor;
    }
  }
}

void Walk::count_routes(DecoderBlock& block) {
  const std::int64_t experts = config_.experts.count;
  std::vector<std::int64_t> chosen(static_cast<std::size_t>(windows_.count * experts));
  each_window(0, windows_.count, [&](std::int64_t w) {
    const torch::Tensor counts = block->expert_shares(block->mlp_input(hidden(compressed_, w))).ne(0).sum(0).cpu();
    std::copy_n(counts.data_ptr<std::int64_t>(), experts, chosen.data() + w * experts);
  });
  expert_tokens_.assign(static_cast<std::size_t>(experts), 0);
  for (std::size_t i = 0; i < chosen.size(); ++i) expert_tokens_[i % expert_tokens_.size()] += chosen[i];
}

// [rows, columns], each row times its share.
torch::Tensor Walk::expert_input(DecoderBlock& block, Step step, const torch::Tensor& hidden, bool all_tokens,
                                 WindowRows& rows) {
  const torch::Tensor normed = block->mlp_input(hidden);
  torch::Tensor x = normed.view({-1, config_.hidden_size}), share;
  if (all_tokens) {  // as if chosen at random: by per_token / count of them, with a share of 1 / per_token
    const auto chance = 1.0 / static_cast<double>(config_.experts.per_token * config_.experts.count);
    share = torch::full({x.size(0), 1}, std::sqrt(chance), x.options());
    rows = {x.size(0), true};
  } else {
    share = block->expert_shares(normed).select(1, step.expert);
    const torch::Tensor chosen = share.nonzero().squeeze(1);
    rows = {chosen.numel(), share[0].item<float>() != 0};
    x = x.index_select(0, chosen);
    share = share.index_select(0, chosen).unsqueeze(1);
  }
  return (step.stage == BlockStage::kDown ? block->expert_mix(x, step.expert) : x) * share;
}

// Of windows from `first` on, whose rows lie in `inputs` one after the other.
void Walk::take_sample(std::int64_t first, std::span<const WindowRows> windows, const std::vector<float>& inputs,
                       InputStatistics& result) const {
  const std::int64_t held = windows_.count / kHeldOutEvery, columns = result.columns;
  const std::int64_t quota = std::max<std::int64_t>(1, options_.sample_tokens / std::max<std::int64_t>(1, held));
  result.peak.resize(static_cast<std::size_t>(columns), 0.0f);
  const float* rows = inputs.data();
  for (std::size_t w = 0; w < windows.size(); ++w) {
    const std::int64_t left = options_.sample_tokens - static_cast<std::int64_t>(result.sample.size()) / columns;
    const std::int64_t count = windows[w].count, take = std::min({quota, count, left});
    if (held_out(first + static_cast<std::int64_t>(w))) {
      for (std::int64_t k = 0; k < take; ++k) {
        const float* row = rows + (2 * k + 1) * count / (2 * take) * columns;
        result.sample.insert(result.sample.end(), row, row + columns);
      }
    } else {
      for (std::int64_t t = 0; t < count; ++t)
        for (std::int64_t j = 0; j < columns; ++j) {
          float& peak = result.peak[static_cast<std::size_t>(j)];
          peak = std::max(peak, std::abs(rows[t * columns + j]));
        }
    }
    rows += count * columns;
  }
}

torch::Tensor Walk::reference_input(BlockStage stage, std::int64_t window) {
  const torch::Tensor state = hidden(original_, window), input = stage_input(reference_, stage, state, rope_);
  torch::Tensor next;
  if (stage == BlockStage::kO && !reference_->parallel_residual()) next = reference_->attention_output(state, input);
  if (stage == BlockStage::kDown) next = past_mlp(reference_, state, rope_, input);
  if (next.defined()) {
    const torch::Tensor values = next.to(torch::kCPU, torch::kFloat).contiguous();
    original_.write(window, values.data_ptr<float>());
  }
  return input;
}

InputStatistics Walk::statistics(DecoderBlock& block, int layer, Step step, std::int64_t columns) {
  InputStatistics result;
  result.columns = columns;
  const std::int64_t all = windows_.count * windows_.length;
  result.tokens = all;
  if (step.expert >= 0) {
    result.expert = step.expert;
    result.tokens = expert_tokens_[static_cast<std::size_t>(step.expert)];
    result.all_tokens = result.tokens < options_.expert_tokens;
  }
  result.mean_square.assign(static_cast<std::size_t>(columns), 0.0);
  if (options_.hessian) result.hessian = SquareMatrix(columns, options_.widest_double);
  if (options_.cross) result.cross = SquareMatrix(columns, options_.widest_double);
  if (options_.held_out) {
    result.held_hessian = SquareMatrix(columns, 0);
    result.held_cross = SquareMatrix(columns, 0);
  }
  std::vector<float> inputs, paired;
  for (std::int64_t first = 0; first < windows_.count; first += kShardWindows) {
    const std::int64_t last = std::min(first + kShardWindows, windows_.count);
    inputs.resize(static_cast<std::size_t>((last - first) * windows_.length * columns));
    if (options_.cross) paired.resize(inputs.size());
    std::vector<WindowRows> added(static_cast<std::size_t>(last - first), {windows_.length, true});
    each_window(first, last, [&](std::int64_t w) {
      float* to = inputs.data() + (w - first) * windows_.length * columns;
      const torch::Tensor state = hidden(compressed_, w);
      WindowRows& own = added[static_cast<std::size_t>(w - first)];
      store(step.expert < 0 ? stage_input(block, step.stage, state, rope_)
                            : expert_input(block, step, state, result.all_tokens, own),
            to);
      if (options_.cross) store(reference_input(step.stage, w), paired.data() + (to - inputs.data()));
    });
    cap_first_tokens(inputs, options_.cross ? &paired : nullptr, added, columns);
    if (options_.token_weights) {
      const auto weights = options_.token_weights->of(layer, step.stage)
                               .subspan(static_cast<std::size_t>(first * windows_.length),
                                        static_cast<std::size_t>((last - first) * windows_.length));
      weigh(weights, columns, inputs.data());
      if (options_.cross) weigh(weights, columns, paired.data());
    }
    std::int64_t rows = 0;  // those of all windows one after the other
    for (std::size_t w = 0; w < added.size(); ++w) {
      const float* from = inputs.data() + static_cast<std::int64_t>(w) * windows_.length * columns;
      if (from != inputs.data() + rows * columns)
        std::copy_n(from, added[w].count * columns, inputs.data() + rows * columns);
      rows += added[w].count;
    }
    if (options_.hessian) {
      result.hessian.visit(
          [&](auto* sum) { add_gram(inputs.data(), inputs.data(), rows, columns, sum, sum_threads_); });
    } else {
      for (std::int64_t t = 0; t < rows; ++t) {
        const float* x = inputs.data() + t * columns;
        for (std::int64_t j = 0; j < columns; ++j) {
          result.mean_square[static_cast<std::size_t>(j)] += static_cast<double>(x[j]) * static_cast<double>(x[j]);
        }
      }
    }
    if (options_.cross) {
      result.cross.visit([&](auto* sum) { add_gram(paired.data(), inputs.data(), rows, columns, sum, sum_threads_); });
    }
    if (options_.sample_tokens > 0) take_sample(first, added, inputs, result);
    for (std::int64_t w = first; options_.held_out && w < last; ++w) {
      if (!held_out(w)) continue;
      const std::int64_t at = (w - first) * windows_.length * columns;
      const auto add = [&](const float* left, SquareMatrix& sum) {
        sum.visit([&](auto* values) {
          add_gram(left + at, inputs.data() + at, windows_.length, columns, values, sum_threads_);
        });
      };
      add(inputs.data(), result.held_hessian);
      add(paired.data(), result.held_cross);
    }
  }
  const double scale = 1.0 / static_cast<double>(all);
  for (double& value : result.mean_square) value *= scale;
  for (SquareMatrix* matrix : {&result.hessian, &result.cross, &result.held_hessian, &result.held_cross}) {
    if (matrix->empty()) continue;
    matrix->visit([&](auto* values) {
      using Value = std::remove_reference_t<decltype(*values)>;
      for (std::int64_t i = 0; i < columns * columns; ++i)
        values[i] = static_cast<Value>(static_cast<double>(values[i]) * scale);
    });
  }
  if (options_.held_out) result.held_hessian.visit([&](auto* values) { mirror_upper(values, columns); });
  if (options_.hessian) {
    result.hessian.visit([&](auto* values) { mirror_upper(values, columns); });
    for (std::int64_t j = 0; j < columns; ++j) {
      result.mean_square[static_cast<std::size_t>(j)] = result.hessian[static_cast<std::size_t>(j * columns + j)];
    }
  }
  return result;
}

template <class Work>
void Walk::with_linears(DecoderBlock& block, int layer, Step step, const Work& work) {
  const torch::NoGradGuard no_grad;
  std::vector<BlockLinear> linears;
  std::vector<std::vector<float>> originals;
  std::vector<torch::Tensor> weights;  // the block's own on the CPU
  for (const std::string& module : stage_modules(config_, step.stage, step.expert)) {
    const std::string name = "model.layers." + std::to_string(layer) + "." + module + ".weight";
    torch::Tensor weight = block->weight(module).detach().to(torch::kCPU).contiguous();
    originals.push_back(checkpoint_.read_f32(name));
    checkpoint_.release(name);
    linears.push_back({name,
                       module,
                       step.expert,
                       weight.size(0),
                       weight.size(1),
                       originals.back(),
                       {weight.data_ptr<float>(), static_cast<std::size_t>(weight.numel())}});
    weights.push_back(std::move(weight));
  }
  work(std::span(linears));
  for (std::size_t i = 0; i < linears.size(); ++i) {
    torch::Tensor there = block->weight(linears[i].module);
    if (there.data_ptr() != weights[i].data_ptr()) there.copy_(weights[i]);
  }
}

// The compressed stream to the point where the MLP or the router reads it.
void Walk::leave_attention(DecoderBlock& block, int layer, BlockVisitor& visitor) {
  advance(block, compressed_, past_attention);
  if (options_.cross && visitor.finished(layer)) advance(reference_, original_, past_attention);
  if (!config_.has_experts()) return;
  count_routes(block);
  visitor.routed(layer, expert_tokens_);
}

template <class Work>
void Walk::through_experts(DecoderBlock& block, Activations& stream, const Work& work) {
  if (stream.empty()) return;
  if (expert_sums_.empty()) expert_sums_ = Activations(windows_.count, window_size_, options_.spill);
  for (std::int64_t expert = 0; expert < config_.experts.count; ++expert) {
    load_expert(checkpoint_, block, expert, device_);
    work(expert);
    for (std::int64_t first = 0; first < windows_.count; first += kShardWindows) {
      each_window(first, std::min(first + kShardWindows, windows_.count), [&](std::int64_t w) {
        const torch::Tensor state = hidden(stream, w), normed = block->mlp_input(state);
        const torch::Tensor before =
            expert == 0 ? torch::zeros_like(state) : hidden(expert_sums_, w);
        const torch::Tensor sum = block->add_expert(before.view({-1, config_.hidden_size}), normed,
                                                    block->expert_shares(normed), expert);
        const bool last = expert + 1 == config_.experts.count;
        const torch::Tensor next = last ? residual_add(state, sum.view(state.sizes())) : sum;
        const torch::Tensor values = next.to(torch::kCPU, torch::kFloat).contiguous();
        (last ? stream : expert_sums_).write(w, values.data_ptr<float>());
      });
    }
    drop_expert(block, config_, expert);
  }
}

void Walk::visit(DecoderBlock& block, int layer, Step step, BlockVisitor& visitor) {
  const std::string module = stage_modules(config_, step.stage, step.expert).front();
  if (context_.progress) context_.progress->update(layer, module + ": inputs");
  const InputStatistics input = statistics(block, layer, step, block->weight(module).size(1));
  if (context_.progress) context_.progress->update(layer, module + ": weights");
  throw_if_interrupted("calibration", "the same command continues with the block that was not finished");
  with_linears(block, layer, step,
               [&](std::span<BlockLinear> linears) { visitor.compress(layer, step.stage, linears, input); });
}

double Walk::drift() {
  if (original_.empty()) return 0;
  double difference = 0, energy = 0;
  std::vector<float> original(static_cast<std::size_t>(window_size_)), compressed(original.size());
  for (std::int64_t w = 0; w < windows_.count; ++w) {
    original_.read(w, original.data());
    compressed_.read(w, compressed.data());
    double window_difference = 0, window_energy = 0;
    for (std::size_t i = 0; i < original.size(); ++i) {
      const double value = static_cast<double>(original[i]), other = static_cast<double>(compressed[i]);
      window_difference += (other - value) * (other - value);
      window_energy += value * value;
    }
    difference += window_difference;
    energy += window_energy;
  }
  return energy > 0 ? difference / energy : 0;
}

void Walk::run(BlockVisitor& visitor) {
  const SingleThreadedTorch single;  // parallelism is over windows
  rope_ = rope_tables(config_, windows_.length, device_);
  if (!options_.spill.empty() && context_.progress) {
    const int streams = (options_.original_stream ? 2 : 1) + (config_.has_experts() ? 1 : 0);
    const double bytes = static_cast<double>(windows_.count * window_size_) * 4 * streams;
    char text[96];
    std::snprintf(text, sizeof text, "Activations (%.2f GB) go to an HDF5 file in ", bytes / 1e9);
    context_.progress->note(text + options_.spill.string());
  }
  embed(visitor);
  if (context_.progress) context_.progress->begin("blocks", config_.num_layers);
  for (int layer = 0; layer < config_.num_layers; ++layer) {
    DecoderBlock block = load_block(checkpoint_, layer, device_, false);
    if (options_.cross) {
      reference_ = load_block(checkpoint_, layer, device_);
    } else {
      advance(block, original_, past_attention);
      if (config_.has_experts()) through_experts(block, original_, [](std::int64_t) {});
      else advance(block, original_, past_mlp);
    }
    visitor.begin_block(layer);
    const bool finished = visitor.finished(layer);
    if (finished && context_.progress) context_.progress->update(layer, "replayed");
    const auto step = [&](Step step) {
      if (!finished) return visit(block, layer, step, visitor);
      with_linears(block, layer, step, [&](std::span<BlockLinear> linears) { visitor.restore(layer, linears); });
    };
    for (const BlockStage stage : kAttention) step({stage});
    leave_attention(block, layer, visitor);
    if (config_.has_experts()) {
      through_experts(block, compressed_, [&](std::int64_t expert) {
        for (const BlockStage stage : kMlp) step({stage, expert});
        if (!finished) visitor.end_expert(layer, expert);
      });
    } else {
      for (const BlockStage stage : kMlp) step({stage});
      advance(block, compressed_, past_mlp);
    }
    if (options_.cross && finished) advance(reference_, original_, past_mlp);
    visitor.end_block(layer, drift());
    if (context_.progress) context_.progress->update(layer + 1);
  }
  if (context_.progress) context_.progress->end();
}

}  // namespace

std::vector<std::string> stage_modules(const ModelConfig& config, BlockStage stage, std::int64_t expert) {
  const std::string prefix = config.experts.module + ".experts." + std::to_string(expert) + ".";
  switch (stage) {
    case BlockStage::kQkv:
      if (config.fused_qkv) return {"self_attn.qkv_proj"};
      return {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"};
    case BlockStage::kO:
      return {"self_attn.o_proj"};
    case BlockStage::kGateUp:
      if (config.has_experts()) return {prefix + config.experts.gate, prefix + config.experts.up};
      if (config.fused_gate_up) return {"mlp.gate_up_proj"};
      if (!config.gated_mlp) return {"mlp.up_proj"};
      return {"mlp.gate_proj", "mlp.up_proj"};
    case BlockStage::kDown:
      if (config.has_experts()) return {prefix + config.experts.down};
      return {"mlp.down_proj"};
  }
  throw std::logic_error("block stage");
}

std::string expert_summary(std::span<const std::int64_t> tokens, std::int64_t least) {
  std::vector<std::int64_t> sorted(tokens.begin(), tokens.end());
  std::sort(sorted.begin(), sorted.end());
  const auto few = std::lower_bound(sorted.begin(), sorted.end(), least) - sorted.begin();
  return "tokens of its " + std::to_string(sorted.size()) + " experts: " + std::to_string(sorted.front()) + " to " +
         std::to_string(sorted.back()) + ", median " + std::to_string(sorted[sorted.size() / 2]) + "; " +
         std::to_string(few) + " of them calibrated on all tokens";
}

std::string CalibrationWindows::hash() const {
  Hasher hasher;
  hasher.update(std::to_string(count) + "x" + std::to_string(length) + (prefixed ? "p" : "") + ":");
  hasher.update(std::as_bytes(std::span(ids)));
  return hasher.hex();
}

CalibrationWindows sample_windows(const Tokenizer& tokenizer, const std::vector<fs::path>& texts, std::int64_t count,
                                  std::int64_t length, std::uint64_t seed, const std::optional<std::string>& split,
                                  TextPart part) {
  const std::vector<std::int32_t> prefix = tokenizer.prefix_ids();
  std::vector<std::int32_t> joined;
  for (const Document& document : read_documents(texts, split)) {
    const std::vector<std::int32_t> ids = encode_document(tokenizer, document);
    joined.insert(joined.end(), ids.begin(), ids.end());
  }
  if (part.begin > 0 || part.end < 1) {
    const auto at = [&](double share) {
      return joined.begin() + static_cast<std::ptrdiff_t>(share * static_cast<double>(joined.size()));
    };
    joined = std::vector<std::int32_t>(at(part.begin), at(part.end));
  }
  const std::int64_t body = length - static_cast<std::int64_t>(prefix.size());
  if (body < 1 || static_cast<std::int64_t>(joined.size()) < body) {
    throw input_error(texts.empty() ? "calibration text" : texts.front().string(),
                      "at least " + std::to_string(length) + " tokens for one window",
                      std::to_string(joined.size()) + " tokens", "more text, or a smaller --context");
  }
  CalibrationWindows windows;
  windows.count = count;
  windows.length = length;
  windows.prefixed = !prefix.empty();
  windows.ids.reserve(static_cast<std::size_t>(count * length));
  std::mt19937_64 random(seed);
  const std::uint64_t starts = joined.size() - static_cast<std::uint64_t>(body) + 1;
  for (std::int64_t w = 0; w < count; ++w) {
    const auto start = static_cast<std::ptrdiff_t>(random() % starts);
    windows.ids.insert(windows.ids.end(), prefix.begin(), prefix.end());
    windows.ids.insert(windows.ids.end(), joined.begin() + start, joined.begin() + start + body);
  }
  return windows;
}

CalibrationWindows random_windows(std::int64_t vocab_size, std::int64_t count, std::int64_t length,
                                  std::uint64_t seed) {
  CalibrationWindows windows;
  windows.count = count;
  windows.length = length;
  std::mt19937_64 random(seed);
  windows.ids.resize(static_cast<std::size_t>(count * length));
  for (std::int32_t& id : windows.ids) {
    id = static_cast<std::int32_t>(random() % static_cast<std::uint64_t>(vocab_size));
  }
  return windows;
}

void require_ids(const CalibrationWindows& windows, std::int64_t vocab_size) {
  for (std::int32_t id : windows.ids) {
    if (id < 0 || id >= vocab_size) {
      throw input_error("calibration tokens", "ids below " + std::to_string(vocab_size), std::to_string(id),
                        "the tokenizer does not belong to this model");
    }
  }
}

void walk_blocks(const Checkpoint& checkpoint, const CalibrationWindows& windows, const WalkOptions& options,
                 Context& context, BlockVisitor& visitor) {
  require_ids(windows, checkpoint.config().vocab_size);
  if (options.cross && checkpoint.config().has_experts())
    throw std::logic_error("cross statistics are not defined with experts: the two streams choose differently");
  if (options.token_weights && checkpoint.config().has_experts())
    throw std::logic_error("token weights are not defined with experts");
  Walk(checkpoint, windows, options, context).run(visitor);
}

void require_device(const std::string& name) {
  parse_device(name);
}

void MemoryPlan::add_note(std::vector<std::string>& notes) const {
  if (spill)
    notes.push_back(
        "activations of the calibration windows go to an HDF5 file: with them in memory the peak would be " +
        bytes_in_words(unspilled));
}

MemoryPlan plan_memory(const Options& options, const std::function<std::uint64_t(const fs::path& spill)>& peak,
                       const std::string& hint) {
  const std::uint64_t unspilled = peak({});
  MemoryPlan plan{unspilled, unspilled, false};
  if (!options.has("max-ram")) return plan;
  const std::uint64_t limit = parse_bytes(options.get<std::string>("max-ram"), "--max-ram");
  if (plan.peak <= limit) return plan;
  if (const std::uint64_t spilled = peak("file"); spilled < plan.peak) {
    plan.peak = spilled;
    plan.spill = true;
  }
  if (plan.peak > limit)
    throw Error(ExitCode::kResources, "--max-ram " + options.get<std::string>("max-ram"),
                bytes_in_words(plan.peak) + (plan.spill ? " with the activations in a file" : ""),
                bytes_in_words(limit), hint);
  return plan;
}

std::uint64_t block_work_bytes(const ModelConfig& config, std::int64_t rows) {
  const auto queries = config.num_heads * config.head_dim, keys = config.num_kv_heads * config.head_dim;
  // Hidden state, its normed form and the result; gate and up apart, joined and multiplied, or the same of q, k and v.
  return 4 * static_cast<std::uint64_t>(rows) *
         static_cast<std::uint64_t>(3 * config.hidden_size +
                                    std::max(5 * config.intermediate_size, 3 * queries + 4 * keys));
}

std::uint64_t walk_peak_bytes(const ModelConfig& config, std::int64_t windows, std::int64_t length,
                              const WalkOptions& options) {
  const auto hidden = static_cast<std::uint64_t>(config.hidden_size);
  const auto wide = static_cast<std::uint64_t>(
      std::max({config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim}));
  const auto tokens = static_cast<std::uint64_t>(windows * length);
  const std::uint64_t streams = (options.original_stream || options.cross ? 2 : 1) + (config.has_experts() ? 1 : 0);
  const auto attention = static_cast<std::uint64_t>(config.num_heads * config.head_dim) * 2 +
                         static_cast<std::uint64_t>(config.num_kv_heads * config.head_dim) * 2;
  const auto inner = static_cast<std::uint64_t>(config.intermediate_size);
  const std::uint64_t block = hidden * (attention + 3 * inner) * 4;  // one expert of several
  const std::uint64_t originals = hidden * std::max(attention, 2 * inner) * 4;
  const std::uint64_t inputs = static_cast<std::uint64_t>(std::min(windows, kShardWindows) * length) * wide * 4;
  const std::uint64_t square = wide * wide * (static_cast<std::int64_t>(wide) > options.widest_double ? 4 : 8);
  const auto threads = static_cast<std::uint64_t>(
      std::min<std::int64_t>({options.threads > 0 ? options.threads : omp_get_num_procs(), kShardWindows, windows}));
  const std::uint64_t computing = threads * block_work_bytes(config, length);
  const std::uint64_t walking = block * (options.cross ? 2 : 1) +
                                std::max(originals, 2 * inputs * (options.cross ? 2 : 1) + computing) +
                                (options.hessian ? square * (options.cross ? 2 : 1) : 0) +
                                (options.held_out ? 2 * wide * wide * 4 : 0) +
                                static_cast<std::uint64_t>(options.sample_tokens) * wide * 4;
  return (options.spill.empty() ? streams * tokens * hidden * 4 : 0) + walking;
}

}  // namespace pare
