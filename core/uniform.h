// Random numbers as a function of a seed and a place: the same whatever was drawn before, so runs may be cut and
// continued anywhere.
#pragma once

#include <cstdint>

namespace pare {

// Uniform in (0, 1): SplitMix64 (Steele et al. 2014) of the place.
inline double uniform_at(std::uint64_t seed, std::uint64_t place) {
  std::uint64_t z = seed + (place + 1) * 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  z ^= z >> 31;
  return (static_cast<double>(z >> 11) + 0.5) * 0x1p-53;
}

}  // namespace pare
