// The plain forward pass: scratch memory, and one parallel region per batch.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "core/config.h"
#include "runtime/kv_cache.h"
#include "runtime/team.h"
#include "runtime/weights.h"

namespace pare {

class Forward {
 public:
  static constexpr std::int64_t kTiles = 48;             // tokens: whole tiles of all instruction sets, of 12 or of 16
  static constexpr std::int64_t kBatch = 6 * kTiles;     // tokens a call at most
  // Of each call for `count` tokens but the last one: a short rest would fill no tiles and could not be parted.
  static std::int64_t call_size(std::int64_t count) {
    const std::int64_t calls = (count + kBatch - 1) / kBatch;
    return calls < 2 ? count : round_up((count + calls - 1) / calls, kTiles);
  }

  Forward(const ModelConfig& config, const Weights& weights, const Kernels& kernels, int threads,
          bool int8_activations);

  // Tokens of one sequence in a call, at positions [position, position + count). `sequence`: length of the whole one
  // that is being fed; LongRoPE turns all of it by that (rope_beyond), and the cache must be of the same side. `stop`
  // is read before every block.
  struct Part {
    KvCache* cache = nullptr;
    std::int64_t position = 0, count = 0, sequence = 0;
    const std::atomic<bool>* stop = nullptr;
  };
  // Embeds `ids` (kBatch at most), those of the parts one after the other, and runs all blocks; writes the residual
  // stream after the last block to hidden [count, hidden_size]. The bits do not depend on what else is in the call.
  // false: a part's `stop` was found set; `hidden` and what the caches hold of these positions mean nothing.
  bool run(std::span<const std::int32_t> ids, std::span<const Part> parts, float* hidden);
  // Final norm and head: hidden [count, hidden_size] -> out [count, vocab_size]; any count.
  void head(const float* hidden, std::int64_t count, float* out);

 private:
  struct Input;
  struct Output;
  struct Worker;
  struct alignas(64) Counter {
    std::atomic<std::int64_t> next{0};
  };
  struct Row {  // of a call
    KvCache* cache;
    std::int64_t position;
  };
  struct Scratch {
    FloatBuffer panel, normed, up;
    AttentionScratch attention;
    Int8Activations int8, token_int8;
  };

  // What an expert has to do in a call: its tokens, in order, and their weights.
  struct Route {
    std::vector<std::int64_t> tokens;
    std::vector<float> weights;
  };

  void begin(std::int64_t stages, std::int64_t tokens);
  // run_team(), after every thread has what its kernels keep. Error: std::bad_alloc; then no thread did any work.
  void run_kernels(int threads, std::int64_t tokens, const std::function<void(int thread, int threads)>& work);
  std::int64_t up_floats(std::int64_t tokens, int threads) const;  // that a thread has of up beside a gate
  void fill_rope(const Part& part, std::int64_t first_row);
  void route(std::int64_t tokens);

  const ModelConfig& config_;
  const Weights& weights_;
  const Kernels& kernels_;
  int threads_;
  bool int8_;
  std::int64_t q_width_, kv_width_, widest_;
  std::int64_t group_width_ = 0, token_width_ = 0;  // widest input that is rounded in groups, by token; 0: none
  std::int64_t most_up_ = 0;                        // rows of the widest up beside a gate
  // Of all blocks, with one expert each: bytes of weights; inputs and outputs of the products for a token.
  std::int64_t weight_bytes_ = 0, product_floats_ = 0;
  int item_threads_ = 1;                            // asked for in this call: what items are sized for
  float score_scale_;
  std::vector<RopeKind> rope_kinds_;    // those the model has
  std::vector<double> frequencies_[3];  // by RopeKind, [rotated pairs]
  bool frequencies_beyond_ = false;     // for which side of LongRoPE's switch
  std::vector<Counter> counters_;
  std::int64_t stage_counters_ = 1;  // of each stage in this call
  TeamBarrier barrier_;
  TeamChoice block_team_, head_team_;
  std::vector<Scratch> scratch_;  // one a thread
  FloatBuffer normed_, q_, k_, v_, mixed_, gate_, added_, router_, expert_in_, position_;
  FloatBuffer cos_[3], sin_[3];  // by RopeKind: [tokens, rotated pairs]
  std::vector<Row> rows_;
  std::vector<std::int64_t> starts_;  // of the sequences in rows_, and the end
  std::vector<Route> routes_;         // by expert
  std::vector<std::pair<float, std::int64_t>> order_;  // of the experts of a token
  Int8Activations int8_input_, token_int8_input_;
};

}  // namespace pare
