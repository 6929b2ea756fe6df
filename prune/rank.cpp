#include "prune/rank.h"

#include "prune/masks.h"
#include "prune/moments.h"
#include "prune/refit.h"

namespace pare {
namespace {

using torch::Tensor;

// The nulls: without a look at activations.
Importance unmeasured(const PruneJob& job, const CutPlan& plan, DecoderBlock& whole) {
  const ModelConfig& config = job.model.config();
  const std::int64_t heads = config.num_heads, kv = config.num_kv_heads, width = config.head_dim;
  const std::int64_t experts = config.experts.count, inner = config.intermediate_size;
  Importance result;
  if (plan.rank == RankBy::kRandom) {
    const auto draw = [&](const std::string& what, std::int64_t count) {
      const auto scores = random_scores(job.context.seed, block_piece(whole->layer()) + " " + what, 1, count);
      return std::vector<double>(scores.begin(), scores.end());
    };
    result.heads = draw("heads", heads);
    result.kv_heads = draw("kv_heads", kv);
    if (experts > 0) result.experts = draw("experts", experts);
    for (std::int64_t e = 0; e < std::max<std::int64_t>(1, experts); ++e)
      result.neurons.push_back(draw("neurons " + std::to_string(e), inner));
    return result;
  }
  const auto norms = [](const Tensor& weight, std::int64_t dimension) {
    return weight.detach().cpu().to(torch::kDouble).norm(2, {dimension});
  };
  const auto list = [](const Tensor& values) {
    const Tensor flat = values.contiguous();
    return std::vector<double>(flat.data_ptr<double>(), flat.data_ptr<double>() + flat.numel());
  };
  const Tensor joined = config.fused_qkv ? whole->weight("self_attn.qkv_proj") : Tensor();
  const Tensor v = joined.defined() ? joined.narrow(0, joined.size(0) - kv * width, kv * width)
                                    : whole->weight("self_attn.v_proj");
  const Tensor values = norms(v, 1).view({kv, width}).norm(2, {1});
  const Tensor outs = norms(whole->weight("self_attn.o_proj"), 0).view({heads, width}).norm(2, {1});
  const Tensor by_head = outs * values.repeat_interleave(heads / kv);
  result.heads = list(by_head);
  result.kv_heads = list(by_head.view({kv, heads / kv}).sum(1));
  for (std::int64_t e = 0; e < std::max<std::int64_t>(1, experts); ++e) {
    const std::string prefix = experts > 0 ? config.experts.module + ".experts." + std::to_string(e) + "." : "mlp.";
    const Tensor down = whole->weight(experts > 0 ? prefix + config.experts.down : "mlp.down_proj");
    Tensor score = norms(down, 0);
    if (config.fused_gate_up) {
      const Tensor both = norms(whole->weight("mlp.gate_up_proj"), 1);
      score = score * both.narrow(0, 0, inner) * both.narrow(0, inner, inner);
    } else {
      score = score * norms(whole->weight(experts > 0 ? prefix + config.experts.up : "mlp.up_proj"), 1);
      if (config.gated_mlp)
        score = score * norms(whole->weight(experts > 0 ? prefix + config.experts.gate : "mlp.gate_proj"), 1);
    }
    result.neurons.push_back(list(score));
    if (experts > 0) result.experts.push_back(score.sum().item<double>());
  }
  return result;
}

}  // namespace

Tensor rows_of(const Tensor& x) { return x.reshape({-1, x.size(-1)}); }

Tensor parameter_of(DecoderBlock& block, const std::string& name) {
  for (auto& item : block->named_parameters())
    if (item.key() == name) return item.value();
  return {};
}

// LayerNorm looks at the differences from the mean.
double norm_narrowing(const ModelConfig& config, const Tensor& x, const Tensor& channels) {
  const auto square = [&](const Tensor& values) {
    const Tensor exact = values.to(torch::kDouble);
    return (config.layer_norm ? exact - exact.mean(-1, true) : exact).square().mean(-1);
  };
  return (square(x.index_select(-1, channels)) / (square(x) + config.rms_norm_eps)).sqrt().mean().item<double>();
}

Importance measure_block(const PruneJob& job, const CutPlan& plan, const Shape& shape, DecoderBlock& whole, const RopeTables& rope,
                         const torch::Device& device, const std::function<Tensor(std::int64_t)>& original) {
  const ModelConfig& config = job.model.config();
  const std::int64_t heads = config.num_heads, kv = config.num_kv_heads, width = config.head_dim;
  const std::int64_t experts = config.experts.count, inner = config.intermediate_size;
  const Tensor o = whole->weight("self_attn.o_proj");
  const bool ranked = plan.rank == RankBy::kMeasured, narrower = shape.hidden < config.hidden_size;
  const bool rank_heads = ranked && shape.heads < heads;
  const bool rank_neurons = ranked && shape.ffn < inner, rank_experts = ranked && shape.experts < experts;
  Importance result = ranked ? Importance() : unmeasured(job, plan, whole);
  if (!rank_heads && !rank_neurons && !rank_experts && !narrower) return result;
  const Tensor channels = torch::tensor(plan.channels, torch::kLong).to(device);
  const Tensor o_bias = parameter_of(whole, "self_attn.o_proj.bias"),
               down_bias = parameter_of(whole, "mlp.down_proj.bias");
  const auto linear = [](const Tensor& x, const Tensor& weight, const Tensor& bias) {
    const Tensor y = torch::matmul(x, weight.t());
    return bias.defined() ? y + bias : y;
  };
  const auto expert_weight = [&](std::int64_t e) {
    return whole->weight(config.experts.module + ".experts." + std::to_string(e) + "." + config.experts.down);
  };
  const auto sums = sum_windows(job.windows, device, job.context.threads, [&](std::int64_t w) {
    std::vector<double> out;
    const Tensor hidden = original(w);
    const Tensor mix = whole->attention_mix(whole->attention_input(hidden), rope);
    if (rank_heads) {
      const Tensor parts = rows_of(mix);
      std::vector<double> groups;
      Tensor group;
      for (std::int64_t h = 0; h < heads; ++h) {
        const Tensor added = torch::matmul(parts.narrow(1, h * width, width), o.narrow(1, h * width, width).t());
        out.push_back(added.square().sum(torch::kDouble).item<double>());
        group = h % (heads / kv) == 0 ? added : group + added;
        if ((h + 1) % (heads / kv) == 0) groups.push_back(group.square().sum(torch::kDouble).item<double>());
      }
      out.insert(out.end(), groups.begin(), groups.end());
    }
    const Tensor middle = whole->attention_output(hidden, mix);
    const Tensor before_mlp = whole->parallel_residual() ? hidden : middle;
    const Tensor normed = whole->mlp_input(before_mlp);
    Tensor mlp_mix;
    if (rank_neurons || rank_experts || (narrower && config.post_norms)) {
      if (experts == 0) {
        mlp_mix = whole->mlp_mix(normed);
        const Tensor energy = rows_of(mlp_mix).square().sum(0, false, torch::kDouble).cpu();
        out.insert(out.end(), energy.data_ptr<double>(), energy.data_ptr<double>() + inner);
      } else {
        const Tensor shares = whole->expert_shares(normed), x = rows_of(normed);
        for (std::int64_t e = 0; e < experts; ++e) {
          const Tensor share = shares.select(1, e), rows = share.nonzero().squeeze(1);
          const Tensor mine = whole->expert_mix(x.index_select(0, rows), e) *
                              share.index_select(0, rows).unsqueeze(1);
          const Tensor energy = mine.square().sum(0, false, torch::kDouble).cpu();
          out.insert(out.end(), energy.data_ptr<double>(), energy.data_ptr<double>() + inner);
          out.push_back(torch::matmul(mine, expert_weight(e).t()).square().sum(torch::kDouble).item<double>());
        }
      }
    }
    if (narrower) {
      out.push_back(norm_narrowing(config, hidden, channels));
      out.push_back(norm_narrowing(config, before_mlp, channels));
      if (config.post_norms) {
        out.push_back(norm_narrowing(config, linear(mix, o, o_bias), channels));
        out.push_back(norm_narrowing(config, linear(mlp_mix, whole->weight("mlp.down_proj"), down_bias), channels));
      }
    }
    return out;
  });
  auto at = sums.begin();
  const auto take = [&](std::int64_t count) {
    std::vector<double> part(at, at + count);
    at += count;
    return part;
  };
  // sum_j over the rows of the linear that reads them: |W_:j|^2
  const auto times_columns = [](std::vector<double> energy, const Tensor& weight) {
    const Tensor squares = weight.detach().square().sum(0, false, torch::kDouble).cpu();
    for (std::size_t j = 0; j < energy.size(); ++j) energy[j] *= squares.data_ptr<double>()[j];
    return energy;
  };
  if (rank_heads) {
    result.heads = take(heads);
    result.kv_heads = take(kv);
  }
  if (rank_neurons || rank_experts || (narrower && config.post_norms)) {
    Importance found;
    if (experts == 0) found.neurons.push_back(times_columns(take(inner), whole->weight("mlp.down_proj")));
    for (std::int64_t e = 0; e < experts; ++e) {
      found.neurons.push_back(times_columns(take(inner), expert_weight(e)));
      found.experts.push_back(take(1)[0]);
    }
    if (ranked) {
      result.neurons = std::move(found.neurons);
      result.experts = std::move(found.experts);
    }
  }
  if (narrower) {
    const auto ratio = [&] { return take(1)[0] / static_cast<double>(job.windows.count); };
    result.norms["input_layernorm"] = ratio();
    result.norms[config.post_norms ? "pre_feedforward_layernorm" : "post_attention_layernorm"] = ratio();
    if (config.post_norms) {
      result.norms["post_attention_layernorm"] = ratio();
      result.norms["post_feedforward_layernorm"] = ratio();
    }
  }
  return result;
}

BlockCut choose_parts(const ModelConfig& config, const Shape& shape, const Importance& importance) {
  const auto pick = [](const std::vector<double>& values, std::int64_t count, std::int64_t keep) {
    return keep == count ? all_of(count) : most_important(values, keep);
  };
  BlockCut cut;
  cut.kv_heads = pick(importance.kv_heads, config.num_kv_heads, shape.kv_heads);
  const std::int64_t group = config.num_heads / config.num_kv_heads, left = shape.heads / shape.kv_heads;
  for (const std::int64_t kv : cut.kv_heads) {
    const auto first = importance.heads.begin() + (left < group ? kv * group : 0);
    for (const std::int64_t h : left < group ? most_important({first, first + group}, left) : all_of(group))
      cut.heads.push_back(kv * group + h);
  }
  if (config.has_experts()) cut.experts = pick(importance.experts, config.experts.count, shape.experts);
  const Kept one = {0};
  for (const std::int64_t e : config.has_experts() ? cut.experts : one)
    cut.neurons.push_back(shape.ffn == config.intermediate_size
                              ? all_of(shape.ffn)
                              : most_important(importance.neurons[static_cast<std::size_t>(e)], shape.ffn));
  return cut;
}

}  // namespace pare
