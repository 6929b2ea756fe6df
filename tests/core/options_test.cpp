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

// On the command line the flag is the place; elsewhere the option within its place.
TEST(Options, AValueOutOfRangeNamesItsOptionAndTheRange) {
  const std::vector<OptionDecl> decls = {
      {.name = "speed", .type = OptionType::kNumber, .help = "h", .minimum = 1e-3, .maximum = 1e6},
      {.name = "layers", .type = OptionType::kInteger, .help = "h", .minimum = 1},
      {.name = "to", .help = "h", .choices = {"gguf", "folder"}}};
  const auto refusal = [&](const Json& given, const std::string& place) -> std::string {
    try {
      const Options options(decls, given, place);
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ExitCode::kUsage);
      return error.what();
    }
    return "";
  };
  EXPECT_EQ(refusal({{"speed", 1e9}}, ""), "--speed: expected at least 0.001 and at most 1000000, found 1000000000.0");
  EXPECT_EQ(refusal({{"layers", 0}}, ""), "--layers: expected at least 1, found 0");
  EXPECT_EQ(refusal({{"to", "ggup"}}, ""),
            "--to: expected one of gguf, folder, found \"ggup\"\n  hint: did you mean gguf?");
  EXPECT_EQ(refusal({{"layers", 0}}, "r.yaml: stages[1] (prune)"),
            "r.yaml: stages[1] (prune): option \"layers\": expected at least 1, found 0");
  const std::string both = refusal({{"layers", 0}, {"speed", 0}}, "");
  EXPECT_TRUE(both.starts_with("command line: --speed: expected at least 0.001")) << both;
  EXPECT_NE(both.find("\n  --layers: expected at least 1, found 0"), std::string::npos) << both;
  EXPECT_EQ(refusal({{"speed", 3}}, ""), "");
}

TEST(Bytes, InWords) {
  EXPECT_EQ(bytes_in_words(std::uint64_t{5} << 29), "2.50 GiB");
  EXPECT_EQ(bytes_in_words(std::uint64_t{300} << 20), "300 MiB");
}

}  // namespace
}  // namespace pare
