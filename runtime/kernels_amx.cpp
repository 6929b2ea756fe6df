// AMX: the AVX-512 kernels with products of many tokens by tiles, 16 tokens x 16 outputs x 32 inputs an instruction.
// The integers are the same and the floats meet them in the same order, so the bits are those of "avx512vnni".
#if defined(__AMX_INT8__)
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"  // GCC 12's own headers start from undefined registers
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <algorithm>
#include <cstring>
#include <new>
#include <vector>

#include "runtime/amx_tiles.h"
#include "runtime/int8_avx512vnni.h"

namespace pare {
namespace {

constexpr std::int64_t kTileTokens = kTileRows;
// Of more than kActTile tokens Int8Activations has, instead of the tiles of the other kernels,
//   codes          [tile of 16 tokens][kDepth inputs][token of tile][kDepth]     kDepth: 32, with kToken 64
//   scale, minus8  [tile][group][token of tile]
constexpr std::int64_t kGroupDepth = kActGroup, kTokenDepth = 64;

using Sums = std::int32_t[kTileTokens][kBlockRows];
using Totals = float[kTileTokens][kBlockRows];

// `wanted` lines of signed codes from `line` on; what the matrix does not have is zero.
template <CodecKind kKind>
void unpack(const PackedMatrix& w, std::int64_t block, std::int64_t group, std::int64_t line, std::int64_t wanted,
            std::uint8_t* out) {
  const auto* in = reinterpret_cast<const std::uint8_t*>(w.data) + (block * w.lines + line) * kLine;
  const auto put = [&](std::int64_t i, __m512i codes) { _mm512_store_si512(out + i * kLine, codes); };
  if constexpr (kKind == CodecKind::kQ8) {
    const __m512i offset = _mm512_set1_epi8(-128);
    const std::int64_t count = std::min(wanted, w.lines - line);
    for (std::int64_t i = 0; i < count; ++i) put(i, _mm512_xor_si512(_mm512_load_si512(in + i * kLine), offset));
    for (std::int64_t i = count; i < wanted; ++i) put(i, _mm512_setzero_si512());
  } else if constexpr (kKind == CodecKind::kQ3 || kKind == CodecKind::kQ2) {
    const __m512i offset = _mm512_set1_epi8(kKind == CodecKind::kQ3 ? 4 : 2);
    PARE_UNROLL for (int j = 0; j < 8; ++j) put(j, _mm512_sub_epi8(low_codes<kKind>(in, j), offset));
  } else {
    const __m512i nibble = _mm512_set1_epi8(15);
    __m512i offset = _mm512_setzero_si512();
    if constexpr (kKind == CodecKind::kQ4) offset = _mm512_set1_epi8(8);
    if constexpr (kKind == CodecKind::kQ4a) {
      const __m512i zeros = load_zeros(w.zeros + (block * w.groups + group) * 8);
      offset = _mm512_mullo_epi32(zeros, _mm512_set1_epi32(0x01010101));
    }
    PARE_UNROLL for (int c = 0; c < 4; ++c) {
      const __m512i both = _mm512_load_si512(in + c * kLine);
      put(2 * c, _mm512_sub_epi8(_mm512_and_si512(both, nibble), offset));
      put(2 * c + 1, _mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi16(both, 4), nibble), offset));
    }
  }
}

// What the products of one row block with 32 inputs need.
struct alignas(64) GroupWeights {
  std::uint8_t codes[kGroupDepth / 4 * kLine];
  float scale[kBlockRows], minimum[kBlockRows];
};
// Row blocks that are unpacked together, and groups at a time: 160 kB. The codes of 16 tokens for these groups, 16 kB,
// stay in the first cache while the blocks pass by.
constexpr std::int64_t kBlocks = 8, kPanel = 32;

