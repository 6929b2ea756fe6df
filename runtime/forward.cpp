#include "runtime/forward.h"

#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>

#include "core/error.h"

namespace pare {

void FloatBuffer::Free::operator()(float* p) const {
  std::free(p);
}

void FloatBuffer::reserve(std::int64_t count) {
  if (count <= size_) return;
  const auto bytes = static_cast<std::size_t>(round_up(count * 4, 64));
  // Large pages: what is read once a token comes twice as fast (measured). Only whole ones, so that no more is used.
  constexpr std::size_t kLargePage = std::size_t{2} << 20;
  const std::size_t alignment = bytes >= kLargePage ? kLargePage : 64;
  auto* p = static_cast<float*>(std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment));
  if (p == nullptr) throw std::bad_alloc();
  if (bytes >= kLargePage) ::madvise(p, bytes / kLargePage * kLargePage, MADV_HUGEPAGE);
  std::memset(p, 0, bytes);
  data_.reset(p);
  size_ = count;
}

namespace {

double seconds_since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

// Row blocks an item: about four items a thread, or as many of each part of the tokens; with many tokens few enough that
// their codes stay in cache while the activation tiles pass by.
std::int64_t blocks_per_item(std::int64_t blocks, std::int64_t tokens, int threads) {
  const std::int64_t wanted = (blocks + 4 * threads - 1) / (4 * threads);
  return std::clamp<std::int64_t>(wanted, 1, tokens > kActTile ? 8 : 64);
}

constexpr std::int64_t kPartTokens = 2 * Forward::kTiles;  // a thread on average at least, where tokens are parted
static_assert(Forward::kTiles % kActTile == 0);

}  // namespace

// One stage's activations in the forms its matrices want.
struct Forward::Input {
  const float* x = nullptr;
  std::int64_t ldx = 0;
  const Int8Activations* int8 = nullptr;
  const Int8Activations* token_int8 = nullptr;  // for codecs with int8_inputs, whatever the engine was asked for
};

struct Forward::Output {
  const LinearWeights* linear;
  float* out;
  std::int64_t ldo;
  bool add;  // residual connection
};

Forward::Forward(const ModelConfig& config, const Weights& weights, const Kernels& kernels, int threads,
                 bool int8_activations)
    : config_(config),
      weights_(weights),
      kernels_(kernels),
      threads_(threads),
      int8_(int8_activations),
      q_width_(config.num_heads * config.head_dim),
      kv_width_(config.num_kv_heads * config.head_dim),
      widest_(std::max({config.hidden_size, config.intermediate_size, config.num_heads * config.head_dim})),
      score_scale_(config.attention_scale > 0 ? static_cast<float>(config.attention_scale)
                                              : 1.0f / std::sqrt(static_cast<float>(config.head_dim))),
      scratch_(static_cast<std::size_t>(threads)),
      routes_(static_cast<std::size_t>(config.experts.count)) {
  for (int layer = 0; layer < config.num_layers; ++layer) {
    const RopeKind kind = config.rope_kind(layer);
    if (std::find(rope_kinds_.begin(), rope_kinds_.end(), kind) == rope_kinds_.end()) rope_kinds_.push_back(kind);
    frequencies_[static_cast<std::size_t>(kind)] = rope_frequencies(config, kind);
  }
  for (Scratch& s : scratch_) {
    s.panel.reserve(kBlockRows * round_up(widest_, 16));
    s.attention.reserve(config.head_dim);
    s.normed.reserve(kActTile * widest_);
    s.int8.resize(kActTile, widest_);
    s.token_int8.resize(kActTile, widest_, Int8Activations::Form::kToken);
  }
  const auto meet = [&](const PackedMatrix& w) {
    if (w.codec.int8_inputs) token_width_ = std::max(token_width_, w.cols);
    else if (int8_ && !w.codec.is_float()) group_width_ = std::max(group_width_, w.cols);
  };
  const auto meet_mlp = [&](const MlpWeights& mlp) {
    for (const LinearWeights* w : {&mlp.gate, &mlp.up, &mlp.down}) meet(w->matrix);
    if (config.gated_mlp) most_up_ = std::max(most_up_, mlp.up.matrix.rows);
  };
  const auto count = [&](const LinearWeights& linear) {
    const PackedMatrix& w = linear.matrix;
    weight_bytes_ += w.rows * w.cols * w.codec.bits() / 8;
    product_floats_ += w.rows + w.cols;
  };
  for (const BlockWeights& b : weights.blocks) {
    for (const LinearWeights* w : {&b.q, &b.k, &b.v, &b.o}) meet(w->matrix);
    meet_mlp(b.mlp);
    for (const MlpWeights& expert : b.experts) meet_mlp(expert);
    const MlpWeights& mlp = b.experts.empty() ? b.mlp : b.experts.front();
    for (const LinearWeights* w : {&b.q, &b.k, &b.v, &b.o, &mlp.gate, &mlp.up, &mlp.down}) count(*w);
  }
  meet(weights.head);
}

