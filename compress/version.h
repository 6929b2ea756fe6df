// Part of every stage key and of every file: raise it when the same recipe would give other bytes.
#pragma once

namespace pare {

inline constexpr const char* kVersion = "0.1.0";

}  // namespace pare