// Brings codes that are likely unpacked next into the second cache, some lines a call, while tiles are multiplied.
class Ahead {
 public:
  // Lines [line, line + count) of `blocks` row blocks from `block` on, in `calls` calls.
  Ahead(const PackedMatrix& w, std::int64_t block, std::int64_t blocks, std::int64_t line, std::int64_t count,
        std::int64_t calls)
      : begin_(reinterpret_cast<const char*>(w.data) + (block * w.lines + line) * kLine),
        pitch_(w.lines * kLine),
        count_(count),
        left_(blocks * count),
        a_call_((left_ + calls - 1) / std::max<std::int64_t>(calls, 1)) {}
  void fetch() {
    const std::int64_t n = std::min(left_, a_call_);
    left_ -= n;
    for (std::int64_t i = 0; i < n; ++i) {
      _mm_prefetch(begin_ + line_ * kLine, _MM_HINT_T1);
      if (++line_ < count_) continue;
      line_ = 0;
      begin_ += pitch_;
    }
  }

 private:
  const char* begin_;
  std::int64_t pitch_, count_, left_, a_call_, line_ = 0;
};

// The tokens of one tile: what begins with input group `first` of the panel.
struct TokenTile {
  const std::int8_t* codes;  // [group][token of tile][32]
  const float* scale;        // [group][token of tile]
  const std::int32_t* minus8;
  std::int64_t pitch;  // tokens of the tile in memory
  std::int64_t count;  // of them wanted, from the first on
};

#define PARE_ISSUE(sum, left, right, group, to)                                               \
  do {                                                                                        \
    _tile_zero(sum);                                                                          \
    _tile_loadd(left, tokens.codes + (group) * tokens.pitch * kGroupDepth, kGroupDepth);      \
    _tile_loadd(right, weights[group].codes, kLine);                                          \
    _tile_dpbssd(sum, left, right);                                                           \
    _tile_stored(sum, to, kLine);                                                             \
  } while (false)

// totals[token][output] += the products of `groups` groups, one after the other, as the AVX-512 kernel adds them. The
// tiles of the next group are multiplied while the sums of this one are scaled.
template <bool kMinima>
void full_tile(const TokenTile& tokens, const GroupWeights* weights, std::int64_t groups, bool from_zero, Totals& totals) {
  __m512 total[kTileTokens];
  if (from_zero) {
    PARE_UNROLL for (int t = 0; t < kTileTokens; ++t) total[t] = _mm512_setzero_ps();
  } else {
    PARE_UNROLL for (int t = 0; t < kTileTokens; ++t) total[t] = _mm512_load_ps(totals[t]);
  }
  alignas(64) Sums sums[2];
  const auto scale = [&](const Sums& from, std::int64_t g) __attribute__((always_inline)) {
    const __m512 w = _mm512_load_ps(weights[g].scale);
    const float* x = tokens.scale + g * kTileTokens;
    PARE_UNROLL for (int t = 0; t < kTileTokens; ++t) {
      const __m512 both = _mm512_mul_ps(w, _mm512_set1_ps(x[t]));
      total[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(from[t])), both, total[t]);
    }
    if constexpr (kMinima) {
      const __m512 minimum = _mm512_load_ps(weights[g].minimum);
      alignas(64) float inputs[kTileTokens];  // Int8Tile::input_sum
      const __m512 eighths = _mm512_cvtepi32_ps(_mm512_loadu_si512(tokens.minus8 + g * kTileTokens));
      _mm512_store_ps(inputs, _mm512_mul_ps(_mm512_mul_ps(eighths, _mm512_set1_ps(-0.125f)), _mm512_loadu_ps(x)));
      PARE_UNROLL for (int t = 0; t < kTileTokens; ++t)
        total[t] = _mm512_fmadd_ps(minimum, _mm512_set1_ps(inputs[t]), total[t]);
    }
  };
  PARE_IN_MEMORY;
  PARE_ISSUE(0, 4, 6, 0, sums[0]);
  for (std::int64_t g = 0; g < groups; g += 2) {
    if (g + 1 < groups) PARE_ISSUE(1, 4, 7, g + 1, sums[1]);
    scale(sums[0], g);
    if (g + 1 == groups) break;
    if (g + 2 < groups) PARE_ISSUE(0, 4, 6, g + 2, sums[0]);
    scale(sums[1], g + 1);
  }
  PARE_UNROLL for (int t = 0; t < kTileTokens; ++t) _mm512_store_ps(totals[t], total[t]);
}

