#include "core/options.h"

#include <gtest/gtest.h>

#include "core/error.h"

namespace pare {
namespace {

TEST(Bytes, UnitsArePowersOf1024) {
  EXPECT_EQ(parse_bytes("4G", "x"), std::uint64_t{4} << 30);
  EXPECT_EQ(parse_bytes("2.5GiB", "x"), std::uint64_t{5} << 29);
  EXPECT_EQ(parse_bytes("512m", "x"), std::uint64_t{512} << 20);
  EXPECT_EQ(parse_bytes("1000000", "x"), 1000000u);
  EXPECT_EQ(parse_bytes("0", "x"), 0u);
  for (const char* bad : {"", "G", "-1G", "4GB", "4 G", "4Gi", "nan", "inf", "1e30", "0x10q", "4P", "4G4"}) {
    try {
      parse_bytes(bad, "--max-ram");
      ADD_FAILURE() << bad;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ExitCode::kUsage) << bad;
      EXPECT_EQ(error.place(), "--max-ram");
    }
  }
}

TEST(Bytes, InWords) {
  EXPECT_EQ(bytes_in_words(std::uint64_t{5} << 29), "2.50 GiB");
  EXPECT_EQ(bytes_in_words(std::uint64_t{300} << 20), "300 MiB");
}

}  // namespace
}  // namespace pare
