#include "core/arch/arch.h"

#include <array>

namespace pare {

std::span<const Family* const> families() {
  static constexpr std::array<const Family*, 3> kFamilies = {&kLlama, &kMistral, &kQwen2};
  return kFamilies;
}

const Family* find_family(std::string_view name) {
  for (const Family* family : families())
    if (name == family->name) return family;
  return nullptr;
}

}  // namespace pare