void Forward::begin(std::int64_t stages, std::int64_t tokens) {
  stage_counters_ = tokens < kPartTokens ? 1 : tokens / kPartTokens;
  const std::int64_t counters = stages * stage_counters_;
  if (static_cast<std::int64_t>(counters_.size()) < counters)
    counters_ = std::vector<Counter>(static_cast<std::size_t>(counters));
  for (std::int64_t i = 0; i < counters; ++i)
    counters_[static_cast<std::size_t>(i)].next.store(0, std::memory_order_relaxed);
  if (tokens > kActTile) {
    normed_.reserve(tokens * widest_);
    if (group_width_ > 0) int8_input_.resize(tokens, group_width_);
    if (token_width_ > 0) token_int8_input_.resize(tokens, token_width_, Int8Activations::Form::kToken);
  }
}

std::int64_t Forward::up_floats(std::int64_t tokens, int threads) const {
  const std::int64_t blocks = 2 * ((most_up_ + kBlockRows - 1) / kBlockRows);
  const auto floats = [&](std::int64_t count) {
    return count * std::min(most_up_, blocks_per_item(blocks, count, threads) * kBlockRows);
  };
  return std::max(floats(tokens), floats(std::min(tokens, kActTile)));  // an expert may have fewer
}

void Forward::run_kernels(int threads, std::int64_t tokens, const std::function<void(int, int)>& work) {
  item_threads_ = threads;
  if (kernels_.reserve == nullptr || tokens <= kActTile || group_width_ + token_width_ == 0)
    return run_team(threads, work);
  std::atomic<bool> missing{false};
  run_team(threads, [&](int thread, int team) {
    if (!kernels_.reserve(tokens, group_width_, token_width_)) missing.store(true, std::memory_order_relaxed);
    barrier_.wait(team);
    if (!missing.load(std::memory_order_relaxed)) work(thread, team);
  });
  if (missing.load(std::memory_order_relaxed)) throw std::bad_alloc();
}

// What one thread of the team does. Every thread runs the same stages in the same order; within a stage, items are
// claimed from a shared counter. Which thread computes an item never changes its bits.
struct Forward::Worker {
  Forward& f;
  Scratch& mine;
  std::int64_t tokens;
  int thread, threads;  // of this team
  bool may_part;        // whether activations stay with a thread from stage to stage
  std::int64_t stage = 0;

  template <class Item>
  void share(std::int64_t items, Item item) {
    claim(0, items, item);
    ++stage;
  }

  template <class Item>
  void claim(std::int64_t part, std::int64_t items, Item item) {
    std::atomic<std::int64_t>& next = f.counters_[static_cast<std::size_t>(stage * f.stage_counters_ + part)].next;
    for (std::int64_t i = next.fetch_add(1, std::memory_order_relaxed); i < items;
         i = next.fetch_add(1, std::memory_order_relaxed)) {
      item(i);
    }
  }

  // Enough tokens are parted among the threads: a thread takes the items of its own part first, whose activations its
  // caches hold from the stage before, and then helps with the others. Every thread reads all weights then: not where
  // these are more than the activations, which else come from another thread's cache.
  std::int64_t parts() const {
    const std::int64_t activation_bytes = tokens * f.product_floats_ * static_cast<std::int64_t>(sizeof(float));
    return may_part && tokens >= threads * kPartTokens && f.weight_bytes_ <= activation_bytes ? threads : 1;
  }
  // [first, last) of a part's tokens: whole tiles, but for the last one.
  std::pair<std::int64_t, std::int64_t> tokens_of(std::int64_t part) const {
    const auto begin = [&](std::int64_t p) {
      return p == parts() ? tokens : (tokens * p / parts() + kTiles / 2) / kTiles * kTiles;
    };
    return {begin(part), begin(part + 1)};
  }
  // item(first token, last token, number) for every number below items(first, last) in every part. Takes one stage.
  template <class Items, class Item>
  void share_parts(Items items, Item item) {
    for (std::int64_t p = 0; p < parts(); ++p) {
      const auto [first, last] = tokens_of((thread + p) % parts());
      claim((thread + p) % parts(), items(first, last),
            [&, first = first, last = last](std::int64_t i) { item(first, last, i); });
    }
    ++stage;
  }

