#include "prune/cutter.h"

#include <cmath>
#include <map>

#include "core/error.h"
#include "model/activations.h"
#include "model/threads.h"
#include "prune/measure.h"
#include "prune/moments.h"
#include "prune/rank.h"
#include "prune/refit.h"

namespace pare {
namespace {

using torch::Tensor;

constexpr std::int64_t kHeadRows = 2048;
constexpr const char* kOuter = "outer";  // the piece of what is outside the blocks

// Relative errors of the refits of one kind of linear, added up.
struct Errors {
  double before = 0, after = 0;
  std::int64_t count = 0, lowered = 0;
};
using ErrorsByKind = std::map<std::string, Errors>;

constexpr const char* kKinds[] = {"q, k, v", "o", "gate, up", "down"};  // by BlockStage

void add_errors(const ErrorsByKind& more, ErrorsByKind& all) {
  for (const auto& [kind, errors] : more) {
    Errors& sum = all[kind];
    sum.before += errors.before;
    sum.after += errors.after;
    sum.count += errors.count;
    sum.lowered += errors.lowered;
  }
}

class Cutter {
 public:
  Cutter(PruneJob& job, const CutPlan& plan)
      : job_(job),
        plan_(plan),
        config_(job.model.config()),
        target_(cut_config(config_, plan.shape, plan.layers, plan.widths)),
        device_(parse_device(job.options.get<std::string>("device"))),
        threads_(job.context.threads),
        narrower_(plan.shape.hidden < config_.hidden_size),
        writer_(job.work, target_, job.dtype),
        channels_(torch::tensor(plan.channels, torch::kLong).to(device_)) {}

  void run();

 private:
  // Streams, one window at a time: [1, length, width].
  Tensor load(Activations& stream, std::int64_t window, std::int64_t width) const {
    Tensor values = torch::empty({1, job_.windows.length, width}, torch::kFloat);
    stream.read(window, values.data_ptr<float>());
    return values.to(device_);
  }
  static void store(Activations& stream, std::int64_t window, const Tensor& values) {
    stream.write(window, values.to(torch::kCPU, torch::kFloat).contiguous().data_ptr<float>());
  }
  Tensor original(std::int64_t window) { return load(original_, window, config_.hidden_size); }
  Tensor current(std::int64_t window) { return load(cut_, window, target_.hidden_size); }
  Tensor kept(const Tensor& hidden) const { return narrower_ ? hidden.index_select(-1, channels_) : hidden; }
  void each_window(const std::function<void(std::int64_t)>& work) {
    for_each_shard(device_, threads_, static_cast<std::size_t>(job_.windows.count), [&](std::size_t w) {
      throw_if_interrupted("prune", "run the same command again");
      work(static_cast<std::int64_t>(w));
    });
  }
  std::vector<double> sum_windows(const std::function<std::vector<double>(std::int64_t)>& work) const {
    return pare::sum_windows(job_.windows, device_, threads_, work);
  }

  void embed();
  DecoderBlock make_block(int at, int layer, const BlockCut& cut, const Importance& measured);
  DecoderBlock restore_block(int at) const;
  void refit_block(DecoderBlock& whole, DecoderBlock& narrow, const BlockCut& cut, int layer);
  void refit(DecoderBlock& narrow, BlockStage stage, std::int64_t expert,
             const std::function<Pairs(std::int64_t)>& pairs);
  void keep_errors(const std::string& piece, const ErrorsByKind& errors) const;
  ErrorsByKind kept_errors(const std::string& piece) const;
  void write_block(int at, DecoderBlock& narrow);
  void write_outer();
  std::vector<float> refitted_head(const Tensor& head, const std::function<Pairs(std::int64_t)>& pairs);
  double drift();