// The same for fewer tokens.
template <bool kMinima>
void part_tile(const TokenTile& tokens, const GroupWeights* weights, std::int64_t groups, bool from_zero, Totals& totals) {
  if (from_zero) std::memset(totals, 0, sizeof totals);
  alignas(64) Sums sums;
  for (std::int64_t g = 0; g < groups; ++g) {
    PARE_IN_MEMORY;
    PARE_ISSUE(0, 4, 6, g, sums);
    const __m512 w = _mm512_load_ps(weights[g].scale), minimum = _mm512_load_ps(weights[g].minimum);
    for (std::int64_t t = 0; t < tokens.count; ++t) {
      const float scale = tokens.scale[g * tokens.pitch + t];
      __m512 total = _mm512_load_ps(totals[t]);
      const __m512 both = _mm512_mul_ps(w, _mm512_set1_ps(scale));
      total = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_load_si512(sums[t])), both, total);
      if constexpr (kMinima) {
        const float inputs = static_cast<float>(tokens.minus8[g * tokens.pitch + t]) * -0.125f * scale;
        total = _mm512_fmadd_ps(minimum, _mm512_set1_ps(inputs), total);
      }
      _mm512_store_ps(totals[t], total);
    }
  }
}

void write(const Totals& totals, std::int64_t tokens, std::int64_t rows, float* out, std::int64_t ldo, bool add) {
  const __mmask16 mask = tail_mask(rows);
  for (std::int64_t t = 0; t < tokens; ++t) {
    float* to = out + t * ldo;
    const __m512 sum = _mm512_load_ps(totals[t]);
    _mm512_mask_storeu_ps(to, mask, add ? _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to), sum) : sum);
  }
}

// Memory on cache lines that a thread keeps between calls.
template <class T>
T* scratch(std::int64_t count) {
  static thread_local std::vector<T, CacheLineAllocator<T>> kept;
  if (kept.size() < static_cast<std::size_t>(count)) kept.resize(static_cast<std::size_t>(count));
  return kept.data();
}
struct alignas(64) TotalsTile {
  Totals values;
};
struct alignas(64) TokenWeights {
  std::uint8_t codes[kTokenDepth / 4 * kLine];
};

GroupWeights* group_weights(std::int64_t panel) { return scratch<GroupWeights>(kBlocks * panel); }
TotalsTile* group_totals(std::int64_t tokens) {
  return scratch<TotalsTile>((tokens + 2 * kTileTokens) / kTileTokens * kBlocks);
}
std::int64_t token_steps(std::int64_t inputs) { return (inputs + kTokenDepth - 1) / kTokenDepth; }
TokenWeights* token_weights(std::int64_t steps) { return scratch<TokenWeights>(2 * steps); }

bool reserve(std::int64_t tokens, std::int64_t group_cols, std::int64_t token_cols) {
  if (tokens <= kActTile) return true;
  try {
    if (group_cols > 0) {
      group_weights(std::min(kPanel, (group_cols + kActGroup - 1) / kActGroup));
      group_totals(tokens);
    }
    if (token_cols > 0) token_weights(token_steps(round_up(token_cols, 4)));
  } catch (const std::bad_alloc&) {
    return false;
  }
  return true;
}

// Calls work(token, tokens of its tile from it on that are wanted, tokens of the tile) for the tiles of [first, last).
template <class Work>
void each_tile(const Int8Activations& x, std::int64_t first, std::int64_t last, const Work& work) {
  for (std::int64_t t = first; t < last;) {
    const std::int64_t begin = t / kTileTokens * kTileTokens, end = std::min(last, begin + kTileTokens);
    work(t, end - t, std::min(kTileTokens, x.tokens - begin));
    t = end;
  }
}

