// Part of every stage key: another version does every stage again.
#pragma once

namespace pare {

#ifdef PARE_VERSION
inline constexpr const char* kVersion = PARE_VERSION;
#else
inline constexpr const char* kVersion = "unversioned";
#endif

}  // namespace pare
