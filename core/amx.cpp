#include "core/amx.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#endif

namespace pare {

#if defined(__x86_64__) && defined(__linux__)
namespace {

constexpr long kTileData = 18;  // XFEATURE_XTILEDATA

bool has_amx(unsigned kind) {
  constexpr unsigned kTile = 1u << 24;
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kTile) == 0 || (d & kind) == 0) return false;
  constexpr long kSupported = 0x1021;  // ARCH_GET_XCOMP_SUPP
  std::uint64_t features = 0;
  return syscall(SYS_arch_prctl, kSupported, &features) == 0 && (features >> kTileData & 1) != 0;
}

}  // namespace

bool has_amx_int8() { return has_amx(1u << 25); }
bool has_amx_bf16() { return has_amx(1u << 22); }

bool permit_amx() {
  constexpr long kRequest = 0x1023;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}
#else
bool has_amx_int8() { return false; }
bool has_amx_bf16() { return false; }
bool permit_amx() { return false; }
#endif

}  // namespace pare