template <CodecKind kKind>
void multiply_groups(const PackedMatrix& w, const Int8Activations& x, std::int64_t first, std::int64_t last,
                     std::int64_t block_begin, std::int64_t block_end, float* out, std::int64_t ldo, bool add) {
  constexpr bool kMinima = kKind == CodecKind::kQ4m;
  Tiles shapes;
  const int shift = w.groups == 1 ? 62 : w.group_shift;
  const std::int64_t lines = w.codec.bits() == 8 ? 8 : w.codec.bits();  // of 32 inputs
  const std::int64_t panel = std::min(kPanel, x.groups);
  GroupWeights* const weights = group_weights(panel);
  TotalsTile* const totals = group_totals(last - first);
  for (std::int64_t block = block_begin; block < block_end; block += kBlocks) {
    const std::int64_t blocks = std::min(kBlocks, block_end - block);
    for (std::int64_t from = 0; from < x.groups; from += panel) {
      const std::int64_t groups = std::min(panel, x.groups - from);
      for (std::int64_t b = 0; b < blocks; ++b) {
        for (std::int64_t g = 0; g < groups; ++g) {
          GroupWeights& to = weights[b * panel + g];
          const std::int64_t wg = (from + g) >> shift, at = ((block + b) * w.groups + wg) * kBlockRows;
          unpack<kKind>(w, block + b, wg, (from + g) * lines, kGroupDepth / 4, to.codes);
          _mm512_store_ps(to.scale, load_scales(w.scales + at));
          if constexpr (kMinima) _mm512_store_ps(to.minimum, load_scales(w.minima + at));
        }
      }
      // Next come the same blocks' further groups, or the blocks after them: here or, most often, in the thread's next
      // item, which is about as large.
      const bool same = from + panel < x.groups;
      const std::int64_t after = same ? block : block + blocks, next_from = same ? from + panel : 0;
      Ahead ahead(w, after, std::min(blocks, w.row_blocks() - after), next_from * lines,
                  std::min(panel * lines, w.lines - next_from * lines),
                  (last - first + kTileTokens - 1) / kTileTokens * blocks);
      TotalsTile* total = totals;
      each_tile(x, first, last, [&](std::int64_t t, std::int64_t count, std::int64_t pitch) {
        const std::int64_t tile = t / kTileTokens * kTileTokens, row = t - tile;
        const auto at = static_cast<std::size_t>(tile * x.groups + from * pitch + row);
        const TokenTile tokens = {x.codes.data() + tile * x.padded + (from * pitch + row) * kGroupDepth,
                                  x.scale.data() + at, x.minus8.data() + at, pitch, count};
        shapes.shape(count, count, kGroupDepth);
        for (std::int64_t b = 0; b < blocks; ++b, ++total) {
          const auto multiply = count == kTileTokens ? full_tile<kMinima> : part_tile<kMinima>;
          multiply(tokens, weights + b * panel, groups, from == 0, total->values);
          ahead.fetch();
          if (from + panel < x.groups) continue;
          const std::int64_t output = (block + b) * kBlockRows;
          write(total->values, count, w.rows - output, out + t * ldo + output, ldo, add);
        }
      });
    }
  }
}

