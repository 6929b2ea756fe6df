// The numeric inner loops of the runtime, compiled once per instruction set and chosen at start.
//
// A matrix is used where it lies in the mapped file (runtime/FORMAT.md section 3). The unit of work is a row block:
// 16 outputs. Every kernel adds the products of one output in an order that depends neither on the number of tokens
// in the call nor on the rows asked, so prefill, incremental decoding and any thread count give the same bits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <new>
#include <span>
#include <string>
#include <vector>

#include "core/codecs/codecs.h"  // kBlockRows: outputs per row block
#include "runtime/attention_kernels.h"

namespace pare {

constexpr std::int64_t kActGroup = 32;    // inputs per int8 activation scale
constexpr std::int64_t kRowSpan = 1 << 14;  // inputs per int32 sum where a token has one scale: 2^14 * 2^15 < 2^31
constexpr std::int64_t kActTile = 12;     // tokens that are packed side by side

inline std::int64_t round_up(std::int64_t value, std::int64_t unit) {
  return (value + unit - 1) / unit * unit;
}

// A weight matrix [rows, cols] in place.
struct PackedMatrix {
  Codec codec;
  std::int64_t rows = 0, cols = 0;
  const std::byte* data = nullptr;        // codes plane, or row-major floats
  const std::uint16_t* scales = nullptr;  // [row block][group][16]
  const std::uint8_t* zeros = nullptr;    // [row block][group][8], kQ4a only
  const std::uint16_t* minima = nullptr;  // as scales, kQ4m only
  std::int64_t lines = 0;                 // 64-byte lines per row block
  std::int64_t groups = 0;                // scales per row
  int group_shift = 0;                    // activation groups per weight group = 1 << group_shift
  std::int64_t row_blocks() const { return (rows + kBlockRows - 1) / kBlockRows; }
};
// Error (exit 3) when the payload is shorter than the shape demands or not on 64 bytes.
PackedMatrix packed_matrix(const Codec& codec, std::int64_t rows, std::int64_t cols, std::span<const std::byte> payload,
                           const std::string& place);
// The rows from a row block on, in place.
PackedMatrix rows_from(const PackedMatrix& w, std::int64_t block);
// One row as floats, as QuantizedTensor::unpack_row has it: embedding look-up. out: cols floats.
void unpack_matrix_row(const PackedMatrix& w, std::int64_t row, float* out);

// Memory that begins on a cache line.
template <class T>
struct CacheLineAllocator {
  using value_type = T;
  CacheLineAllocator() = default;
  template <class U>
  CacheLineAllocator(const CacheLineAllocator<U>&) {}
  T* allocate(std::size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t{64})); }
  void deallocate(T* p, std::size_t) { ::operator delete(p, std::align_val_t{64}); }
  bool operator==(const CacheLineAllocator&) const = default;
};

// Activations as int8: symmetric, scale = max|x| / 127, code = x * (127 / max|x|) rounded to nearest even. Tokens lie
// in tiles of up to 12 in the order the kernels read:
//   codes  [tile][group][quads of the group][token of tile][4 inputs], inputs padded to a multiple of 32 (kToken: 64)
//   scale, minus8, minus128, minus1: [tile][group][token of tile]
// kGroup: one scale per token and 32 inputs. minus8 and minus128 are -8 and -128 times the sum of the group's codes
// (start values that undo the offset of q4 and q8 codes; those of q3 and q2 are a half and a quarter of the first);
// minus1 is the negated sum as 16 bits, for zero points that differ by row. Minima of q4m multiply the sum itself.
// kToken: one scale per token, what w8a8 means. A group is kRowSpan inputs, all groups of a token have the same scale;
// minus128 alone is kept.
// A non-finite input makes the scale of its group NaN, so it reaches the output. Of more than one tile "amx" keeps
// its own order (kernels_amx.cpp): a set's products read what its quantize_tile wrote.
struct Int8Activations {
  enum class Form { kGroup, kToken };
  Form form = Form::kGroup;
  std::int64_t tokens = 0, cols = 0, padded = 0, groups = 0;
  std::vector<std::int8_t, CacheLineAllocator<std::int8_t>> codes;
  std::vector<float> scale;
  std::vector<std::int32_t> minus8, minus128, minus1;

  void resize(std::int64_t tokens, std::int64_t cols, Form form = Form::kGroup);
  std::int64_t tiles() const { return (tokens + kActTile - 1) / kActTile; }
};

// The tile as kernels see it: `width` tokens.
struct Int8Tile {
  std::int64_t width = 0, groups = 0;
  std::int64_t quads = 0;  // of a group
  const std::int8_t* codes = nullptr;
  const float* scale = nullptr;
  const std::int32_t *minus8 = nullptr, *minus128 = nullptr, *minus1 = nullptr;
  // What the group's inputs of a token add up to, as they are rounded: exact but for one product.
  float input_sum(std::int64_t at) const { return static_cast<float>(minus8[at]) * -0.125f * scale[at]; }
};
Int8Tile int8_tile(const Int8Activations& x, std::int64_t tile);