  void barrier() { f.barrier_.wait(threads); }

  // RMSNorm, or of the differences from their mean, which is LayerNorm.
  void normalize(const float* x, const NormWeights& norm, std::int64_t n, float* out) const {
    const auto eps = static_cast<float>(f.config_.rms_norm_eps);
    if (norm.bias == nullptr) return f.kernels_.rms_norm(x, norm.weight, eps, n, out);
    constexpr std::int64_t kLanes = 16;
    float sums[kLanes] = {};
    for (std::int64_t i = 0; i < n / kLanes * kLanes; i += kLanes)
      for (std::int64_t k = 0; k < kLanes; ++k) sums[k] += x[i + k];
    for (std::int64_t i = n / kLanes * kLanes; i < n; ++i) sums[i % kLanes] += x[i];
    double sum = 0;
    for (const float part : sums) sum += static_cast<double>(part);
    const auto mean = static_cast<float>(sum / static_cast<double>(n));
    for (std::int64_t i = 0; i < n; ++i) out[i] = x[i] - mean;
    f.kernels_.rms_norm(out, norm.weight, eps, n, out);
    for (std::int64_t i = 0; i < n; ++i) out[i] += norm.bias[i];
  }

  // Which roundings of an input its matrices read.
  struct Forms {
    bool group = false, token = false;
    bool any() const { return group || token; }
  };
  Forms forms(std::initializer_list<const LinearWeights*> linears) const {
    Forms wanted;
    for (const LinearWeights* w : linears) {
      const Codec& codec = w->matrix.codec;
      if (codec.int8_inputs) wanted.token = true;
      else if (f.int8_ && !codec.is_float()) wanted.group = true;
    }
    return wanted;
  }

  // Normalizes (with a norm) and quantizes [tokens, cols] once for all matrices that read it. Up to one tile of
  // tokens every thread does it for itself, which is cheaper than waiting for another. Takes one stage.
  Input prepare(const float* x, std::int64_t cols, const NormWeights& norm, Forms wanted) {
    constexpr auto kToken = Int8Activations::Form::kToken;
    Input input{x, cols, nullptr, nullptr};
    const bool normed_first = norm.weight != nullptr;
    const bool alone = tokens <= kActTile;
    float* normed = alone ? mine.normed.data() : f.normed_.data();
    Int8Activations& to = alone ? mine.int8 : f.int8_input_;
    Int8Activations& token_to = alone ? mine.token_int8 : f.token_int8_input_;
    const auto resize = [&] {
      if (wanted.group) to.resize(tokens, cols);
      if (wanted.token) token_to.resize(tokens, cols, kToken);
    };
    const auto tile = [&](std::int64_t i) {
      if (normed_first) {
        for (std::int64_t t = i * kActTile; t < std::min(tokens, (i + 1) * kActTile); ++t)
          normalize(x + t * cols, norm, cols, normed + t * cols);
      }
      if (wanted.group) f.kernels_.quantize_tile(normed_first ? normed : x, cols, i, to);
      if (wanted.token) f.kernels_.quantize_tile(normed_first ? normed : x, cols, i, token_to);
    };
    if (alone) {
      ++stage;
      resize();
      tile(0);
    } else if (normed_first || wanted.any()) {
      if (wanted.any()) {
        if (thread == 0) resize();
        barrier();
      }
      share_parts([](std::int64_t first, std::int64_t last) { return (last - first + kActTile - 1) / kActTile; },
                  [&](std::int64_t first, std::int64_t, std::int64_t i) { tile(first / kActTile + i); });
      barrier();
    } else {
      ++stage;
    }
    if (normed_first) input.x = normed;
    if (wanted.group) input.int8 = &to;
    if (wanted.token) input.token_int8 = &token_to;
    return input;
  }

