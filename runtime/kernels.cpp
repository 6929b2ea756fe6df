#include "runtime/kernels.h"

#if defined(__aarch64__)
#include <sys/auxv.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "core/amx.h"
#include "core/error.h"

namespace pare {

PackedMatrix packed_matrix(const Codec& codec, std::int64_t rows, std::int64_t cols, std::span<const std::byte> payload,
                           const std::string& place) {
  if (rows <= 0 || cols <= 0) throw input_error(place, "a matrix", std::to_string(rows) + " x " + std::to_string(cols));
  if (!codec.is_float() && !codec.fits(cols)) {
    throw input_error(place, "columns that the groups of " + codec.name() + " divide", std::to_string(cols));
  }
  const std::uint64_t need = codec.payload_bytes(rows, cols);
  if (payload.size() < need) {
    throw input_error(place, std::to_string(need) + " bytes of " + codec.name(), std::to_string(payload.size()));
  }
  if (reinterpret_cast<std::uintptr_t>(payload.data()) % 64 != 0) {
    throw input_error(place, "a payload that begins on 64 bytes", "another address");
  }
  PackedMatrix w;
  w.codec = codec;
  w.rows = rows;
  w.cols = cols;
  w.data = payload.data();
  if (codec.is_float()) return w;
  w.groups = codec.groups(cols);
  w.lines = codec.bits() == 8 ? (cols + 3) / 4 : cols * codec.bits() / 32;
  for (std::int64_t g = codec.group; g > kActGroup; g /= 2) ++w.group_shift;
  const std::byte* scales = w.data + w.row_blocks() * w.lines * 64;
  w.scales = reinterpret_cast<const std::uint16_t*>(scales);
  const std::byte* after = scales + round_up(w.row_blocks() * w.groups * 32, 64);
  if (codec.kind == CodecKind::kQ4a) w.zeros = reinterpret_cast<const std::uint8_t*>(after);
  if (codec.kind == CodecKind::kQ4m) w.minima = reinterpret_cast<const std::uint16_t*>(after);
  return w;
}

PackedMatrix rows_from(const PackedMatrix& w, std::int64_t block) {
  PackedMatrix part = w;
  part.rows -= block * kBlockRows;
  if (w.codec.is_float()) {
    part.data += block * kBlockRows * w.cols * (w.codec.kind == CodecKind::kF32 ? 4 : 2);
    return part;
  }
  part.data += block * w.lines * 64;
  part.scales += block * w.groups * kBlockRows;
  if (w.zeros != nullptr) part.zeros += block * w.groups * (kBlockRows / 2);
  if (w.minima != nullptr) part.minima += block * w.groups * kBlockRows;
  return part;
}

void unpack_matrix_row(const PackedMatrix& w, std::int64_t row, float* out) {
  const auto* bytes = reinterpret_cast<const std::uint8_t*>(w.data);
  if (w.codec.is_float()) {
    if (w.codec.kind == CodecKind::kF32) {
      std::memcpy(out, bytes + row * w.cols * 4, static_cast<std::size_t>(w.cols) * 4);
      return;
    }
    const bool half = w.codec.kind == CodecKind::kF16;
    for (std::int64_t c = 0; c < w.cols; ++c) {
      std::uint16_t bits;
      std::memcpy(&bits, bytes + (row * w.cols + c) * 2, 2);
      out[c] = half ? f16_to_f32(bits) : bf16_to_f32(bits);
    }
    return;
  }
  const std::int64_t block = row / kBlockRows, r = row % kBlockRows;
  const std::uint8_t* line = bytes + block * w.lines * 64 + r * 4;
  const std::int64_t group = w.groups == 1 ? w.cols : w.codec.group;
  for (std::int64_t c = 0; c < w.cols; ++c) {
    const std::int64_t g = c / group;
    int code;
    if (w.codec.kind == CodecKind::kQ8) {
      code = line[c / 4 * 64 + c % 4] - 128;
    } else if (w.codec.kind == CodecKind::kQ2) {
      code = (line[c / 16 * 64 + c % 4] >> (c / 4 % 4 * 2) & 3) - 2;
    } else if (w.codec.kind == CodecKind::kQ3) {
      const std::uint8_t* lines = line + c / 32 * 3 * 64 + c % 4;
      const std::int64_t j = c / 4 % 8;
      code = (lines[j / 4 * 64] >> (j % 4 * 2) & 3) + (lines[128] >> j & 1) * 4 - 4;
    } else {
      const std::uint8_t byte = line[c / 8 * 64 + c % 4];
      code = c % 8 < 4 ? byte & 15 : byte >> 4;
      if (w.codec.kind == CodecKind::kQ4) {
        code -= 8;
      } else if (w.codec.kind == CodecKind::kQ4a) {
        const std::uint8_t zero = w.zeros[(block * w.groups + g) * 8 + r % 8];
        code -= r < 8 ? zero & 15 : zero >> 4;
      }
    }
    const std::int64_t at = (block * w.groups + g) * kBlockRows + r;
    out[c] = static_cast<float>(code) * f16_to_f32(w.scales[at]);
    if (w.codec.kind == CodecKind::kQ4m) out[c] += f16_to_f32(w.minima[at]);
  }
}

void Int8Activations::resize(std::int64_t new_tokens, std::int64_t new_cols, Form new_form) {
  tokens = new_tokens;
  cols = new_cols;
  form = new_form;
  padded = round_up(cols, form == Form::kToken ? 2 * kActGroup : kActGroup);
  const std::int64_t group = form == Form::kToken ? kRowSpan : kActGroup;
  groups = (cols + group - 1) / group;
  const auto n = static_cast<std::size_t>(tokens * groups);
  // Never shrinks: sessions alternate between the few widths of one model.
  if (scale.size() < n) {
    scale.resize(n);
    minus8.resize(n);
    minus128.resize(n);
    minus1.resize(n);
  }
  const auto bytes = static_cast<std::size_t>(tokens * padded);
  if (codes.size() < bytes) codes.resize(bytes);
}

Int8Tile int8_tile(const Int8Activations& x, std::int64_t tile) {
  const std::int64_t at = tile * kActTile * x.groups;
  Int8Tile view;
  view.width = std::min(kActTile, x.tokens - tile * kActTile);
  view.groups = x.groups;
  view.quads = (x.form == Int8Activations::Form::kToken ? kRowSpan : kActGroup) / 4;
  view.codes = x.codes.data() + tile * kActTile * x.padded;
  view.scale = x.scale.data() + at;
  view.minus8 = x.minus8.data() + at;
  view.minus128 = x.minus128.data() + at;
  view.minus1 = x.minus1.data() + at;
  return view;
}

namespace {

#if defined(__x86_64__)

bool has_avx512vnni() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
}

[[maybe_unused]] Kernels with_products(Kernels kernels, const char* name, const Int8Products& products) {
  kernels.name = name;
  kernels.matmul_int8 = products.matmul_int8;
  if (products.quantize_tile) kernels.quantize_tile = products.quantize_tile;
  kernels.reserve = products.reserve;
  return kernels;
}

#ifdef PARE_AVXVNNI
const Kernels& avxvnni_kernels() {
  static const Kernels kernels = with_products(kAvx2Kernels, "avxvnni", avxvnni_products());
  return kernels;
}
#endif

#ifdef PARE_AMX
const Kernels& amx_kernels() {
  static const Kernels kernels = [] {
    Kernels all = with_products(kAvx512VnniKernels, "amx", kAmx);
    if (__builtin_cpu_supports("avx512bf16") && has_amx_bf16()) all.attention = &amx_attention();
    return all;
  }();
  return kernels;
}
#endif

#endif

// What this machine can run, best last.
std::vector<const Kernels*> kernels_here() {
  std::vector<const Kernels*> here{&kPlainKernels};
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    here.push_back(&kAvx2Kernels);
    const bool wide = has_avx512vnni();
#ifdef PARE_AVXVNNI
    if (wide || __builtin_cpu_supports("avxvnni")) here.push_back(&avxvnni_kernels());
#endif
    if (wide) here.push_back(&kAvx512VnniKernels);
#ifdef PARE_AMX
    if (wide && has_amx_int8()) here.push_back(&amx_kernels());
#endif
  }
#elif defined(__aarch64__)
  here.push_back(&kNeonKernels);
  if ((getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0) {
    here.push_back(&kDotprodKernels);
    if ((getauxval(AT_HWCAP2) & HWCAP2_I8MM) != 0) here.push_back(&kI8mmKernels);
  }
#endif
  return here;
}

bool permitted([[maybe_unused]] const Kernels& kernels) {
#if defined(__x86_64__) && defined(PARE_AMX)
  if (std::strcmp(kernels.name, "amx") == 0) return permit_amx();
#endif
  return true;
}

}  // namespace

