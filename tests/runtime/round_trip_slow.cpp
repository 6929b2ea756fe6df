#include <cstdlib>

#include "tests/runtime/round_trips.h"

namespace pare {
namespace {

TEST(RoundTrip, TenThousandRandomModelsComeBackByteForByte) {
  const char* given = std::getenv("PARE_ROUND_TRIPS");
  const std::uint64_t count = given != nullptr ? std::strtoull(given, nullptr, 10) : 10000;
  for (std::uint64_t seed = 1000; seed < 1000 + count && !::testing::Test::HasFailure(); ++seed) testing::round_trip(seed);
}

}  // namespace
}  // namespace pare