  // Tokens [first, last), where first begins a tile.
  void rows(const Output& to, const Input& input, std::int64_t first, std::int64_t last, std::int64_t block_begin,
            std::int64_t block_end) {
    const PackedMatrix& w = to.linear->matrix;
    const Int8Activations* int8 = w.codec.int8_inputs ? input.token_int8 : input.int8;
    if (w.codec.int8_inputs || (int8 != nullptr && !w.codec.is_float())) {
      f.kernels_.matmul_int8(w, *int8, first / kActTile, (last + kActTile - 1) / kActTile, block_begin, block_end, to.out,
                             to.ldo, to.add);
    } else {
      f.kernels_.matmul_float(w, input.x + first * input.ldx, input.ldx, last - first, block_begin, block_end,
                              to.out + first * to.ldo, to.ldo, to.add, mine.panel.data());
    }
    if (const float* bias = to.linear->bias; bias != nullptr) {
      const std::int64_t end = std::min(block_end * kBlockRows, w.rows);
      for (std::int64_t t = first; t < last; ++t) {
        for (std::int64_t r = block_begin * kBlockRows; r < end; ++r) to.out[t * to.ldo + r] += bias[r];
      }
    }
  }

  std::int64_t step(std::int64_t blocks) const { return blocks_per_item(blocks, tokens, f.item_threads_); }

  // All outputs share the input. Takes one stage and ends with a barrier.
  void multiply(const Input& input, std::initializer_list<Output> outputs) {
    std::int64_t blocks = 0, items = 0;
    for (const Output& to : outputs) blocks += to.linear->matrix.row_blocks();
    const std::int64_t step = this->step(blocks);
    for (const Output& to : outputs) items += (to.linear->matrix.row_blocks() + step - 1) / step;
    share_parts([&](std::int64_t, std::int64_t) { return items; },
                [&](std::int64_t first, std::int64_t last, std::int64_t i) {
                  for (const Output& to : outputs) {
                    const std::int64_t count = to.linear->matrix.row_blocks();
                    const std::int64_t own = (count + step - 1) / step;
                    if (i < own) return rows(to, input, first, last, i * step, std::min(count, (i + 1) * step));
                    i -= own;
                  }
                });
    barrier();
  }

  // work(first token, last token, first row block, last row block). Takes one stage.
  template <class Work>
  void each_step(std::int64_t blocks, std::int64_t step, Work work) {
    share_parts([&](std::int64_t, std::int64_t) { return (blocks + step - 1) / step; },
                [&](std::int64_t first, std::int64_t last, std::int64_t i) {
                  work(first, last, i * step, std::min(blocks, (i + 1) * step));
                });
  }

  // The input of down, in gate_.
  void gate_up(const Input& input, const MlpWeights& mlp) {
    if (!f.config_.gated_mlp) return up_alone(input, mlp.up);
    const std::int64_t blocks = mlp.gate.matrix.row_blocks(), width = mlp.gate.matrix.rows;
    const std::int64_t step = this->step(2 * blocks);
    const auto activate = f.config_.activation == Activation::kSilu ? f.kernels_.silu_mul : f.kernels_.gelu_mul;
    each_step(blocks, step, [&](std::int64_t first, std::int64_t last, std::int64_t begin, std::int64_t end) {
      rows({&mlp.gate, f.gate_.data(), width, false}, input, first, last, begin, end);
      const std::int64_t row = begin * kBlockRows, count = std::min(end * kBlockRows, width) - row;
      const LinearWeights up = {rows_from(mlp.up.matrix, begin), mlp.up.bias ? mlp.up.bias + row : nullptr};
      rows({&up, mine.up.data(), count, false}, input, first, last, 0, end - begin);
      for (std::int64_t t = first; t < last; ++t)
        activate(f.gate_.data() + t * width + row, mine.up.data() + t * count, count);
    });
    barrier();
  }

  void up_alone(const Input& input, const LinearWeights& up) {
    const std::int64_t blocks = up.matrix.row_blocks(), width = up.matrix.rows;
    const std::int64_t step = this->step(blocks);
    const auto activate = f.config_.activation == Activation::kGelu ? f.kernels_.gelu : f.kernels_.gelu_tanh;
    each_step(blocks, step, [&](std::int64_t first, std::int64_t last, std::int64_t begin, std::int64_t end) {
      rows({&up, f.gate_.data(), width, false}, input, first, last, begin, end);
      const std::int64_t row = begin * kBlockRows, count = std::min(end * kBlockRows, width) - row;
      for (std::int64_t t = first; t < last; ++t) activate(f.gate_.data() + t * width + row, count);
    });
    barrier();
  }

