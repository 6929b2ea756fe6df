// The version of the project, as CMakeLists.txt states it.
#pragma once

namespace pare {

inline constexpr const char* kVersion = PARE_VERSION;

}  // namespace pare