  // The rows of linears that share an input, as the cut keeps them, over all inputs of the original.
  Tensor kept_rows(DecoderBlock& whole, int layer, BlockStage stage, const BlockCut& cut, std::int64_t expert = -1);
  Tensor middle(DecoderBlock& block, const Tensor& hidden, const RopeTables& rope) {
    return block->attention_output(hidden, block->attention_mix(block->attention_input(hidden), rope));
  }
  // Softmax of the router over all experts of the original, of rows [n, hidden]: [n, 1].
  Tensor router_share(DecoderBlock& whole, const Tensor& rows, std::int64_t expert) const {
    const Tensor scores = torch::matmul(rows, whole->weight(config_.experts.module + ".gate").t());
    return torch::softmax(scores, -1).narrow(1, expert, 1);
  }
  Tensor mlp_input(DecoderBlock& block, const Tensor& hidden, const RopeTables& rope) {
    return block->mlp_input(block->parallel_residual() ? hidden : middle(block, hidden, rope));
  }
  // As it is stored: what the stream sees is what ships.
  Tensor stored(const Tensor& values) const {
    const auto type = job_.dtype == "bfloat16"  ? torch::kBFloat16
                      : job_.dtype == "float16" ? torch::kHalf
                                                : torch::kFloat;
    return values.to(type).to(torch::kFloat);
  }
  bool streams() const { return plan_.refit; }  // whether the cut model's own activations are needed

