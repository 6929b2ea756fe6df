#include "model/split_products.h"

#include <cstdlib>
#include <string_view>

#include "core/amx.h"

namespace pare {
namespace {

thread_local bool wanted = false;

}  // namespace

bool has_split_products() {
#ifdef PARE_AMX
  static const bool has = [] {
    const char* kernels = std::getenv("PARE_KERNELS");
    if (kernels && *kernels != '\0' && std::string_view(kernels) != "amx") return false;
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bf16") && has_amx_bf16() && permit_amx();
  }();
  return has;
#else
  return false;
#endif
}

SplitProductsScope::SplitProductsScope() : before_(wanted) { wanted = has_split_products(); }
SplitProductsScope::~SplitProductsScope() { wanted = before_; }
bool split_products_wanted() { return wanted; }

}  // namespace pare
