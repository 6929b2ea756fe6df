#include "runtime/kv_cache.h"

#include <algorithm>
#include <cassert>
#include <cmath>
#include <cstring>

namespace pare {

KvCache::KvCache(const ModelConfig& config, KvType type, std::int64_t most_tokens)
    : type_(type),
      head_dim_(config.head_dim),
      value_width_(round_up(config.head_dim, 16)) {
  assert(type != KvType::kBf16);
  const std::int64_t position = (head_dim_ + value_width_) * kv_bytes(type) + (type == KvType::kQ8 ? 8 : 0);
  for (int block = 0; block < config.num_layers; ++block) {
    kv_heads_.push_back(config.widths(block).kv_heads);
    page_floats_.push_back(kv_heads_.back() * kPage * position / 4);
    const std::int64_t window = config.window(block);
    windows_.push_back(window);
    ring_.push_back(window > 0 ? (window + most_tokens + kPage - 1) / kPage + 1 : 0);
  }
  begin_.resize(ring_.size());
  pages_.resize(ring_.size());
}

void KvCache::reserve(std::int64_t positions) {
  const std::int64_t wanted = (positions + kPage - 1) / kPage;
  std::vector<std::size_t> grow;  // blocks, once for each page
  for (std::size_t block = 0; block < pages_.size(); ++block) {
    const std::int64_t most = ring_[block] > 0 ? std::min(wanted, ring_[block]) : wanted;
    for (auto page = static_cast<std::int64_t>(pages_[block].size()); page < most; ++page) grow.push_back(block);
  }
  if (!grow.empty()) {
    FloatBuffer memory;
    std::int64_t floats = 0;
    for (const std::size_t block : grow) floats += page_floats_[block];
    memory.reserve(floats);
    float* at = memory.data();
    memory_.push_back(std::move(memory));
    for (const std::size_t block : grow) {
      pages_[block].push_back(at);
      at += page_floats_[block];
    }
  }
  reached_ = std::max(reached_, positions);
}

bool KvCache::holds(std::int64_t position) const {
  for (std::size_t block = 0; block < ring_.size(); ++block) {
    const std::int64_t pages = (reached_ + kPage - 1) / kPage;
    const std::int64_t oldest = ring_[block] > 0 ? (pages - ring_[block]) * kPage : 0;
    if (first_seen(static_cast<std::int64_t>(block), position) < std::max(oldest, begin_[block])) return false;
  }
  return true;
}

void KvCache::restart() {
  reached_ = 0;
  std::fill(begin_.begin(), begin_.end(), 0);
}

std::int64_t KvCache::first_seen(std::int64_t block, std::int64_t end) const {
  const std::int64_t window = windows_[static_cast<std::size_t>(block)];
  return window > 0 ? std::max<std::int64_t>(0, end + 1 - window) : 0;
}

std::int64_t KvCache::record_bytes(std::int64_t block) const {
  return kv_heads_[static_cast<std::size_t>(block)] * (2 * head_dim_ * kv_bytes(type_) + (type_ == KvType::kQ8 ? 8 : 0));
}

// Calls move(memory, record, bytes) for every run of bytes that lies together.
template <class Move>
void KvCache::each_piece(std::int64_t block, std::int64_t first, std::int64_t count, Move move) {
  const std::int64_t heads = kv_heads_[static_cast<std::size_t>(block)];
  const std::int64_t width = kv_bytes(type_), record = record_bytes(block), own = record / heads;
  for (std::int64_t position = first; position < first + count; ++position) {
    const std::int64_t slot = position % kPage;
    for (std::int64_t head = 0; head < heads; ++head) {
      const KvPlane k = keys(block, position / kPage, head), v = values(block, position / kPage, head);
      std::int64_t at = (position - first) * record + head * own;
      for (std::int64_t i = 0; i < head_dim_; ++i, at += width) move(k.data + (i * kPage + slot) * width, at, width);
      if (v.type == KvType::kBf16) {
        for (std::int64_t i = 0; i < head_dim_; ++i, at += width)
          move(v.data + ((slot / 2 * value_width_ + i) * 2 + slot % 2) * width, at, width);
      } else {
        move(v.data + slot * value_width_ * width, at, head_dim_ * width);
        at += head_dim_ * width;
      }
      if (type_ != KvType::kQ8) continue;
      move(reinterpret_cast<std::byte*>(k.scales + slot), at, std::int64_t{4});
      move(reinterpret_cast<std::byte*>(v.scales + slot), at + 4, std::int64_t{4});
    }
  }
}

void KvCache::copy_out(std::int64_t block, std::int64_t first, std::int64_t count, std::byte* records) {
  each_piece(block, first, count, [&](const std::byte* memory, std::int64_t record, std::int64_t bytes) {
    std::memcpy(records + record, memory, static_cast<std::size_t>(bytes));
  });
}

void KvCache::begin_copy(std::int64_t end) {
  restart();
  reserve(end);
  for (std::size_t b = 0; b < begin_.size(); ++b) {
    const auto block = static_cast<std::int64_t>(b);
    begin_[b] = first_seen(block, end);
    // Attention multiplies what lies before it in the same page by 0, which must be numbers.
    if (begin_[b] < end && begin_[b] % kPage != 0)
      std::memset(page(block, begin_[b] / kPage), 0, static_cast<std::size_t>(page_floats_[b]) * 4);
  }
}

void KvCache::copy_in(std::int64_t block, std::int64_t first, std::int64_t count, const std::byte* records) {
  each_piece(block, first, count, [&](std::byte* memory, std::int64_t record, std::int64_t bytes) {
    std::memcpy(memory, records + record, static_cast<std::size_t>(bytes));
  });
}

std::byte* KvCache::page(std::int64_t block, std::int64_t page) {
  const auto b = static_cast<std::size_t>(block);
  const std::int64_t place = ring_[b] > 0 ? page % ring_[b] : page;
  return reinterpret_cast<std::byte*>(pages_[b][static_cast<std::size_t>(place)]);
}

KvPlane KvCache::keys(std::int64_t block, std::int64_t at, std::int64_t kv_head) {
  const std::int64_t head_bytes = kPage * (head_dim_ + value_width_) * kv_bytes(type_);
  std::byte* data = page(block, at);
  return {type_ == KvType::kMixed ? KvType::kF16 : type_, data + kv_head * head_bytes,
          reinterpret_cast<float*>(data + kv_heads_[static_cast<std::size_t>(block)] * head_bytes) + kv_head * 2 * kPage};
}

KvPlane KvCache::values(std::int64_t block, std::int64_t at, std::int64_t kv_head) {
  KvPlane plane = keys(block, at, kv_head);
  if (type_ == KvType::kMixed) plane.type = KvType::kBf16;
  plane.data += kPage * head_dim_ * kv_bytes(type_);
  plane.scales += kPage;
  return plane;
}

namespace {

template <class T>
void scatter(const void* from, std::int64_t n, std::byte* to, std::int64_t pitch) {
  for (std::int64_t i = 0; i < n; ++i)
    std::memcpy(to + i * pitch, static_cast<const std::byte*>(from) + i * static_cast<std::int64_t>(sizeof(T)), sizeof(T));
}

}  // namespace

void KvCache::store(const AttentionKernels& kernels, std::int64_t block, std::int64_t position, std::int64_t kv_head,
                    const float* key, const float* value) {
  const std::int64_t at = position / kPage, slot = position % kPage, width = kv_bytes(type_);
  const KvPlane k = keys(block, at, kv_head), v = values(block, at, kv_head);
  // Calls put(numbers of x as `type`, the first of them, how many) for pieces of x.
  const auto each_piece_of = [&](const float* x, KvType type, const auto& put) {
    constexpr std::int64_t kMost = 256;
    float narrow[kMost];
    for (std::int64_t first = 0; first < head_dim_; first += kMost) {
      const std::int64_t n = std::min(kMost, head_dim_ - first);
      kernels.narrow(x + first, n, type, reinterpret_cast<std::byte*>(narrow), nullptr);
      put(narrow, first, n);
    }
  };
  if (type_ == KvType::kQ8) {
    thread_local FloatBuffer codes;  // heads wider than `narrow` exist in no known model, but may
    codes.reserve((head_dim_ + 3) / 4);
    kernels.narrow(key, head_dim_, type_, reinterpret_cast<std::byte*>(codes.data()), k.scales + slot);
    scatter<std::int8_t>(codes.data(), head_dim_, k.data + slot, kPage);
  } else {
    each_piece_of(key, k.type, [&](const float* narrow, std::int64_t first, std::int64_t n) {
      std::byte* to = k.data + (first * kPage + slot) * width;
      (type_ == KvType::kF32 ? scatter<float> : scatter<std::uint16_t>)(narrow, n, to, kPage * width);
    });
  }
  if (v.type != KvType::kBf16)
    return kernels.narrow(value, head_dim_, v.type, v.data + slot * value_width_ * width,
                          type_ == KvType::kQ8 ? v.scales + slot : nullptr);
  each_piece_of(value, v.type, [&](const float* narrow, std::int64_t first, std::int64_t n) {
    scatter<std::uint16_t>(narrow, n, v.data + ((slot / 2 * value_width_ + first) * 2 + slot % 2) * width, 2 * width);
  });
}

std::uint64_t KvCache::bytes() const {
  std::uint64_t total = 0;
  for (const FloatBuffer& memory : memory_) total += static_cast<std::uint64_t>(memory.size()) * 4;
  return total;
}

void AttentionScratch::reserve(std::int64_t head_dim) {
  constexpr std::int64_t kRows = kRowHeads * kMostRowTokens;
  static_assert(kRows >= kMaxQueries && kMostRowTokens >= kMaxQueries);  // one token may have as many heads
  queries.reserve(kRows * head_dim);
  scores.reserve(kMaxQueries * kPage);
  accumulator.reserve(kRows * round_up(head_dim, 16));
}

void attend_rows(const Kernels& kernels, const ModelConfig& config, KvCache& cache, std::int64_t block,
                 std::int64_t kv_head, const QueryRows& rows, AttentionScratch& scratch) {
  const AttentionKernels& k = *kernels.attention;
  const std::int64_t d = config.head_dim, width = cache.value_width(), all = rows.heads * rows.count;
  assert(rows.count <= kMostRowTokens && rows.heads <= kRowHeads);
  const std::int64_t window = config.window(static_cast<int>(block));
  const auto cap = static_cast<float>(config.attention_softcap);
  const auto end_of = [&](std::int64_t i) { return rows.seen + i * rows.step; };
  const auto begin_of = [&](std::int64_t i) { return window > 0 ? std::max<std::int64_t>(0, end_of(i) - window) : 0; };
  const auto at_row = [&](std::int64_t head, std::int64_t i) { return head * rows.head_stride + i * rows.stride; };
  // Rows that are multiplied together: `count` tokens from `first` on, of all heads; their rows begin with first * heads.
  struct Together {
    std::int64_t first, count;
  };
  const auto each_together = [&](const auto& work) {
    for (std::int64_t i = 0; i < rows.count; i += kRowTokens) work(Together{i, std::min(kRowTokens, rows.count - i)});
  };
  const float* q = rows.q;
  std::int64_t ldq = rows.stride;
  if (rows.heads > 1) {
    float* to = scratch.queries.data();
    each_together([&](const Together& part) {
      for (std::int64_t r = 0; r < part.count * rows.heads; ++r, to += d)
        std::memcpy(to, rows.q + at_row(r / part.count, part.first + r % part.count), static_cast<std::size_t>(d) * 4);
    });
    q = scratch.queries.data();
    ldq = d;
  }
  float* s = scratch.scores.data();
  float* acc = scratch.accumulator.data();
  constexpr std::int64_t kRows = kRowHeads * kMostRowTokens;
  float sums[kRows], peaks[kRows];
  std::fill(sums, sums + all, 0.0f);
  std::fill(peaks, peaks + all, -INFINITY);
  std::fill(acc, acc + all * width, 0.0f);
  const std::int64_t most = end_of(rows.count - 1);
  for (std::int64_t at = begin_of(0) / kPage * kPage; at < most; at += kPage) {
    KvPlane keys = cache.keys(block, at / kPage, kv_head), values = cache.values(block, at / kPage, kv_head);
    if (rows.step == 0) {  // one token: every plane is read once
      keys.ahead = values.data;
      if (at + kPage < most) values.ahead = cache.keys(block, at / kPage + 1, kv_head).data;
    }
    each_together([&](const Together& part) {
      const std::int64_t begin = part.first * rows.heads, count = part.count * rows.heads;
      const std::int64_t positions = std::min(kPage, end_of(part.first + part.count - 1) - at);
      if (positions <= 0 || begin_of(part.first) >= at + kPage) return;
      k.scores(q + begin * ldq, ldq, count, keys, d, positions, s, kPage);
      for (std::int64_t r = 0; r < count; ++r) {
        float* row = s + r * kPage;
        const std::int64_t token = part.first + r % part.count;
        const std::int64_t first = std::clamp<std::int64_t>(begin_of(token) - at, 0, positions);
        const std::int64_t end = std::clamp<std::int64_t>(end_of(token) - at, first, positions);
        if (first < end) {
          if (cap > 0) kernels.soft_cap(row + first, cap, end - first);
          float shrink;
          const float sum = k.softmax(row + first, end - first, values.type == KvType::kBf16, peaks + begin + r, &shrink);
          sums[begin + r] = sums[begin + r] * shrink + sum;
          float* to = acc + (begin + r) * width;
          if (shrink != 1.0f) k.scale(to, width, shrink, to);
        }
        std::fill(row, row + first, 0.0f);
        std::fill(row + end, row + positions, 0.0f);
      }
      k.weigh(s, kPage, count, values, width, positions, acc + begin * width);
    });
  }
  // A value that is not finite as it is kept makes NaN of a weight of 0, where other tokens of the call see it or the page
  // lies before the window. By itself a token does not meet what it does not see.
  std::int64_t again[kRows], spoilt = 0;
  each_together([&](const Together& part) {
    for (std::int64_t r = 0; r < part.count * rows.heads; ++r) {
      const std::int64_t row = part.first * rows.heads + r, token = part.first + r % part.count;
      const std::int64_t offset = at_row(r / part.count, token);
      const bool nan = k.scale(acc + row * width, d, 1.0f / sums[row], rows.out + offset);
      if (nan && rows.step > 0) again[spoilt++] = r / part.count * rows.count + token;
    }
  });
  for (std::int64_t i = 0; i < spoilt; ++i) {
    const std::int64_t token = again[i] % rows.count, offset = at_row(again[i] / rows.count, token);
    attend_rows(kernels, config, cache, block, kv_head,
                {rows.q + offset, rows.out + offset, rows.stride, 1, end_of(token), 0}, scratch);
  }
}

}  // namespace pare