  PruneJob& job_;
  const CutPlan& plan_;
  const ModelConfig& config_;
  const ModelConfig target_;
  torch::Device device_;
  int threads_;
  bool narrower_;
  CheckpointWriter writer_;
  Tensor channels_;
  RopeTables rope_, cut_rope_;
  Activations original_, cut_;  // hidden states of the two models
  ErrorsByKind errors_;  // of the block being refitted
};

void Cutter::embed() {
  original_ = Activations(job_.windows.count, job_.windows.length * config_.hidden_size, job_.spill);
  if (streams()) cut_ = Activations(job_.windows.count, job_.windows.length * target_.hidden_size, job_.spill);
  std::int64_t window = 0;
  for (const auto& shards : shard_groups(job_.windows, device_))
    for (const Tensor& shard : embed_stream(job_.model, shards, device_))
      for (std::int64_t i = 0; i < shard.size(0); ++i, ++window) {
        store(original_, window, shard[i]);
        if (streams()) store(cut_, window, kept(shard[i]));
      }
}

DecoderBlock Cutter::make_block(int at, int layer, const BlockCut& cut, const Importance& measured) {
  const torch::NoGradGuard no_grad;
  DecoderBlock block(target_, at);
  auto parameters = block->named_parameters();
  const std::size_t prefix = block_tensor(at, "").size();
  for (const TensorSpec& spec : expected_tensors(target_)) {
    if (spec.layer != at) continue;
    const std::string source = source_name(config_, spec, layer, cut);
    const TensorSpec& from = job_.model.spec(source);
    Tensor values = cut_tensor(config_, from, load_tensor(job_.model, source, torch::kCPU), plan_.channels, &cut,
                               spec.expert);
    job_.model.release(source);
    const auto ratio = measured.norms.find(spec.module);
    if (spec.role == TensorRole::kNorm && ratio != measured.norms.end())
      values = config_.norm_adds_one ? (values + 1) * ratio->second - 1 : values * ratio->second;
    parameters[spec.name.substr(prefix)].copy_(stored(values));
  }
  block->to(device_);
  return block;
}

DecoderBlock Cutter::restore_block(int at) const {
  const torch::NoGradGuard no_grad;
  DecoderBlock block(target_, at);
  for (auto& item : block->named_parameters()) {
    Tensor values = torch::empty(item.value().sizes(), torch::kFloat);
    writer_.read_f32(block_tensor(at, item.key()), values.data_ptr<float>());
    item.value().copy_(values);
  }
  block->to(device_);
  return block;
}

void Cutter::write_block(int at, DecoderBlock& narrow) {
  writer_.begin_piece(block_piece(at));
  for (auto& item : narrow->named_parameters()) {
    const Tensor values = item.value().detach().to(torch::kCPU).contiguous();
    const std::string name = block_tensor(at, item.key());
    check_finite(values.data_ptr<float>(), static_cast<std::size_t>(values.numel()), name);
    writer_.put(name, values.data_ptr<float>());
  }
  writer_.end_piece();
}

void Cutter::refit(DecoderBlock& narrow, BlockStage stage, std::int64_t expert,
                   const std::function<Pairs(std::int64_t)>& pairs) {
  const auto modules = stage_modules(target_, stage, expert);
  std::vector<Tensor> parts;
  for (const std::string& module : modules) parts.push_back(narrow->weight(module).detach().cpu());
  const Tensor weights = torch::cat(parts, 0).contiguous();
  const std::int64_t rows = weights.size(0), inputs = weights.size(1);
  const Fit fit = collect(job_.windows, inputs, rows, device_, threads_, pairs);
  if (fit.fitted.tokens < (expert >= 0 ? kExpertTokens : 1)) return;
  const Refit solver(fit.fitted.gram.data_ptr<double>(), inputs, plan_.damping, modules.front());
  std::vector<float> solved = solver.solve(weights.data_ptr<float>(), fit.fitted.cross.data_ptr<double>(), rows);
  const Tensor fresh = stored(torch::from_blob(solved.data(), {rows, inputs}, torch::kFloat)).contiguous();
  const Sums& judge = fit.judge();
  const auto error = [&](const Tensor& w) {
    return squared_error(w.data_ptr<float>(), judge.gram.data_ptr<double>(), judge.cross.data_ptr<double>(),
                         judge.energy, rows, inputs) /
           std::max(judge.energy, 1e-300);
  };
  const double before = error(weights), after = error(fresh);
  Errors& errors = errors_[kKinds[static_cast<int>(stage)]];
  errors.before += before;
  errors.after += after < before ? after : before;
  ++errors.count;
  if (!(after < before)) return;
  ++errors.lowered;
  std::int64_t first = 0;
  for (const std::string& module : modules) {
    Tensor there = narrow->weight(module);
    there.copy_(fresh.narrow(0, first, there.size(0)));
    first += there.size(0);
  }
}

void Cutter::keep_errors(const std::string& piece, const ErrorsByKind& errors) const {
  Json json = Json::object();
  for (const auto& [kind, e] : errors) json[kind] = {e.before, e.after, e.count, e.lowered};
  write_text(job_.state / (piece + ".refit.json"), json.dump());
}

ErrorsByKind Cutter::kept_errors(const std::string& piece) const {
  const fs::path file = job_.state / (piece + ".refit.json");
  const Json json = read_json(file);
  ErrorsByKind result;
  try {
    for (const auto& [kind, e] : json.items())
      result[kind] = {e.at(0).get<double>(), e.at(1).get<double>(), e.at(2).get<std::int64_t>(),
                      e.at(3).get<std::int64_t>()};
  } catch (const Json::exception& problem) {
    throw failure(file.string(), "the refits of a finished block", problem.what(),
                  "remove " + job_.work.string() + " and run again");
  }
  return result;
}

Tensor Cutter::kept_rows(DecoderBlock& whole, int layer, BlockStage stage, const BlockCut& cut, std::int64_t expert) {
  const Kept all = all_of(config_.hidden_size);
  std::vector<Tensor> parts;
  const std::int64_t source = expert < 0 ? -1 : cut.experts[static_cast<std::size_t>(expert)];
  for (const std::string& module : stage_modules(config_, stage, source))
    parts.push_back(cut_tensor(config_, job_.model.spec(block_tensor(layer, module + ".weight")),
                               whole->weight(module).detach(), all, &cut, expert));
  return torch::cat(parts, 0);
}

void Cutter::refit_block(DecoderBlock& whole, DecoderBlock& narrow, const BlockCut& cut, int layer) {
  const auto bias = [&](const std::string& module) { return parameter_of(narrow, module + ".bias"); };
  const auto without = [](const Tensor& x, const Tensor& b) { return b.defined() ? x - b : x; };
  const auto targets = [](const Tensor& x, const Tensor& weight) { return torch::matmul(rows_of(x), weight.t()); };
  // Norms on what is added come between: there the outputs themselves are the targets.
  const auto added = [&](const Tensor& mix, const std::string& module) {
    return targets(mix, kept(whole->weight(module).detach().t()).t());
  };

  const Tensor qkv = kept_rows(whole, layer, BlockStage::kQkv, cut);
  refit(narrow, BlockStage::kQkv, -1, [&](std::int64_t w) {
    return Pairs{rows_of(narrow->attention_input(current(w))), targets(whole->attention_input(original(w)), qkv)};
  });
  refit(narrow, BlockStage::kO, -1, [&](std::int64_t w) {
    const Tensor h = original(w), c = current(w);
    const Tensor mix = whole->attention_mix(whole->attention_input(h), rope_);
    const Tensor own = narrow->attention_mix(narrow->attention_input(c), cut_rope_);
    if (config_.post_norms) return Pairs{rows_of(own), added(mix, "self_attn.o_proj")};
    return Pairs{rows_of(own),
                 rows_of(without(kept(whole->attention_output(h, mix)) - c, bias("self_attn.o_proj")))};
  });
  if (config_.has_experts()) {
    for (std::int64_t e = 0; e < target_.experts.count; ++e) {
      const std::int64_t source = cut.experts[static_cast<std::size_t>(e)];
      // Tokens that choose the expert in the cut model, weighted as its output is there.
      const auto routed = [&](std::int64_t w) {
        const Tensor own = mlp_input(narrow, current(w), cut_rope_), all = mlp_input(whole, original(w), rope_);
        const Tensor share = narrow->expert_shares(own).select(1, e), rows = share.nonzero().squeeze(1);
        return std::tuple{rows_of(own).index_select(0, rows), rows_of(all).index_select(0, rows),
                          share.index_select(0, rows).unsqueeze(1), share[0].item<double>() != 0};
      };
      const Tensor up = kept_rows(whole, layer, BlockStage::kGateUp, cut, e);
      refit(narrow, BlockStage::kGateUp, e, [&](std::int64_t w) {
        const auto [own, all, share, first] = routed(w);
        return Pairs{own * share, torch::matmul(all, up.t()) * share, first};
      });
      const std::string down = stage_modules(config_, BlockStage::kDown, source).front();
      refit(narrow, BlockStage::kDown, e, [&](std::int64_t w) {
        const auto [own, all, share, first] = routed(w);
        // Shares that are not made to sum to 1 grow when experts leave the softmax: what is to come is as loud as the
        // expert was among all of them.
        const Tensor loudness = config_.experts.renormalize ? share : router_share(whole, all, source);
        return Pairs{narrow->expert_mix(own, e) * share, added(whole->expert_mix(all, source) * loudness, down), first};
      });
    }
    return;
  }
  const Tensor up = kept_rows(whole, layer, BlockStage::kGateUp, cut);
  refit(narrow, BlockStage::kGateUp, -1, [&](std::int64_t w) {
    return Pairs{rows_of(mlp_input(narrow, current(w), cut_rope_)),
                 targets(mlp_input(whole, original(w), rope_), up)};
  });
  refit(narrow, BlockStage::kDown, -1, [&](std::int64_t w) {
    const Tensor h = original(w), c = current(w);
    const Tensor own = narrow->mlp_mix(mlp_input(narrow, c, cut_rope_));
    if (config_.post_norms)
      return Pairs{rows_of(own), added(whole->mlp_mix(mlp_input(whole, h, rope_)), "mlp.down_proj")};
    const Tensor wanted = kept(whole->forward(h, rope_)) - middle(narrow, c, cut_rope_);
    return Pairs{rows_of(own), rows_of(without(wanted, bias("mlp.down_proj")))};
  });
}

double Cutter::drift() {
  const auto sums = sum_windows([&](std::int64_t w) {
    const Tensor wanted = kept(original(w));
    return std::vector<double>{(current(w) - wanted).square().sum(torch::kDouble).item<double>(),
                               wanted.square().sum(torch::kDouble).item<double>()};
  });
  return sums[1] > 0 ? sums[0] / sums[1] : 0;
}

void Cutter::run() {
  const SingleThreadedTorch single;  // parallelism is over windows and tiles
  const torch::NoGradGuard no_grad;
  rope_ = rope_tables(config_, job_.windows.length, device_);
  cut_rope_ = rope_tables(target_, job_.windows.length, device_);
  embed();
  job_.context.progress->begin("cut", config_.num_layers);
  ErrorsByKind all;
  std::size_t at = 0;
  for (int layer = 0; layer < config_.num_layers; ++layer) {
    DecoderBlock whole = load_block(job_.model, layer, device_);
    const bool stays = at < plan_.layers.size() && plan_.layers[at] == layer;
    if (stays) {
      const int number = static_cast<int>(at);
      DecoderBlock narrow{nullptr};
      if (writer_.has_piece(block_piece(number))) {
        narrow = restore_block(number);
        errors_ = kept_errors(block_piece(number));
      } else {
        Shape shape = plan_.shape;
        const BlockWidths own = target_.widths(number);
        shape.heads = own.heads;
        shape.kv_heads = own.kv_heads;
        shape.ffn = own.inner;
        const Importance measured =
            measure_block(job_, plan_, shape, whole, rope_, device_, [&](std::int64_t w) { return original(w); });
        const BlockCut cut = choose_parts(config_, shape, measured);
        narrow = make_block(number, layer, cut, measured);
        errors_.clear();
        if (plan_.refit) refit_block(whole, narrow, cut, layer);
        keep_errors(block_piece(number), errors_);
        write_block(number, narrow);
      }
      add_errors(errors_, all);
      if (streams())
        each_window([&](std::int64_t w) { store(cut_, w, narrow->forward(current(w), cut_rope_)); });
      ++at;
    }
    each_window([&](std::int64_t w) { store(original_, w, whole->forward(original(w), rope_)); });
    if (stays && streams() && plan_.report)
      job_.context.report.add({"prune", "drift after block " + std::to_string(layer), std::nullopt, drift(), "relative",
                               std::nullopt});
    job_.context.progress->update(layer + 1);
  }
  job_.context.progress->end();
  if (!writer_.has_piece(kOuter)) write_outer();
  for (const auto& [kind, errors] : all) {
    if (!plan_.report) continue;
    const auto count = static_cast<double>(errors.count);
    job_.context.report.add({"prune", "error of " + kind + " by refit, mean", errors.before / count,
                             errors.after / count, "relative", std::nullopt});
    job_.context.report.add({"prune", "refits of " + kind + " that lower the error on unseen windows", count,
                             static_cast<double>(errors.lowered), "linears", std::nullopt});
  }
  writer_.copy_side_files(job_.model.folder());
  writer_.finish();
}

std::vector<float> Cutter::refitted_head(const Tensor& head, const std::function<Pairs(std::int64_t)>& pairs) {
  const std::int64_t inputs = target_.hidden_size, vocab = head.size(0);
  // Targets: what the whole head reads.
  const Fit fit = collect(job_.windows, inputs, config_.hidden_size, device_, threads_, pairs);
  const Refit solver(fit.fitted.gram.data_ptr<double>(), inputs, plan_.damping, "lm_head");
  std::vector<float> out;
  double gain = 0;  // of squared error on the windows that judge
  for (std::int64_t first = 0; first < vocab; first += kHeadRows) {
    const std::int64_t count = std::min(kHeadRows, vocab - first);
    const Tensor rows = head.narrow(0, first, count);
    const Tensor prior = stored(rows.index_select(1, channels_.cpu())).contiguous();
    const Tensor cross = torch::matmul(rows.to(torch::kDouble), fit.fitted.cross).contiguous();
    auto solved = solver.solve(prior.data_ptr<float>(), cross.data_ptr<double>(), count);
    const Tensor fresh = stored(torch::from_blob(solved.data(), {count, inputs}, torch::kFloat)).contiguous();
    const Tensor held = torch::matmul(rows.to(torch::kDouble), fit.judge().cross).contiguous();
    const auto error = [&](const Tensor& weights) {  // but for a constant
      return squared_error(weights.data_ptr<float>(), fit.judge().gram.data_ptr<double>(), held.data_ptr<double>(), 0,
                           count, inputs);
    };
    gain += error(prior) - error(fresh);
    out.insert(out.end(), fresh.data_ptr<float>(), fresh.data_ptr<float>() + fresh.numel());
  }
  if (gain > 0) return out;
  const Tensor prior = head.index_select(1, channels_.cpu()).contiguous();
  return {prior.data_ptr<float>(), prior.data_ptr<float>() + prior.numel()};
}

// Embedding, positions, last norm and head.
void Cutter::write_outer() {
  const torch::NoGradGuard no_grad;
  const auto read = [&](const std::string& name) {
    const Tensor values = load_tensor(job_.model, name, torch::kCPU);
    check_finite(values.data_ptr<float>(), static_cast<std::size_t>(values.numel()),
                 (job_.model.folder() / name).string());
    return values;
  };
  // Where embeddings are multiplied by something of the width, the cut model multiplies by something else.
  const double scale = config_.embedding_scale / target_.embedding_scale;
  const std::int64_t narrow = target_.hidden_size;
  Tensor weight = read("model.norm.weight"), bias;
  if (config_.layer_norm) bias = read("model.norm.bias");
  Tensor cut_weight = weight, cut_bias = bias;
  if (narrower_) {
    Tensor factor = norm_factor(config_, weight).index_select(0, channels_.cpu());
    const auto plain = [&](const ModelConfig& config, const Tensor& hidden) {
      const std::int64_t width = hidden.size(-1);
      const Tensor one = (config.norm_adds_one ? torch::zeros({width}) : torch::ones({width})).to(device_);
      return rows_of(apply_norm(config, hidden, one, config.layer_norm ? torch::zeros_like(one) : Tensor(),
                                torch::kFloat));
    };
    const auto sums = sum_windows([&](std::int64_t w) {
      if (!streams()) return std::vector<double>{norm_narrowing(config_, original(w), channels_)};
      const Tensor x = kept(plain(config_, original(w))), y = plain(target_, current(w));
      const Tensor cross = (x * y).sum(0, false, torch::kDouble).cpu();
      const Tensor own = y.square().sum(0, false, torch::kDouble).cpu();
      std::vector<double> out(cross.data_ptr<double>(), cross.data_ptr<double>() + narrow);
      out.insert(out.end(), own.data_ptr<double>(), own.data_ptr<double>() + narrow);
      return out;
    });
    for (std::int64_t j = 0; j < narrow; ++j) {
      const auto at = static_cast<std::size_t>(j);
      const double own = streams() ? sums[at + static_cast<std::size_t>(narrow)] : 0;
      const double ratio = !streams() ? sums[0] / static_cast<double>(job_.windows.count)
                           : own > 0  ? sums[at] / own
                                      : 1.0;
      factor.data_ptr<float>()[j] *= static_cast<float>(config_.tie_word_embeddings ? ratio / scale : ratio);
    }
    cut_weight = stored(config_.norm_adds_one ? factor - 1 : factor);
    if (bias.defined()) cut_bias = kept(bias.to(device_)).cpu() / (config_.tie_word_embeddings ? scale : 1.0);
  }
  std::vector<float> head;
  if (!config_.tie_word_embeddings) {
    const Tensor whole = read("lm_head.weight");
    if (narrower_ && plan_.refit) {
      const auto on = [&](const Tensor& x) { return x.defined() ? x.to(device_) : x; };
      const Tensor w0 = on(weight), b0 = on(bias), w1 = on(cut_weight), b1 = on(cut_bias);
      head = refitted_head(whole, [&](std::int64_t w) {
        return Pairs{rows_of(apply_norm(target_, current(w), w1, b1, torch::kFloat)),
                     rows_of(apply_norm(config_, original(w), w0, b0, torch::kFloat))};
      });
    } else {
      const Tensor rows = kept(whole.to(device_)).cpu().contiguous();
      head.assign(rows.data_ptr<float>(), rows.data_ptr<float>() + rows.numel());
    }
  }
  writer_.begin_piece(kOuter);
  const auto put = [&](const std::string& name, const Tensor& values) {
    const Tensor flat = values.contiguous();
    writer_.put(name, flat.data_ptr<float>());
    job_.model.release(name);
  };
  const Tensor embedding = kept(read("model.embed_tokens.weight").to(device_)).cpu();
  put("model.embed_tokens.weight", scale == 1 ? embedding : embedding * scale);
  if (config_.learned_positions) {
    const std::string positions = "model.embed_positions.weight";
    put(positions, kept(read(positions).to(device_)).cpu());
  }
  put("model.norm.weight", cut_weight);
  if (bias.defined()) put("model.norm.bias", cut_bias);
  if (!config_.tie_word_embeddings) {
    writer_.put("lm_head.weight", head.data());
    job_.model.release("lm_head.weight");
  }
  writer_.end_piece();
}

}  // namespace

void write_cut(PruneJob& job, const CutPlan& plan) { Cutter(job, plan).run(); }

std::uint64_t cut_peak_bytes(const ModelConfig& config, const Shape& shape, std::int64_t windows, std::int64_t length,
                             bool refit, const fs::path& spill) {
  const ModelConfig target = cut_config(config, shape);
  const auto parameters = [](const ModelConfig& of) {
    std::int64_t count = 0;
    for (const TensorSpec& spec : expected_tensors(of)) {
      if (spec.layer != 0) continue;
      std::int64_t elements = 1;
      for (const std::int64_t size : spec.shape) elements *= size;
      count += elements;
    }
    return count;
  };
  const std::int64_t tokens = windows * length, width = config.hidden_size + (refit ? shape.hidden : 0);
  const std::int64_t queries = shape.heads * config.head_dim, keys = shape.kv_heads * config.head_dim;
  const std::int64_t inputs = std::max({shape.hidden, queries, shape.ffn});
  const std::int64_t outputs = std::max({2 * shape.ffn, queries + 2 * keys, shape.hidden});
  std::uint64_t bytes = 4 * static_cast<std::uint64_t>(parameters(config) + parameters(target));
  if (spill.empty()) bytes += 4 * static_cast<std::uint64_t>(tokens * width);
  if (refit)  // with the factor and what it is solved for
    bytes += collect_bytes(windows, length, inputs, outputs) +
             8 * static_cast<std::uint64_t>(inputs * inputs + 3 * outputs * inputs);
  bytes += static_cast<std::uint64_t>(std::min<std::int64_t>(16, windows)) * 2 * block_work_bytes(config, length);
  return std::max(bytes, 12 * static_cast<std::uint64_t>(config.vocab_size * config.hidden_size));
}

double cut_passes(const ModelConfig& config, const Shape& shape, bool refit) {
  const double kept = static_cast<double>(shape.layers) / static_cast<double>(config.num_layers);
  return 1 + kept * (refit ? 9 : 1) + (shape.hidden < config.hidden_size ? 1 : 0);
}

}  // namespace pare