constexpr float kGeluScale = 1.5957691216057308f;  // 2 sqrt(2 / pi)
constexpr float kGeluCubic = 0.044715f;
// Abramowitz and Stegun 7.1.26: erfc(z) = (a1 t + .. + a5 t^5) exp(-z^2), t = 1 / (1 + p z), z >= 0; to 1.5e-7.
constexpr float kErfP = 0.3275911f;
constexpr float kErfA[5] = {0.254829592f, -0.284496736f, 1.421413741f, -1.453152027f, 1.061405429f};

struct Kernels {
  const char* name;

  // out[t * ldo + r] (+)= sum_k w[r, k] x[t, k] for the rows of blocks [block_begin, block_end); `add` adds to out.
  // Any codec; float activations. scratch: 16 * round_up(cols, 16) floats on 64 bytes.
  void (*matmul_float)(const PackedMatrix& w, const float* x, std::int64_t ldx, std::int64_t tokens,
                       std::int64_t block_begin, std::int64_t block_end, float* out, std::int64_t ldo, bool add,
                       float* scratch);
  // The same with int8 activations, quantized codecs only (with kToken: 8 bits, one scale per row), tokens of tiles
  // [tile_begin, tile_end); `out` is the row of the first token of `x`, whatever the tile range.
  void (*matmul_int8)(const PackedMatrix& w, const Int8Activations& x, std::int64_t tile_begin, std::int64_t tile_end,
                      std::int64_t block_begin, std::int64_t block_end, float* out, std::int64_t ldo, bool add);
  // Fills one tile of `to` (resized, in its form) from x, the row of the first token of all tiles.
  void (*quantize_tile)(const float* x, std::int64_t ldx, std::int64_t tile, Int8Activations& to);

  // out[i] = x[i] / rms(x) * weight[i]; out may be x.
  void (*rms_norm)(const float* x, const float* weight, float eps, std::int64_t n, float* out);
  // gate[i] = gate[i] / (1 + exp(-gate[i])) * up[i]
  void (*silu_mul)(float* gate, const float* up, std::int64_t n);
  // gate[i] = gelu(gate[i]) * up[i], the tanh form: gelu(x) = x / (1 + exp(-2 sqrt(2 / pi) (x + 0.044715 x^3)))
  void (*gelu_mul)(float* gate, const float* up, std::int64_t n);
  // x[i] = gelu(x[i]): the same form, and the exact one, x / 2 (1 + erf(x / sqrt(2)))
  void (*gelu_tanh)(float* x, std::int64_t n);
  void (*gelu)(float* x, std::int64_t n);
  // x[i] = cap * tanh(x[i] / cap)
  void (*soft_cap)(float* x, float cap, std::int64_t n);
  const AttentionKernels* attention;
  // Takes what the calling thread keeps for products with int8 activations of so many tokens and as many inputs at most
  // (0: none in that form), as the products themselves would. false: there is no memory. nullptr: they keep nothing.
  bool (*reserve)(std::int64_t tokens, std::int64_t group_cols, std::int64_t token_cols) = nullptr;
};

// Names this machine can run, best last (the system is not asked for anything), of "plain", "avx2", "avxvnni",
// "avx512vnni", "amx" on x86 and "plain", "neon", "dotprod", "i8mm" on aarch64.
std::vector<std::string> available_kernels();
// "": PARE_KERNELS if set, else the best. Unknown or not supported here: exit 2 with the list. "amx" asks Linux for the
// tiles of the whole process, from then on signal stacks have to hold them: by name exit 2 where that is refused, by
// default the next best is taken.
const Kernels& choose_kernels(const std::string& name);

extern const Kernels kPlainKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
// What an instruction set puts in place of the byte products of a narrower one.
struct Int8Products {
  decltype(Kernels::matmul_int8) matmul_int8;
  decltype(Kernels::quantize_tile) quantize_tile;  // nullptr: as the narrower one has it
  std::int64_t (*peak)(std::int64_t rounds);  // as PeakLoops::int8 (runtime/roofline.h)
  std::int64_t peak_operations;
  decltype(Kernels::reserve) reserve = nullptr;
};
extern const Int8Products kAvxVnniShort, kAvxVnniLong;  // of "avx2", in the two codings of the instruction
// The coding that this machine knows; only where available_kernels() has "avxvnni".
const Int8Products& avxvnni_products();
extern const Kernels kAvx512VnniKernels;
extern const Int8Products kAmx;  // of "avx512vnni"
#elif defined(__aarch64__)
extern const Kernels kNeonKernels;
extern const Kernels kDotprodKernels;
extern const Kernels kI8mmKernels;
#endif

}  // namespace pare