  // Normalizes q and k of rows [first, end) where the model does, rotates them in place (q times the factor of the
  // scores) and stores k and v in the cache: of one kv head and the heads that read it.
  void rotate_and_store(std::int64_t block, std::int64_t kv_head, std::int64_t first, std::int64_t end) {
    const BlockWeights& b = f.weights_.blocks[static_cast<std::size_t>(block)];
    const std::int64_t d = f.config_.head_dim, half = f.config_.rotated() / 2;
    const BlockWidths widths = f.config_.widths(static_cast<int>(block));
    const std::int64_t repeat = widths.heads / widths.kv_heads, q_width = widths.heads * d, kv_width = widths.kv_heads * d;
    const auto eps = static_cast<float>(f.config_.rms_norm_eps);
    const auto kind = static_cast<std::size_t>(f.config_.rope_kind(static_cast<int>(block)));
    for (std::int64_t t = first; t < end; ++t) {
      const float* cosine = f.cos_[kind].data() + t * half;
      const float* sine = f.sin_[kind].data() + t * half;
      for (std::int64_t head = kv_head * repeat; head < (kv_head + 1) * repeat; ++head) {
        float* q = f.q_.data() + t * q_width + head * d;
        if (b.q_norm != nullptr) f.kernels_.rms_norm(q, b.q_norm, eps, d, q);
        f.kernels_.attention->rotate(q, cosine, sine, half, d, f.score_scale_);
      }
      float* k = f.k_.data() + t * kv_width + kv_head * d;
      if (b.k_norm != nullptr) f.kernels_.rms_norm(k, b.k_norm, eps, d, k);
      f.kernels_.attention->rotate(k, cosine, sine, half, d, 1.0f);
      const Row& row = f.rows_[static_cast<std::size_t>(t)];
      const float* v = f.v_.data() + t * kv_width + kv_head * d;
      row.cache->store(*f.kernels_.attention, block, row.position, kv_head, k, v);
    }
  }

  // The heads of row t that read kv_head.
  void attend_heads(std::int64_t block, std::int64_t t, std::int64_t kv_head) {
    const BlockWidths widths = f.config_.widths(static_cast<int>(block));
    const std::int64_t d = f.config_.head_dim, repeat = widths.heads / widths.kv_heads;
    const Row& row = f.rows_[static_cast<std::size_t>(t)];
    for (std::int64_t r = 0; r < repeat; r += kMaxQueries) {
      const std::int64_t at = t * widths.heads * d + (kv_head * repeat + r) * d;
      const std::int64_t count = std::min(kMaxQueries, repeat - r);
      const QueryRows rows{f.q_.data() + at, f.mixed_.data() + at, d, count, row.position + 1, 0};
      attend_rows(f.kernels_, f.config_, *row.cache, block, kv_head, rows, mine.attention);
    }
  }

  // Takes q, k and v to mixed_.
  void attend(std::int64_t block) {
    const BlockWidths widths = f.config_.widths(static_cast<int>(block));
    const std::int64_t d = f.config_.head_dim, kv_heads = widths.kv_heads, width = widths.heads * d;
    if (const auto sequences = static_cast<std::int64_t>(f.starts_.size()) - 1; sequences > 1) {
      share(sequences * kv_heads, [&](std::int64_t item) {  // with keys of their own: nothing to wait for
        const auto sequence = static_cast<std::size_t>(item / kv_heads);
        const std::int64_t first = f.starts_[sequence], end = f.starts_[sequence + 1];
        rotate_and_store(block, item % kv_heads, first, end);
        for (std::int64_t t = first; t < end; ++t) attend_heads(block, t, item % kv_heads);
      });
    } else if (tokens < 8) {  // nor has a kv head to wait for another one
      share(kv_heads, [&](std::int64_t kv_head) {
        rotate_and_store(block, kv_head, 0, tokens);
        for (std::int64_t t = 0; t < tokens; ++t) attend_heads(block, t, kv_head);
      });
    } else {  // an item: consecutive tokens of some heads that read one kv head; those that see most first
      constexpr std::int64_t kChunk = 32;  // positions whose halves share a cache line of keys
      share((tokens + kChunk - 1) / kChunk * kv_heads, [&](std::int64_t item) {
        const std::int64_t first = item / kv_heads * kChunk;
        rotate_and_store(block, item % kv_heads, first, std::min(tokens, first + kChunk));
      });
      barrier();
      const Row& begin = f.rows_.front();
      const std::int64_t repeat = widths.heads / kv_heads;
      const auto pieces = [](std::int64_t all, std::int64_t each) { return (all + each - 1) / each; };
      // Large items read keys and values less often; enough of them keep all threads busy.
      std::int64_t together = kMostRowTokens, heads = std::min(kRowHeads, repeat);
      const auto items = [&] { return pieces(tokens, together) * pieces(repeat, heads) * kv_heads; };
      while (together > kRowTokens && items() < 4 * f.item_threads_) together -= kRowTokens;
      while (heads > 1 && items() < 4 * f.item_threads_) --heads;
      const std::int64_t chunks = pieces(tokens, together), parts = pieces(repeat, heads);
      share(items(), [&](std::int64_t item) {
        const std::int64_t kv_head = item / parts % kv_heads, head = item % parts * heads;
        const std::int64_t t = (chunks - 1 - item / parts / kv_heads) * together;
        const std::int64_t at = t * width + (kv_head * repeat + head) * d;
        const QueryRows rows{f.q_.data() + at, f.mixed_.data() + at, width, std::min(together, tokens - t),
                             begin.position + t + 1, 1, std::min(heads, repeat - head), d};
        attend_rows(f.kernels_, f.config_, *begin.cache, block, kv_head, rows, mine.attention);
      });
    }
    barrier();
  }

