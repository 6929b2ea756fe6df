// The moment that the goldens of chat templates know.
#pragma once

#include <ctime>

namespace pare::testing {

// Saturday, 4 July 2026, 15:05:09.
inline std::tm chat_moment() {
  std::tm now{};
  now.tm_year = 126;
  now.tm_mon = 6;
  now.tm_mday = 4;
  now.tm_hour = 15;
  now.tm_min = 5;
  now.tm_sec = 9;
  now.tm_wday = 6;
  now.tm_yday = 184;
  return now;
}

}  // namespace pare::testing