#ifdef PARE_AVXVNNI
const Int8Products& avxvnni_products() {
  return __builtin_cpu_supports("avxvnni") ? kAvxVnniShort : kAvxVnniLong;
}
#endif

std::vector<std::string> available_kernels() {
  std::vector<std::string> names;
  for (const Kernels* each : kernels_here()) names.emplace_back(each->name);
  return names;
}

const Kernels& choose_kernels(const std::string& name) {
  const std::vector<const Kernels*> here = kernels_here();
  std::string wanted = name, place = "kernels";
  if (wanted.empty()) {
    const char* env = std::getenv("PARE_KERNELS");
    if (env == nullptr || *env == '\0')
      return **std::find_if(here.rbegin(), here.rend(), [](const Kernels* each) { return permitted(*each); });
    wanted = env;
    place = "environment variable PARE_KERNELS";
  }
  std::string list;
  for (const Kernels* each : here) {
    if (wanted == each->name && permitted(*each)) return *each;
    if (wanted == each->name)
      throw usage_error(place, "leave of the system to use AMX's tiles", "that it refuses it",
                        "a signal stack (sigaltstack) of this process may be too small; avx512vnni does without");
    list += (list.empty() ? "" : ", ") + std::string(each->name);
  }
  throw usage_error(place, "kernels that this machine has: " + list, "\"" + wanted + "\"");
}

}  // namespace pare