  void block(std::int64_t index, float* hidden) {
    const BlockWeights& b = f.weights_.blocks[static_cast<std::size_t>(index)];
    const std::int64_t h = f.config_.hidden_size, q_width = b.q.matrix.rows;
    Input in = prepare(hidden, h, b.attention_norm, forms({&b.q, &b.k, &b.v}));
    multiply(in, {{&b.q, f.q_.data(), q_width, false},
                  {&b.k, f.k_.data(), b.k.matrix.rows, false},
                  {&b.v, f.v_.data(), b.v.matrix.rows, false}});
    attend(index);
    const auto add_attention = [&] {
      in = prepare(f.mixed_.data(), q_width, {}, forms({&b.o}));
      multiply_into(hidden, in, b.o, b.post_attention_norm);
    };
    if (!f.config_.parallel_residual) add_attention();
    if (!b.experts.empty()) return run_experts(b, hidden);
    in = prepare(hidden, h, b.mlp_norm, forms({&b.mlp.gate, &b.mlp.up}));
    gate_up(in, b.mlp);
    if (f.config_.parallel_residual) add_attention();
    in = prepare(f.gate_.data(), b.mlp.down.matrix.cols, {}, forms({&b.mlp.down}));
    multiply_into(hidden, in, b.mlp.down, b.post_mlp_norm);
  }

  // hidden += linear(input), or its norm. Takes one or two stages.
  void multiply_into(float* hidden, const Input& input, const LinearWeights& linear,
                     const NormWeights& post_norm) {
    const std::int64_t h = f.config_.hidden_size;
    if (post_norm.weight == nullptr) return multiply(input, {{&linear, hidden, h, true}});
    multiply(input, {{&linear, f.added_.data(), h, false}});
    share(tokens, [&](std::int64_t t) {
      float* row = f.added_.data() + t * h;
      normalize(row, post_norm, h, row);
      for (std::int64_t i = 0; i < h; ++i) hidden[t * h + i] += row[i];
    });
    barrier();
  }

  // hidden += the chosen experts of norm(hidden), in the order of their numbers for every token. The barriers inside
  // gate_up keep one expert's sums apart from the next one's buffers.
  void run_experts(const BlockWeights& b, float* hidden) {
    const std::int64_t h = f.config_.hidden_size, inner = f.config_.intermediate_size;
    const Input in = prepare(hidden, h, b.mlp_norm, Forms{});
    multiply(in, {{&b.router, f.router_.data(), f.config_.experts.count, false}});
    share(1, [&](std::int64_t) { f.route(tokens); });
    barrier();
    for (std::size_t e = 0; e < b.experts.size(); ++e) {
      const Route& route = f.routes_[e];
      if (route.tokens.empty()) continue;
      const MlpWeights& mlp = b.experts[e];
      const auto own = static_cast<std::int64_t>(route.tokens.size());
      const float* x = in.x;
      if (own < tokens) {
        share(own, [&](std::int64_t i) {
          std::copy_n(in.x + route.tokens[static_cast<std::size_t>(i)] * h, h, f.expert_in_.data() + i * h);
        });
        barrier();
        x = f.expert_in_.data();
      }
      Worker part{f, mine, own, thread, threads, may_part, stage};
      Input inputs = part.prepare(x, h, {}, forms({&mlp.gate, &mlp.up}));
      part.gate_up(inputs, mlp);
      inputs = part.prepare(f.gate_.data(), inner, {}, forms({&mlp.down}));
      part.multiply(inputs, {{&mlp.down, f.added_.data(), h, false}});
      part.share(own, [&](std::int64_t i) {
        const float weight = route.weights[static_cast<std::size_t>(i)];
        float* to = hidden + route.tokens[static_cast<std::size_t>(i)] * h;
        for (std::int64_t j = 0; j < h; ++j) to[j] += weight * f.added_.data()[i * h + j];
      });
      stage = part.stage;
    }
    barrier();
  }
};

