#include "tests/runtime/round_trips.h"

namespace pare {
namespace {

TEST(RoundTrip, TenThousandRandomModelsComeBackByteForByte) {
  for (std::uint64_t seed = 1000; seed < 11000 && !::testing::Test::HasFailure(); ++seed) testing::round_trip(seed);
}

}  // namespace
}  // namespace pare
