// The plain forward pass: weights as views into the compact file, scratch memory, and one parallel region per batch.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "core/compact.h"
#include "core/config.h"
#include "runtime/kernels.h"

namespace pare {

// 64-byte aligned floats, grown without keeping the content.
class FloatBuffer {
 public:
  float* data() { return data_.get(); }
  const float* data() const { return data_.get(); }
  void reserve(std::int64_t count);
  std::int64_t size() const { return size_; }

 private:
  struct Free {
    void operator()(float* p) const;
  };
  std::unique_ptr<float[], Free> data_;
  std::int64_t size_ = 0;
};

struct LinearWeights {
  PackedMatrix matrix;
  const float* bias = nullptr;
};

struct BlockWeights {
  LinearWeights q, k, v, o, gate, up, down;
  const float *attention_norm = nullptr, *mlp_norm = nullptr;
};

// Views only: the file must outlive them.
struct Weights {
  PackedMatrix embedding, head;
  std::vector<BlockWeights> blocks;
  const float* final_norm = nullptr;
};
// Errors: exit 3 for a tensor that is missing, mis-shaped or in a codec that its role does not allow.
Weights view_weights(const CompactFile& file);

// Keys and values of one sequence, float32, in pages of kPage positions that are never moved or copied.
// Page of one block: [kv head][head_dim][kPage] keys, then [kv head][kPage][value_width()] values.
class KvCache {
 public:
  KvCache(const ModelConfig& config);
  void reserve(std::int64_t positions);
  float* keys(std::int64_t block, std::int64_t page, std::int64_t kv_head);
  float* values(std::int64_t block, std::int64_t page, std::int64_t kv_head);
  std::int64_t value_width() const { return value_width_; }  // head_dim rounded up to 16
  std::uint64_t bytes() const;

 private:
  std::int64_t blocks_, kv_heads_, head_dim_, value_width_;
  std::vector<FloatBuffer> pages_;  // [page][block]
};

// Waits for a few microseconds, then sleeps: where other programs want the cores too, a thread that spins for its
// partner takes away the time that the partner needs.
class TeamBarrier {
 public:
  void wait(int threads);

 private:
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<std::uint32_t> phase_{0};
};

// Chooses between one thread and the whole team for calls of about the same size. Waking and waiting cost
// microseconds, so tiny calls stay alone; and where other programs hold the cores, a team waits at every barrier for
// the thread that was put aside, which can cost far more than a second thread brings. So both ways are timed, the
// faster one is used, and the other is tried again now and then. The bits are the same either way.
class TeamChoice {
 public:
  // products: multiplications and additions between two barriers.
  int threads(std::int64_t products, int most) const;
  void record(std::int64_t products, int threads, double seconds);

 private:
  struct Pace {
    double seconds[2] = {0, 0};  // a product: alone, as a team; 0: not known
    int calls = 0;
    int until_trial = 0;  // calls before the slower way is timed again
  };
  static constexpr int kFirstCalls = 6;  // taken in turn; the best of each counts, as the first may read from disk
  static std::size_t size_class(std::int64_t products);
  Pace paces_[64];
};

class Forward {
 public:
  static constexpr std::int64_t kBatch = 20 * kActTile;  // tokens a call at most

  Forward(const ModelConfig& config, const Weights& weights, const Kernels& kernels, int threads,
          bool int8_activations);

  // Embeds `ids` (count <= kBatch) at positions [position, position + count) and runs all blocks; writes the residual
  // stream after the last block to hidden [count, hidden_size].
  void run(std::span<const std::int32_t> ids, std::int64_t position, KvCache& cache, float* hidden);
  // Final norm and head: hidden [count, hidden_size] -> out [count, vocab_size]; any count.
  void head(const float* hidden, std::int64_t count, float* out);

 private:
  struct Input;
  struct Output;
  struct Worker;
  struct alignas(64) Counter {
    std::atomic<std::int64_t> next{0};
  };
  struct Scratch {
    FloatBuffer panel, scores, accumulator, normed;
    Int8Activations int8;
  };

  void begin(std::int64_t stages, std::int64_t tokens);

  const ModelConfig& config_;
  const Weights& weights_;
  const Kernels& kernels_;
  int threads_;
  bool int8_;
  std::int64_t q_width_, kv_width_, widest_;
  std::vector<double> frequencies_;
  std::vector<Counter> counters_;
  TeamBarrier barrier_;
  TeamChoice block_team_, head_team_;
  std::vector<Scratch> scratch_;  // one a thread
  FloatBuffer normed_, q_, k_, v_, mixed_, gate_, up_, cos_, sin_;
  Int8Activations int8_input_;
};

}  // namespace pare