// Blocks take at most this many stages, and as many more for each expert that has tokens.
constexpr std::int64_t kStagesPerBlock = 12, kStagesPerExpert = 8;

void Forward::route(std::int64_t tokens) {
  const Experts& experts = config_.experts;
  for (Route& route : routes_) {
    route.tokens.clear();
    route.weights.clear();
  }
  for (std::int64_t t = 0; t < tokens; ++t) {
    const float* scores = router_.data() + t * experts.count;
    const float peak = *std::max_element(scores, scores + experts.count);
    float all = 0, chosen = 0;
    for (std::int64_t e = 0; e < experts.count; ++e) {
      const float share = std::exp(scores[e] - peak);
      order_[static_cast<std::size_t>(e)] = {share, e};
      all += share;
    }
    const auto last = order_.begin() + experts.per_token;
    std::partial_sort(order_.begin(), last, order_.end(), [](const auto& a, const auto& b) {
      return a.first != b.first ? a.first > b.first : a.second < b.second;
    });
    for (auto it = order_.begin(); it != last; ++it) chosen += it->first;
    for (auto it = order_.begin(); it != last; ++it) {
      Route& route = routes_[static_cast<std::size_t>(it->second)];
      route.tokens.push_back(t);
      route.weights.push_back(it->first / (experts.renormalize ? chosen : all));
    }
  }
}

void Forward::fill_rope(const Part& part, std::int64_t first_row) {
  if (const bool beyond = rope_beyond(config_, part.sequence); beyond != frequencies_beyond_) {
    for (const RopeKind kind : rope_kinds_)
      frequencies_[static_cast<std::size_t>(kind)] = rope_frequencies(config_, kind, part.sequence);
    frequencies_beyond_ = beyond;
  }
  for (const RopeKind kind : rope_kinds_) {
    const std::vector<double>& frequencies = frequencies_[static_cast<std::size_t>(kind)];
    const double factor = rope_attention_factor(config_, kind);
    const auto half = static_cast<std::int64_t>(frequencies.size());
    float* cosine = cos_[static_cast<std::size_t>(kind)].data() + first_row * half;
    float* sine = sin_[static_cast<std::size_t>(kind)].data() + first_row * half;
    for (std::int64_t t = 0; t < part.count; ++t) {
      for (std::int64_t i = 0; i < half; ++i) {
        // The angle is rounded to float as the models were trained with it (transformers multiplies in float32).
        const float angle =
            static_cast<float>(part.position + t) * static_cast<float>(frequencies[static_cast<std::size_t>(i)]);
        cosine[t * half + i] = static_cast<float>(std::cos(static_cast<double>(angle)) * factor);
        sine[t * half + i] = static_cast<float>(std::sin(static_cast<double>(angle)) * factor);
      }
    }
  }
}