// Tokens with one scale: sums stay in tiles for kRowSpan inputs, two tiles of tokens by two row blocks.
void multiply_rows(const PackedMatrix& w, const Int8Activations& x, std::int64_t first, std::int64_t last,
                   std::int64_t block_begin, std::int64_t block_end, float* out, std::int64_t ldo, bool add) {
  Tiles shapes;
  constexpr std::int64_t kSpanSteps = kRowSpan / kTokenDepth;
  const std::int64_t steps = token_steps(w.lines * 4);
  TokenWeights* const weights = token_weights(steps);
  alignas(64) Totals totals[4];  // token tile * 2 + row block
  alignas(64) Sums sums[4];
  for (std::int64_t block = block_begin; block < block_end; block += 2) {
    const std::int64_t blocks = std::min<std::int64_t>(2, block_end - block);
    __m512 scale[2];
    for (std::int64_t b = 0; b < blocks; ++b) {
      for (std::int64_t s = 0; s < steps; ++s)
        unpack<CodecKind::kQ8>(w, block + b, 0, s * kTokenDepth / 4, kTokenDepth / 4, weights[2 * s + b].codes);
      scale[b] = load_scales(w.scales + (block + b) * kBlockRows);
    }
    struct Side {
      std::int64_t token = 0, count = 0, pitch = 1;
    };
    const auto multiply = [&](const Side (&sides)[2]) {
      const bool both = sides[1].count > 0;
      shapes.shape(sides[0].count, both ? sides[1].count : 1, kTokenDepth);
      const std::int8_t* codes[2] = {};
      for (int k = 0; k < (both ? 2 : 1); ++k) {
        const std::int64_t tile = sides[k].token / kTileTokens * kTileTokens;
        codes[k] = x.codes.data() + tile * x.padded + (sides[k].token - tile) * kTokenDepth;
      }
      std::memset(totals, 0, sizeof totals);
      for (std::int64_t from = 0; from < steps; from += kSpanSteps) {
        PARE_IN_MEMORY;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (std::int64_t s = from; s < std::min(steps, from + kSpanSteps); ++s) {
          _tile_loadd(4, codes[0] + s * sides[0].pitch * kTokenDepth, kTokenDepth);
          _tile_loadd(6, weights[2 * s].codes, kLine);
          _tile_dpbssd(0, 4, 6);
          if (blocks == 2) {
            _tile_loadd(7, weights[2 * s + 1].codes, kLine);
            _tile_dpbssd(1, 4, 7);
          }
          if (!both) continue;
          _tile_loadd(5, codes[1] + s * sides[1].pitch * kTokenDepth, kTokenDepth);
          _tile_dpbssd(2, 5, 6);
          if (blocks == 2) _tile_dpbssd(3, 5, 7);
        }
        _tile_stored(0, sums[0], kLine);
        _tile_stored(1, sums[1], kLine);
        _tile_stored(2, sums[2], kLine);
        _tile_stored(3, sums[3], kLine);
        for (int k = 0; k < 4; ++k) {
          for (std::int64_t t = 0; k % 2 < blocks && t < sides[k / 2].count; ++t) {
            const std::int64_t tile = sides[k / 2].token / kTileTokens * kTileTokens;
            const float x_scale =
                x.scale[static_cast<std::size_t>(tile * x.groups + sides[k / 2].token - tile + t)];
            const __m512 sum = _mm512_cvtepi32_ps(_mm512_load_si512(sums[k][t]));
            _mm512_store_ps(totals[k][t], _mm512_fmadd_ps(sum, _mm512_mul_ps(scale[k % 2], _mm512_set1_ps(x_scale)),
                                                          _mm512_load_ps(totals[k][t])));
          }
        }
      }
      for (int k = 0; k < 4; ++k) {
        if (k % 2 == blocks || sides[k / 2].count == 0) continue;
        const std::int64_t output = (block + k % 2) * kBlockRows;
        write(totals[k], sides[k / 2].count, w.rows - output, out + sides[k / 2].token * ldo + output, ldo, add);
      }
    };
    Side sides[2];
    int waiting = 0;
    each_tile(x, first, last, [&](std::int64_t t, std::int64_t count, std::int64_t pitch) {
      sides[waiting++] = {t, count, pitch};
      if (waiting < 2) return;
      multiply(sides);
      waiting = 0;
      sides[1] = {};
    });
    if (waiting == 1) multiply(sides);
  }
}

