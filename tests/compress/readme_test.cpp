// Published figures come from files: the tables of README.md are rendered again from their JSON and compared.
#include <gtest/gtest.h>

#include <fmt/format.h>

#include <string>

#include "core/file.h"
#include "core/json.h"

namespace pare {
namespace {

std::string cell(const Json& value) {
  if (value.is_string()) return value.get<std::string>();
  if (value.is_number_integer()) return std::to_string(value.get<std::int64_t>());
  return fmt::format("{:.4g}", value.get<double>());
}

std::string markdown(const Json& result) {
  std::string text = "|", rule = "|";
  for (const auto& column : result["columns"]) {
    text += " " + column.get<std::string>() + " |";
    rule += "---|";
  }
  text += "\n" + rule + "\n";
  for (const auto& row : result["table"]) {
    text += "|";
    for (const auto& value : row) text += " " + cell(value) + " |";
    text += "\n";
  }
  return text;
}

// Returns the number of tables.
int compare_tables(const fs::path& root, const std::string& page) {
  const std::string readme = read_text(root / page);
  const std::string open = "<!-- table: ", close = "<!-- end -->";
  int tables = 0;
  for (std::size_t at = readme.find(open); at != std::string::npos; at = readme.find(open, at + 1)) {
    const std::size_t name = at + open.size(), name_end = readme.find(" -->", name);
    const std::size_t body = name_end + 5, end = readme.find(close, body);
    if (end == std::string::npos) {
      ADD_FAILURE() << page << ": a table without end";
      break;
    }
    const std::string file = readme.substr(name, name_end - name);
    const Json result = read_json(root / file);
    for (const char* key : {"command", "machine"}) EXPECT_TRUE(result.contains(key)) << file << " lacks " << key;
    // Runs that take hours each are repeated one at a time: then each says its own commit.
    if (!result.contains("commit")) {
      EXPECT_TRUE(result.contains("runs") && !result["runs"].empty()) << file << " lacks commit";
      for (const auto& run : result.value("runs", Json::object()))
        EXPECT_TRUE(run.contains("commit")) << file << ": a run lacks commit";
    }
    const std::string shown = readme.substr(body, end - body), expected = markdown(result);
    EXPECT_EQ(shown, expected) << page << " shows something else than " << file;
    ++tables;
  }
  return tables;
}

TEST(Readme, TablesEqualTheCommittedResults) {
  EXPECT_GE(compare_tables(PARE_SOURCE_DIR, "README.md"), 2);
  EXPECT_GE(compare_tables(PARE_SOURCE_DIR, "tests/bench/accuracy/README.md"), 2);
}

}  // namespace
}  // namespace pare