bool Forward::run(std::span<const std::int32_t> ids, std::span<const Part> parts, float* hidden) {
  const auto tokens = static_cast<std::int64_t>(ids.size());
  const Experts& experts = config_.experts;
  const std::int64_t active = std::min(experts.count, tokens * experts.per_token);
  begin(config_.num_layers * (kStagesPerBlock + active * kStagesPerExpert), tokens);
  q_.reserve(tokens * q_width_);
  mixed_.reserve(tokens * q_width_);
  k_.reserve(tokens * kv_width_);
  v_.reserve(tokens * kv_width_);
  gate_.reserve(tokens * config_.intermediate_size);
  if (config_.post_norms || config_.has_experts()) added_.reserve(tokens * config_.hidden_size);
  if (config_.has_experts()) {
    router_.reserve(tokens * experts.count);
    order_.resize(static_cast<std::size_t>(experts.count));
    for (Route& route : routes_) {  // any of them may have all tokens
      route.tokens.reserve(static_cast<std::size_t>(tokens));
      route.weights.reserve(static_cast<std::size_t>(tokens));
    }
    expert_in_.reserve(tokens * config_.hidden_size);
  }
  for (const RopeKind kind : rope_kinds_) {
    const auto k = static_cast<std::size_t>(kind);
    cos_[k].reserve(tokens * static_cast<std::int64_t>(frequencies_[k].size()));
    sin_[k].reserve(tokens * static_cast<std::int64_t>(frequencies_[k].size()));
  }
  rows_.clear();
  starts_.assign(1, 0);
  for (const Part& part : parts) {
    require_positions(config_, part.position + part.count, "runtime");
    part.cache->reserve(part.position + part.count);
    fill_rope(part, static_cast<std::int64_t>(rows_.size()));
    for (std::int64_t t = 0; t < part.count; ++t) rows_.push_back({part.cache, part.position + t});
    starts_.push_back(static_cast<std::int64_t>(rows_.size()));
  }
  const auto scale = static_cast<float>(config_.embedding_scale);
  for (std::int64_t t = 0; t < tokens; ++t) {
    float* row = hidden + t * config_.hidden_size;
    unpack_matrix_row(weights_.embedding, ids[static_cast<std::size_t>(t)], row);
    if (scale != 1)
      for (std::int64_t i = 0; i < config_.hidden_size; ++i) row[i] *= scale;
    if (!config_.learned_positions) continue;
    position_.reserve(config_.hidden_size);
    unpack_matrix_row(weights_.positions, rows_[static_cast<std::size_t>(t)].position, position_.data());
    for (std::int64_t i = 0; i < config_.hidden_size; ++i) row[i] += position_.data()[i];
  }
  const std::int64_t mlps = config_.has_experts() ? experts.per_token : 1;
  const std::int64_t matrices = config_.gated_mlp ? 3 : 2;
  const std::int64_t block_products =
      config_.hidden_size * (2 * q_width_ + 2 * kv_width_ + matrices * mlps * config_.intermediate_size);
  const int threads = block_team_.threads(tokens * block_products / 4, threads_);
  const auto begun = std::chrono::steady_clock::now();
  // The block after which the team leaves. One thread decides when it enters a block; the others look when they have
  // passed the barriers of that block, so that all leave after the same one.
  std::atomic<std::int64_t> last{config_.num_layers};
  if (most_up_ > 0)
    for (int i = 0; i < threads; ++i) scratch_[static_cast<std::size_t>(i)].up.reserve(up_floats(tokens, threads));
  run_kernels(threads, tokens, [&](int thread, int team) {
    Worker worker{*this, scratch_[static_cast<std::size_t>(thread)], tokens, thread, team, true};
    for (std::int64_t i = 0; i < config_.num_layers && i <= last.load(std::memory_order_relaxed); ++i) {
      if (thread == 0 && i < last.load(std::memory_order_relaxed) &&
          std::any_of(parts.begin(), parts.end(), [](const Part& part) { return part.stop && part.stop->load(); }))
        last.store(i, std::memory_order_relaxed);
      worker.block(i, hidden);
    }
  });
  if (last.load(std::memory_order_relaxed) < config_.num_layers) return false;
  block_team_.record(tokens * block_products / 4, threads, seconds_since(begun));
  return true;
}

void Forward::head(const float* hidden, std::int64_t count, float* out) {
  const LinearWeights linear{weights_.head, nullptr};
  for (std::int64_t first = 0; first < count; first += kBatch) {
    const std::int64_t tokens = std::min(kBatch, count - first);
    begin(3, tokens);
    float* to = out + first * config_.vocab_size;
    const std::int64_t products = tokens * config_.hidden_size * config_.vocab_size;
    const int threads = head_team_.threads(products, threads_);
    const auto begun = std::chrono::steady_clock::now();
    run_kernels(threads, tokens, [&](int thread, int team) {
      Worker worker{*this, scratch_[static_cast<std::size_t>(thread)], tokens, thread, team, false};
      const Input in = worker.prepare(hidden + first * config_.hidden_size, config_.hidden_size, weights_.final_norm,
                                      worker.forms({&linear}));
      worker.multiply(in, {{&linear, to, config_.vocab_size, false}});
      if (config_.final_softcap > 0) {
        constexpr std::int64_t kPiece = 4096;
        const std::int64_t count_all = tokens * config_.vocab_size;
        worker.share((count_all + kPiece - 1) / kPiece, [&](std::int64_t i) {
          kernels_.soft_cap(to + i * kPiece, static_cast<float>(config_.final_softcap),
                            std::min(kPiece, count_all - i * kPiece));
        });
      }
    });
    head_team_.record(products, threads, seconds_since(begun));
  }
}

}  // namespace pare