void matmul_int8(const PackedMatrix& w, const Int8Activations& x, std::int64_t tile_begin, std::int64_t tile_end,
                 std::int64_t block_begin, std::int64_t block_end, float* out, std::int64_t ldo, bool add) {
  if (x.tokens <= kActTile)
    return kAvx512VnniKernels.matmul_int8(w, x, tile_begin, tile_end, block_begin, block_end, out, ldo, add);
  const auto run = x.form == Int8Activations::Form::kToken ? multiply_rows
                   : w.codec.kind == CodecKind::kQ8  ? multiply_groups<CodecKind::kQ8>
                   : w.codec.kind == CodecKind::kQ4  ? multiply_groups<CodecKind::kQ4>
                   : w.codec.kind == CodecKind::kQ4a ? multiply_groups<CodecKind::kQ4a>
                   : w.codec.kind == CodecKind::kQ4m ? multiply_groups<CodecKind::kQ4m>
                   : w.codec.kind == CodecKind::kQ3  ? multiply_groups<CodecKind::kQ3>
                                                     : multiply_groups<CodecKind::kQ2>;
  run(w, x, tile_begin * kActTile, std::min(x.tokens, tile_end * kActTile), block_begin, block_end, out, ldo, add);
}

void quantize_tile(const float* x, std::int64_t ldx, std::int64_t tile, Int8Activations& to) {
  if (to.tokens <= kActTile) return kAvx512VnniKernels.quantize_tile(x, ldx, tile, to);
  const bool by_token = to.form == Int8Activations::Form::kToken;
  const std::int64_t depth = by_token ? kTokenDepth : kGroupDepth;
  for (std::int64_t t = tile * kActTile; t < std::min(to.tokens, (tile + 1) * kActTile); ++t) {
    const std::int64_t first = t / kTileTokens * kTileTokens, width = std::min(kTileTokens, to.tokens - first);
    std::int8_t* codes = to.codes.data() + first * to.padded + (t - first) * depth;
    const float* row = x + t * ldx;
    const auto at = static_cast<std::size_t>(first * to.groups + t - first);
    if (!by_token) {
      for (std::int64_t g = 0; g < to.groups; ++g) {
        const QuantizedGroup group = quantize_group(row + g * kActGroup, std::min(kActGroup, to.cols - g * kActGroup));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + g * width * depth), group.codes);
        to.scale[at + static_cast<std::size_t>(g * width)] = group.scale;
        to.minus8[at + static_cast<std::size_t>(g * width)] = -8 * group.sum;
      }
      continue;
    }
    const TokenScale scale = token_scale(row, to.cols);
    for (std::int64_t i = 0; i < to.padded; i += 16) {
      const __m128i four = _mm512_cvtsepi32_epi8(scale.codes(row, i, to.cols));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i / depth * width * depth + i % depth), four);
    }
    for (std::int64_t g = 0; g < to.groups; ++g) to.scale[at + static_cast<std::size_t>(g * width)] = scale.scale;
  }
}

std::int64_t int8(std::int64_t rounds) {
  alignas(64) std::int8_t a[1024], b[1024];
  alignas(64) std::int32_t sums[4][16][16];
  std::memset(a, 3, sizeof a);
  std::memset(b, -2, sizeof b);
  Tiles tiles;
  tiles.shape(16, 16, kTokenDepth);
  PARE_IN_MEMORY;
  _tile_loadd(4, a, kLine);
  _tile_loadd(5, a, kLine);
  _tile_loadd(6, b, kLine);
  _tile_loadd(7, b, kLine);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (std::int64_t r = 0; r < rounds; ++r) {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  _tile_stored(0, sums[0], kLine);
  _tile_stored(1, sums[1], kLine);
  _tile_stored(2, sums[2], kLine);
  _tile_stored(3, sums[3], kLine);
  std::uint32_t all = 0;
  for (const auto& sum : sums)
    for (const auto& line : sum)
      for (const std::int32_t value : line) all += static_cast<std::uint32_t>(value);
  return static_cast<std::int32_t>(all);
}

}  // namespace

const Int8Products kAmx = {matmul_int8, quantize_tile, int8, 2 * 4 * 16 * 16 * kTokenDepth, reserve};

}  // namespace pare
#endif
