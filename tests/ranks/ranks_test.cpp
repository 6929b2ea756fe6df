// How ranks are told who they are.
#include "tests/ranks/programs.h"

namespace pare {
namespace {

using namespace testing;

TEST_F(Ranks, TheirEnvironmentIsChecked) {
  const auto code_of = [&](const Variables& variables, const std::string& named) {
    Program one(scratch_ / "env", train("out"), variables);
    const int code = one.wait();
    EXPECT_NE(one.errors().find(named), std::string::npos) << one.errors();
    return code;
  };
  Variables v = rank_variables(2, 2, 1);
  EXPECT_EQ(code_of(v, "RANK"), 2);
  v = rank_variables(0, 2, 70000);
  EXPECT_EQ(code_of(v, "MASTER_PORT"), 2);
  v = rank_variables(0, 2, 1);
  v.erase("MASTER_ADDR");
  EXPECT_EQ(code_of(v, "MASTER_ADDR"), 2);
  EXPECT_EQ(code_of({{"RANK", "0"}}, "WORLD_SIZE"), 2);
  EXPECT_EQ(code_of({{"WORLD_SIZE", "two"}}, "WORLD_SIZE"), 2);
  EXPECT_EQ(code_of({{"OMPI_COMM_WORLD_SIZE", "2"}, {"OMPI_COMM_WORLD_RANK", "0"}, {"OMPI_COMM_WORLD_LOCAL_SIZE", "1"}},
                    "MASTER_ADDR"), 2);
  Program whole(scratch_ / "compress", {"compress", "--model", path("model"), "--out", path("out")},
                rank_variables(0, 2, free_port()));
  EXPECT_EQ(whole.wait(), 2);
  EXPECT_NE(whole.errors().find("WORLD_SIZE"), std::string::npos) << whole.errors();
}

TEST_F(Ranks, AreStartedByMpirunToo) {
  const std::string port = std::to_string(free_port());
  std::vector<std::unique_ptr<Program>> ranks;
  for (const char* rank : {"0", "1"})
    ranks.push_back(std::make_unique<Program>(
        scratch_ / rank, train("out", {"--steps", "2"}),
        Variables{{"OMPI_COMM_WORLD_SIZE", "2"}, {"OMPI_COMM_WORLD_RANK", rank}, {"OMPI_COMM_WORLD_LOCAL_RANK", rank},
                  {"OMPI_COMM_WORLD_LOCAL_SIZE", "2"}, {"MASTER_PORT", port}}));
  for (const auto& rank : ranks) EXPECT_EQ(rank->wait(), 0) << rank->errors();
  EXPECT_TRUE(fs::exists(scratch_ / "out"));
}

}  // namespace
}  // namespace pare
