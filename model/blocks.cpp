#include "model/blocks.h"

#include <malloc.h>
#include <omp.h>

#include <algorithm>
#include <exception>

#include "core/error.h"
#include "model/activations.h"
#include "model/decoder.h"
#include "model/fused.h"
#include "model/ranks.h"
#include "model/split_products.h"
#include "model/threads.h"

namespace pare {
namespace {

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

// The hidden state past the linears that read this stage's input, kO or kDown. With parallel residuals the MLP computes
// from the block's input still, and attention is added after it. `input`: that input where it is known.
torch::Tensor past(DecoderBlock& block, BlockStage stage, const torch::Tensor& hidden, const RopeTables& rope,
                   torch::Tensor input) {
  const bool parallel = block->parallel_residual();
  if (stage == BlockStage::kO && parallel) return hidden;
  if (!input.defined()) input = stage_input(block, stage, hidden, rope);
  if (stage == BlockStage::kO) return block->attention_output(hidden, input);
  return block->mlp_output(
      parallel ? block->attention_output(hidden, stage_input(block, BlockStage::kO, hidden, rope)) : hidden, input);
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

// What the statistics see of kShardWindows windows: rows one window after the other.
struct Shard {
  std::vector<WindowRows> windows;
  std::vector<float> inputs, differences;  // [rows, columns]; the latter with cross statistics only
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
        window_size_(windows.length * config_.hidden_size),
        stride_(options.cross ? paired_stride(config_, windows.count, windows.length, options.paired_tokens) : 1),
        ranks_(ranks_of(context)) {
    for (std::int64_t w = 0; w < windows.count; ++w) {
      const bool own = owner(w) == ranks_.rank();
      place_.push_back(own ? static_cast<std::int64_t>(own_.size()) : -1);
      pair_place_.push_back(own && paired(w) ? own_pairs_++ : -1);
      if (own) own_.push_back(w);
    }
  }

  void run(BlockVisitor& visitor);

 private:
  static std::int64_t at(const std::vector<std::int64_t>& places, std::int64_t window) {
    return places[static_cast<std::size_t>(window)];
  }
  void embed(BlockVisitor& visitor);
  // Past the linears that read `stage`'s input: kO or kDown.
  void advance(DecoderBlock& block, Activations& stream, BlockStage stage);
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
  // Adds what the windows from `first` on, whose inputs and differences lie in the lists, are to the statistics.
  void add_grams(std::int64_t first, std::span<const WindowRows> windows, const std::vector<float>& inputs,
                 const std::vector<float>& differences, InputStatistics& result);
  bool paired(std::int64_t window) const { return window % stride_ == 0; }
  int owner(std::int64_t window) const { return static_cast<int>(window / kShardWindows % ranks_.size()); }
  std::int64_t pairs() const { return (windows_.count + stride_ - 1) / stride_; }
  bool held_out(std::int64_t window) const {
    return paired(window) && window / stride_ % kHeldOutEvery == kHeldOutEvery - 1;
  }
  bool has_original() const { return options_.original_stream || options_.cross; }
  // This rank's windows in a stream, where they have places of their own.
  std::int64_t windows_of(const Activations& stream) const {
    return &stream == &original_ ? own_pairs_ : static_cast<std::int64_t>(own_.size());
  }
  // What o_proj or down_proj of the compressed stream reads, as statistics() computed it; undefined where it is not kept.
  torch::Tensor kept(BlockStage stage, std::int64_t window) const;
  void keep_inputs(Step step, std::int64_t columns);
  void count_routes(DecoderBlock& block);
  torch::Tensor expert_input(DecoderBlock& block, Step step, const torch::Tensor& hidden, bool all_tokens,
                             WindowRows& rows);
  void cap_first_tokens(std::vector<float>& inputs, std::vector<float>* paired, std::span<const WindowRows> windows,
                        std::int64_t columns);
  void take_sample(std::int64_t first, std::span<const WindowRows> windows, const std::vector<float>& inputs,
                   InputStatistics& result) const;
  double drift();
  // Of one shard of this rank's: what statistics() adds up.
  void shard_inputs(DecoderBlock& block, int layer, Step step, std::int64_t first, bool all_tokens,
                    std::int64_t columns, Shard& shard);
  void share(Shard& shard, std::int64_t windows, std::int64_t columns, int from);  // with all ranks
  void share(DecoderBlock& block) const;
  void share(DecoderBlock& block, Step step) const;  // its linears
  void collect(SquareMatrix& sum, std::int64_t columns) const;  // the panels of all ranks on rank 0

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
        const SplitProductsScope split;
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
  std::int64_t stride_;  // every so many-th window is in the original stream as well
  RopeTables rope_;
  Activations original_, compressed_;        // hidden states [windows][length * hidden]
  std::vector<float> kept_;                  // inputs of one stage of the first windows, [windows][length * columns]
  std::int64_t kept_columns_ = 0, kept_windows_ = 0;
  BlockStage kept_stage_ = BlockStage::kQkv;
  Activations expert_sums_;                  // what the experts so far add to one of them
  std::vector<std::int64_t> expert_tokens_;  // of the block: tokens that chose each expert
  DecoderBlock reference_{nullptr};          // the block with original weights, where both streams advance in step
  Ranks& ranks_;
  std::vector<std::int64_t> own_;                // this rank's windows: whole shards, in turns
  std::vector<std::int64_t> place_, pair_place_;  // of each window in the two streams of this rank, -1: another's
  std::int64_t own_pairs_ = 0;
  bool finished_ = false;                        // the block was compressed by an earlier run
};

void Walk::embed(BlockVisitor& visitor) {
  std::vector<float> positions;  // [length, hidden_size]
  if (config_.learned_positions && ranks_.first()) {
    require_positions(config_, windows_.length, "calibration windows");
    positions.resize(static_cast<std::size_t>(window_size_));
    checkpoint_.read_rows_f32("model.embed_positions.weight", 0, windows_.length, positions.data());
    checkpoint_.release("model.embed_positions.weight");
  }
  const auto look_up = [&](Activations& stream, bool compressed) {
    const std::int64_t step = compressed ? 1 : stride_;
    stream = Activations(windows_of(stream), window_size_, options_.spill);
    const auto scale = static_cast<float>(config_.embedding_scale);
    std::vector<float> window(static_cast<std::size_t>(window_size_));
    for (std::int64_t w = 0; w < windows_.count; w += step) {
      for (std::int64_t t = 0; t < windows_.length && ranks_.first(); ++t) {
        const std::int64_t id = windows_.ids[static_cast<std::size_t>(w * windows_.length + t)];
        const auto row = std::span(window).subspan(static_cast<std::size_t>(t * config_.hidden_size),
                                                   static_cast<std::size_t>(config_.hidden_size));
        checkpoint_.read_rows_f32("model.embed_tokens.weight", id, 1, row.data());
        if (compressed) visitor.embedding(id, row);
        for (float& x : row) x *= scale;
      }
      for (std::size_t i = 0; i < positions.size(); ++i) window[i] += positions[i];
      ranks_.move(torch::from_blob(window.data(), {window_size_}, torch::kFloat), 0, owner(w));
      if (owner(w) == ranks_.rank()) stream.write(compressed ? at(place_, w) : at(pair_place_, w), window.data());
    }
  };
  if (has_original()) look_up(original_, false);
  look_up(compressed_, true);
  checkpoint_.release("model.embed_tokens.weight");
}

void Walk::advance(DecoderBlock& block, Activations& stream, BlockStage stage) {
  if (stream.empty()) return;
  const std::int64_t count = windows_of(stream);
  for (std::int64_t first = 0; first < count; first += kShardWindows) {
    each_window(first, std::min(first + kShardWindows, count), [&](std::int64_t w) {
      torch::Tensor input;
      if (&stream == &compressed_) input = kept(stage, w);
      const torch::Tensor next =
          past(block, stage, hidden(stream, w), rope_, input).to(torch::kCPU, torch::kFloat).contiguous();
      stream.write(w, next.data_ptr<float>());
    });
  }
}

torch::Tensor Walk::kept(BlockStage stage, std::int64_t window) const {
  if (stage != kept_stage_ || window >= kept_windows_) return {};
  float* values = const_cast<float*>(kept_.data()) + window * windows_.length * kept_columns_;
  return torch::from_blob(values, {1, windows_.length, kept_columns_}, torch::kFloat).to(device_);
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
  const std::int64_t count = windows_of(compressed_);
  std::vector<std::int64_t> chosen(static_cast<std::size_t>(count * experts));
  each_window(0, count, [&](std::int64_t w) {
    const torch::Tensor counts = block->expert_shares(block->mlp_input(hidden(compressed_, w))).ne(0).sum(0).cpu();
    std::copy_n(counts.data_ptr<std::int64_t>(), experts, chosen.data() + w * experts);
  });
  expert_tokens_.assign(static_cast<std::size_t>(experts), 0);
  for (std::size_t i = 0; i < chosen.size(); ++i) expert_tokens_[i % expert_tokens_.size()] += chosen[i];
  ranks_.sum(torch::from_blob(expert_tokens_.data(), {experts}, torch::kLong));
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
  const std::int64_t held = pairs() / kHeldOutEvery, columns = result.columns;
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
  const torch::Tensor state = hidden(original_, at(pair_place_, window));
  const torch::Tensor input = stage_input(reference_, stage, state, rope_);
  if (stage == BlockStage::kO || stage == BlockStage::kDown) {
    const torch::Tensor next =
        past(reference_, stage, state, rope_, input).to(torch::kCPU, torch::kFloat).contiguous();
    original_.write(at(pair_place_, window), next.data_ptr<float>());
  }
  return input;
}

void Walk::add_grams(std::int64_t first, std::span<const WindowRows> windows, const std::vector<float>& inputs,
                     const std::vector<float>& differences, InputStatistics& result) {
  const SplitProductsScope split;
  const auto add = [&](const float* left, const float* right, std::int64_t rows, SquareMatrix& sum) {
    sum.visit([&](auto* values) {
      add_gram(left, right, rows, result.columns, values, sum_threads_, ranks_.rank(), ranks_.size());
    });
  };
  std::int64_t row = 0;
  for (std::size_t begin = 0, end = 0; begin < windows.size(); begin = end) {  // windows of one kind together
    const std::int64_t w = first + static_cast<std::int64_t>(begin);
    const bool held = options_.held_out && held_out(w), pair = options_.cross && paired(w);
    std::int64_t rows = 0;
    for (; end < windows.size(); ++end) {
      const std::int64_t other = first + static_cast<std::int64_t>(end);
      if ((options_.held_out && held_out(other)) != held || (options_.cross && paired(other)) != pair) break;
      rows += windows[end].count;
    }
    const float* own = inputs.data() + row * result.columns;
    add(own, own, rows, held ? result.held_hessian : result.hessian);
    if (pair)
      add(differences.data() + row * result.columns, own, rows, held ? result.held_cross : result.cross);
    row += rows;
  }
}

void Walk::shard_inputs(DecoderBlock& block, int layer, Step step, std::int64_t first, bool all_tokens,
                        std::int64_t columns, Shard& shard) {
  const std::int64_t last = std::min(first + kShardWindows, windows_.count), size = windows_.length * columns;
  std::vector<float>& inputs = shard.inputs;
  inputs.resize(static_cast<std::size_t>((last - first) * size));
  if (options_.cross) shard.differences.resize(inputs.size());
  shard.windows.assign(static_cast<std::size_t>(last - first), {windows_.length, true});
  each_window(first, last, [&](std::int64_t w) {
    float* to = inputs.data() + (w - first) * size;
    const torch::Tensor state = hidden(compressed_, at(place_, w));
    WindowRows& own = shard.windows[static_cast<std::size_t>(w - first)];
    store(step.expert < 0 ? stage_input(block, step.stage, state, rope_)
                          : expert_input(block, step, state, all_tokens, own),
          to);
    if (at(place_, w) < kept_windows_) std::copy_n(to, size, kept_.data() + at(place_, w) * size);
    if (!options_.cross || !paired(w)) return;
    float* difference = shard.differences.data() + (w - first) * size;
    store(reference_input(step.stage, w), difference);
    for (std::int64_t i = 0; i < size; ++i) difference[i] -= to[i];
  });
  cap_first_tokens(inputs, options_.cross ? &shard.differences : nullptr, shard.windows, columns);
  if (options_.token_weights) {
    const auto weights = options_.token_weights->of(layer, step.stage)
                             .subspan(static_cast<std::size_t>(first * windows_.length),
                                      static_cast<std::size_t>((last - first) * windows_.length));
    weigh(weights, columns, inputs.data());
    if (options_.cross) weigh(weights, columns, shard.differences.data());
  }
  std::int64_t rows = 0;  // those of all windows one after the other
  for (std::size_t w = 0; w < shard.windows.size(); ++w) {
    const float* from = inputs.data() + static_cast<std::int64_t>(w) * size;
    if (from != inputs.data() + rows * columns)
      std::copy_n(from, shard.windows[w].count * columns, inputs.data() + rows * columns);
    rows += shard.windows[w].count;
  }
}

void Walk::share(Shard& shard, std::int64_t windows, std::int64_t columns, int from) {
  if (ranks_.alone()) return;
  torch::Tensor counts = torch::zeros({windows, 2}, torch::kLong);
  std::int64_t* values = counts.data_ptr<std::int64_t>();
  shard.windows.resize(static_cast<std::size_t>(windows));
  for (std::int64_t w = 0; w < windows && from == ranks_.rank(); ++w) {
    values[2 * w] = shard.windows[static_cast<std::size_t>(w)].count;
    values[2 * w + 1] = shard.windows[static_cast<std::size_t>(w)].first ? 1 : 0;
  }
  ranks_.broadcast(counts, from);
  std::int64_t rows = 0;
  for (std::int64_t w = 0; w < windows; rows += values[2 * w++])
    shard.windows[static_cast<std::size_t>(w)] = {values[2 * w], values[2 * w + 1] != 0};
  const auto send = [&](std::vector<float>& list) {
    if (list.size() < static_cast<std::size_t>(rows * columns)) list.resize(static_cast<std::size_t>(rows * columns));
    ranks_.broadcast(torch::from_blob(list.data(), {rows * columns}, torch::kFloat), from);
  };
  send(shard.inputs);
  if (options_.cross) send(shard.differences);
}

void Walk::share(DecoderBlock& block) const {
  for (const torch::Tensor& parameter : block->parameters()) ranks_.broadcast(parameter.detach());
}

void Walk::share(DecoderBlock& block, Step step) const {
  if (ranks_.alone()) return;
  for (const std::string& module : stage_modules(config_, step.stage, step.expert))
    ranks_.broadcast(block->weight(module).detach());
}

void Walk::collect(SquareMatrix& sum, std::int64_t columns) const {
  sum.visit([&](auto* values) {
    const auto type = sizeof *values == 4 ? torch::kFloat : torch::kDouble;
    for (std::int64_t row = 0; row < columns && !ranks_.alone(); row += kGramPanel) {
      const std::int64_t count = std::min(kGramPanel, columns - row) * columns;
      ranks_.move(torch::from_blob(values + row * columns, {count}, type),
                  static_cast<int>(row / kGramPanel % ranks_.size()), 0);
    }
  });
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
  keep_inputs(step, columns);
  Shard mine, others;
  const std::int64_t round = kShardWindows * ranks_.size();  // a shard of each rank, taken in order
  for (std::int64_t begin = 0; begin < windows_.count; begin += round) {
    if (const std::int64_t first = begin + kShardWindows * ranks_.rank(); first < windows_.count)
      shard_inputs(block, layer, step, first, result.all_tokens, columns, mine);
    for (int r = 0; r < ranks_.size() && begin + kShardWindows * r < windows_.count; ++r) {
      const std::int64_t first = begin + kShardWindows * r;
      Shard& shard = r == ranks_.rank() ? mine : others;
      share(shard, std::min(kShardWindows, windows_.count - first), columns, r);
      if (options_.hessian) {
        add_grams(first, shard.windows, shard.inputs, shard.differences, result);
      } else {
        std::int64_t rows = 0;
        for (const WindowRows& window : shard.windows) rows += window.count;
        for (std::int64_t t = 0; t < rows; ++t) {
          const float* x = shard.inputs.data() + t * columns;
          for (std::int64_t j = 0; j < columns; ++j) {
            result.mean_square[static_cast<std::size_t>(j)] += static_cast<double>(x[j]) * static_cast<double>(x[j]);
          }
        }
      }
      if (options_.sample_tokens > 0) take_sample(first, shard.windows, shard.inputs, result);
    }
  }
  for (SquareMatrix* sum : {&result.hessian, &result.cross, &result.held_hessian, &result.held_cross})
    if (!sum->empty()) collect(*sum, columns);
  if (!ranks_.first()) return result;  // not looked at
  std::int64_t held = 0;
  for (std::int64_t w = 0; w < windows_.count; ++w) held += options_.held_out && held_out(w) ? 1 : 0;
  result.paired_tokens = options_.cross ? pairs() * windows_.length : 0;
  result.held_tokens = held * windows_.length;
  const auto add = [&](const SquareMatrix& part, SquareMatrix& sum) {
    sum.visit([&](auto* values) {
      using Value = std::remove_reference_t<decltype(*values)>;
      for (std::size_t i = 0; i < static_cast<std::size_t>(columns * columns); ++i)
        values[i] = static_cast<Value>(static_cast<double>(values[i]) + part[i]);
    });
  };
  const auto divide = [&](SquareMatrix& sum, std::int64_t tokens) {
    const double scale = tokens > 0 ? 1.0 / static_cast<double>(tokens) : 0.0;
    sum.visit([&](auto* values) {
      using Value = std::remove_reference_t<decltype(*values)>;
      for (std::int64_t i = 0; i < columns * columns; ++i)
        values[i] = static_cast<Value>(static_cast<double>(values[i]) * scale);
    });
  };
  if (options_.held_out) {
    add(result.held_hessian, result.hessian);
    add(result.held_cross, result.cross);
    divide(result.held_hessian, result.held_tokens);
    divide(result.held_cross, result.held_tokens);
    result.held_hessian.visit([&](auto* values) { mirror_upper(values, columns); });
  }
  if (options_.cross) divide(result.cross, result.paired_tokens);
  if (options_.hessian) {
    divide(result.hessian, all);
    result.hessian.visit([&](auto* values) { mirror_upper(values, columns); });
    for (std::int64_t j = 0; j < columns; ++j) {
      result.mean_square[static_cast<std::size_t>(j)] = result.hessian[static_cast<std::size_t>(j * columns + j)];
    }
  } else {
    for (double& value : result.mean_square) value /= static_cast<double>(all);
  }
  return result;
}

// The inputs that the compressed stream goes on from once the weights that read them are chosen, of as many windows as
// fit into the size of its hidden states.
void Walk::keep_inputs(Step step, std::int64_t columns) {
  kept_windows_ = 0;
  const bool serves = step.stage == BlockStage::kDown ||
                      (step.stage == BlockStage::kO && !config_.parallel_residual);
  if (!serves || config_.has_experts() || !options_.spill.empty()) return;
  kept_stage_ = step.stage;
  kept_columns_ = columns;
  const std::int64_t own = windows_of(compressed_);
  kept_windows_ = std::min(own, own * config_.hidden_size / columns);
  kept_.resize(static_cast<std::size_t>(own * window_size_));
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
  advance(block, compressed_, BlockStage::kO);
  if (options_.cross && finished_) advance(reference_, original_, BlockStage::kO);
  if (!config_.has_experts()) return;
  count_routes(block);
  visitor.routed(layer, expert_tokens_);
}

template <class Work>
void Walk::through_experts(DecoderBlock& block, Activations& stream, const Work& work) {
  if (&stream == &original_ && !has_original()) return;
  const std::int64_t count = windows_of(stream);
  if (expert_sums_.empty()) expert_sums_ = Activations(count, window_size_, options_.spill);
  for (std::int64_t expert = 0; expert < config_.experts.count; ++expert) {
    load_expert(checkpoint_, block, expert, device_);
    for (const BlockStage stage : kMlp) share(block, {stage, expert});
    work(expert);
    for (std::int64_t first = 0; first < count; first += kShardWindows) {
      each_window(first, std::min(first + kShardWindows, count), [&](std::int64_t w) {
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
#if defined(__GLIBC__)
  malloc_trim(0);  // the shards: choosing weights needs other pieces (see prepare_threads)
#endif
  if (context_.progress) context_.progress->update(layer, module + ": weights");
  throw_if_interrupted("calibration", "the same command continues with the block that was not finished");
  if (ranks_.first())
    with_linears(block, layer, step,
                 [&](std::span<BlockLinear> linears) { visitor.compress(layer, step.stage, linears, input); });
  share(block, step);
}

double Walk::drift() {
  if (!has_original()) return 0;
  torch::Tensor sums = torch::zeros({windows_.count, 2}, torch::kDouble);  // difference and energy of each window
  double* of = sums.data_ptr<double>();
  std::vector<float> original(static_cast<std::size_t>(window_size_)), compressed(original.size());
  for (const std::int64_t w : own_) {
    if (!paired(w)) continue;
    original_.read(at(pair_place_, w), original.data());
    compressed_.read(at(place_, w), compressed.data());
    for (std::size_t i = 0; i < original.size(); ++i) {
      const double value = static_cast<double>(original[i]), other = static_cast<double>(compressed[i]);
      of[2 * w] += (other - value) * (other - value);
      of[2 * w + 1] += value * value;
    }
  }
  ranks_.sum(sums);
  double difference = 0, energy = 0;
  for (std::int64_t w = 0; w < windows_.count; w += stride_) {
    difference += of[2 * w];
    energy += of[2 * w + 1];
  }
  return energy > 0 ? difference / energy : 0;
}

void Walk::run(BlockVisitor& visitor) {
  const SingleThreadedTorch single;  // parallelism is over windows
  rope_ = rope_tables(config_, windows_.length, device_);
  if (!options_.spill.empty() && context_.progress) {
    const std::int64_t both = options_.original_stream || options_.cross ? pairs() : 0;
    const std::int64_t carried = windows_.count * (config_.has_experts() ? 2 : 1) + both;
    const double bytes = static_cast<double>(carried * window_size_) * 4;
    char text[96];
    std::snprintf(text, sizeof text, "Activations (%.2f GB) go to an HDF5 file in ", bytes / 1e9);
    context_.progress->note(text + options_.spill.string());
  }
  embed(visitor);
  if (context_.progress) context_.progress->begin("blocks", config_.num_layers);
  for (int layer = 0; layer < config_.num_layers; ++layer) {
    DecoderBlock block = load_block(checkpoint_, layer, device_, false);
    share(block);
    if (options_.cross) {
      reference_ = load_block(checkpoint_, layer, device_);
      share(reference_);
    } else {
      advance(block, original_, BlockStage::kO);
      if (config_.has_experts()) through_experts(block, original_, [](std::int64_t) {});
      else advance(block, original_, BlockStage::kDown);
    }
    visitor.begin_block(layer);
    kept_windows_ = 0;
    finished_ = ranks_.broadcast(visitor.finished(layer) ? "yes" : "no") == "yes";
    if (finished_ && context_.progress) context_.progress->update(layer, "replayed");
    const auto step = [&](Step step) {
      if (!finished_) return visit(block, layer, step, visitor);
      if (ranks_.first())
        with_linears(block, layer, step, [&](std::span<BlockLinear> linears) { visitor.restore(layer, linears); });
      share(block, step);
    };
    for (const BlockStage stage : kAttention) step({stage});
    leave_attention(block, layer, visitor);
    if (config_.has_experts()) {
      through_experts(block, compressed_, [&](std::int64_t expert) {
        for (const BlockStage stage : kMlp) step({stage, expert});
        if (!finished_) visitor.end_expert(layer, expert);
      });
    } else {
      for (const BlockStage stage : kMlp) step({stage});
      advance(block, compressed_, BlockStage::kDown);
    }
    if (options_.cross && finished_) advance(reference_, original_, BlockStage::kDown);
    visitor.end_block(layer, drift());
    if (context_.progress) context_.progress->update(layer + 1);
  }
  if (context_.progress) context_.progress->end();
}

// What rank 0 tells the others of a walk, and what they make of it.
struct Announced {
  CalibrationWindows windows;
  WalkOptions options;
  TokenWeights weights;
};

void announce(Ranks& ranks, const CalibrationWindows& windows, const WalkOptions& options) {
  Json sizes;
  if (options.token_weights)
    for (const auto& values : options.token_weights->values) sizes.push_back(values.size());
  ranks.broadcast_late(Json{{"count", windows.count}, {"length", windows.length}, {"prefixed", windows.prefixed},
                       {"hessian", options.hessian}, {"cross", options.cross}, {"held_out", options.held_out},
                       {"expert_tokens", options.expert_tokens}, {"original_stream", options.original_stream},
                       {"paired_tokens", options.paired_tokens}, {"spill", !options.spill.empty()},
                       {"widest_double", options.widest_double}, {"weights", sizes}}.dump());
  auto& ids = const_cast<std::vector<std::int32_t>&>(windows.ids);
  ranks.broadcast(torch::from_blob(ids.data(), {windows.count * windows.length}, torch::kInt));
  if (!options.token_weights) return;
  for (const auto& values : options.token_weights->values)
    ranks.broadcast(torch::from_blob(const_cast<float*>(values.data()), {static_cast<std::int64_t>(values.size())},
                                     torch::kFloat));
}

// False: there are no more.
bool hear(Ranks& ranks, Announced& walk) {
  const Json told = parse_json(ranks.broadcast_late(std::string()), "rank 0");
  if (told.is_null()) return false;
  CalibrationWindows& windows = walk.windows;
  windows.count = told.at("count").get<std::int64_t>();
  windows.length = told.at("length").get<std::int64_t>();
  windows.prefixed = told.at("prefixed").get<bool>();
  windows.ids.resize(static_cast<std::size_t>(windows.count * windows.length));
  ranks.broadcast(torch::from_blob(windows.ids.data(), {windows.count * windows.length}, torch::kInt));
  WalkOptions& o = walk.options;
  o.hessian = told.at("hessian").get<bool>();
  o.cross = told.at("cross").get<bool>();
  o.held_out = told.at("held_out").get<bool>();
  o.expert_tokens = told.at("expert_tokens").get<std::int64_t>();
  o.original_stream = told.at("original_stream").get<bool>();
  o.paired_tokens = told.at("paired_tokens").get<std::int64_t>();
  o.widest_double = told.at("widest_double").get<std::int64_t>();
  if (told.at("spill").get<bool>()) o.spill = fs::temp_directory_path();
  for (const Json& size : told.at("weights")) {
    auto& values = walk.weights.values.emplace_back(size.get<std::size_t>());
    ranks.broadcast(torch::from_blob(values.data(), {static_cast<std::int64_t>(values.size())}, torch::kFloat));
  }
  if (!walk.weights.values.empty()) o.token_weights = &walk.weights;
  return true;
}

class Follower : public BlockVisitor {
 public:
  void compress(int, BlockStage, std::span<BlockLinear>, const InputStatistics&) override {}
};

}  // namespace

Command calibrated_by_ranks(Command command) {
  command.run = [run = command.run](const Options& options, Context& context) -> Json {
    Ranks& ranks = ranks_of(context);
    if (ranks.alone()) return run(options, context);
    const Checkpoint model(options.get<std::string>("model"));
    ranks.agree("the program", Json{{"pare", PARE_VERSION}, {"LibTorch", TORCH_VERSION},
                                      {"split products", has_split_products()}});
    ranks.agree("--model", model.content_hash());
    ranks.wait_long();
    if (ranks.first()) {
      Json result = run(options, context);
      try {
        ranks.broadcast_late(Json().dump());
      } catch (const RankLost& lost) {  // what it was needed for is done and stands
        context.progress->note(std::string(lost.what()) + "; the result is complete");
      }
      return result;
    }
    for (;;) {
      Announced walk;
      if (!hear(ranks, walk)) return {};
      walk.options.device = rank_device(options.get<std::string>("device"), context);
      walk.options.threads = context.threads;
      Follower follower;
      Walk(model, walk.windows, walk.options, context).run(follower);
    }
  };
  return ranked(std::move(command), 3600);  // the others wait while rank 0 rounds a block
}

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

void walk_blocks(const Checkpoint& checkpoint, const CalibrationWindows& windows, const WalkOptions& options,
                 Context& context, BlockVisitor& visitor) {
  require_ids(windows, checkpoint.config().vocab_size);
  if (options.cross && checkpoint.config().has_experts())
    throw std::logic_error("cross statistics are not defined with experts: the two streams choose differently");
  if (options.token_weights && checkpoint.config().has_experts())
    throw std::logic_error("token weights are not defined with experts");
  if (Ranks& ranks = ranks_of(context); !ranks.alone()) announce(ranks, windows, options);
  Walk(checkpoint, windows, options, context).run(visitor);
}

void require_device(const std::string& name) {
  parse_device(name);
}

}  // namespace pare
