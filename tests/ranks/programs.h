// The program started as torchrun starts it: once per rank, on a free port of the loopback interface.
#pragma once

#include <arpa/inet.h>
#include <fcntl.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <signal.h>
#include <spawn.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <map>
#include <memory>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "core/checkpoint.h"
#include "core/file.h"
#include "core/json.h"
#include "tests/compress/tiny_model.h"
#include "tests/scratch.h"

extern char** environ;

namespace pare::testing {

using Arguments = std::vector<std::string>;
using Variables = std::map<std::string, std::string>;

inline int free_port() {
  const int fd = ::socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof address;
  int port = 0;
  if (::bind(fd, reinterpret_cast<sockaddr*>(&address), size) == 0 &&
      getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size) == 0)
    port = ntohs(address.sin_port);
  ::close(fd);
  return port;
}

// `more` as well; an option that is there already gets its value.
inline Arguments with(Arguments arguments, const Arguments& more) {
  for (std::size_t i = 0; i + 1 < more.size(); i += 2) {
    const auto there = std::find(arguments.begin(), arguments.end(), more[i]);
    if (there == arguments.end())
      arguments.insert(arguments.end(), {more[i], more[i + 1]});
    else
      there[1] = more[i + 1];
  }
  return arguments;
}

class Program {
 public:
  Program(const fs::path& log, Arguments arguments, const Variables& variables) : out_(log), error_(log) {
    out_ += ".out";
    error_ += ".err";
    arguments.insert(arguments.begin(), PARE_BINARY_DIR "/pare");
    std::vector<char*> argv;
    for (std::string& argument : arguments) argv.push_back(argument.data());
    argv.push_back(nullptr);
    std::vector<std::string> set{"OMP_NUM_THREADS=1", "OMP_WAIT_POLICY=passive"};
    for (const auto& [name, value] : variables) set.push_back(name + "=" + value);
    std::vector<char*> env;
    for (std::string& each : set) env.push_back(each.data());
    for (char** each = environ; *each != nullptr; ++each) {
      const std::string name = std::string(*each).substr(0, std::string_view(*each).find('='));
      if (!variables.contains(name) && name.rfind("OMP", 0) != 0) env.push_back(*each);
    }
    env.push_back(nullptr);
    posix_spawn_file_actions_t files;
    posix_spawn_file_actions_init(&files);
    posix_spawn_file_actions_addopen(&files, 1, out_.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0644);
    posix_spawn_file_actions_addopen(&files, 2, error_.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0644);
    if (posix_spawn(&process_, argv[0], &files, nullptr, argv.data(), env.data()) != 0) process_ = -1;
    posix_spawn_file_actions_destroy(&files);
  }
  ~Program() {
    if (process_ <= 0) return;
    ::kill(process_, SIGKILL);
    ::waitpid(process_, nullptr, 0);
  }
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;
  void kill(int signal) { ::kill(process_, signal); }
  // The exit code, 128 + signal, or -1 when it still runs after `seconds`.
  int wait(int seconds = 60) {
    const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(seconds);
    int status = 0;
    while (process_ > 0 && ::waitpid(process_, &status, WNOHANG) == 0) {
      if (std::chrono::steady_clock::now() > until) return -1;
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    if (process_ <= 0) return -1;
    process_ = -1;
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  }
  std::string out() const { return read_text(out_); }
  std::string errors() const { return read_text(error_); }

 private:
  fs::path out_, error_;
  pid_t process_ = -1;
};

inline Variables rank_variables(int rank, int size, int port) {
  return {{"RANK", std::to_string(rank)}, {"WORLD_SIZE", std::to_string(size)}, {"LOCAL_RANK", std::to_string(rank)},
          {"MASTER_ADDR", "127.0.0.1"}, {"MASTER_PORT", std::to_string(port)}};
}

struct Job {
  std::vector<std::unique_ptr<Program>> ranks;
  // The same command on every rank, and what `more` adds on rank 1 and later.
  Job(const fs::path& log, int size, const Arguments& arguments, const Arguments& more = {}) {
    const int port = free_port();
    for (int rank = 0; rank < size; ++rank) {
      ranks.push_back(std::make_unique<Program>(log.string() + std::to_string(rank),
                                                rank > 0 ? with(arguments, more) : arguments,
                                                rank_variables(rank, size, port)));
    }
  }
  std::vector<int> wait(int seconds = 60) {
    std::vector<int> codes;
    for (const auto& rank : ranks) codes.push_back(rank->wait(seconds));
    return codes;
  }
  std::string errors() const {
    std::string all;
    for (const auto& rank : ranks) all += rank->errors();
    return all;
  }
};

inline bool program_has_ranks(const Scratch& scratch) {
  Program doctor(scratch / "doctor", {"doctor", "--json"}, {});
  EXPECT_EQ(doctor.wait(), 0) << doctor.errors();
  return parse_json(doctor.out(), "doctor").at("result").at("ranks") == "gloo";
}

// Points without what differs from run to run.
inline std::vector<Json> curve_of(const fs::path& folder) {
  std::vector<Json> points;
  std::istringstream lines(read_text(folder / "train.jsonl"));
  for (std::string line; std::getline(lines, line);) points.push_back(parse_json(line, "curve"));
  for (Json& point : points)
    for (const char* key : {"tokens_per_second", "resident_bytes"}) point.erase(key);
  return points;
}

class Ranks : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!program_has_ranks(scratch_)) GTEST_SKIP() << "this build has no c10d";
    TinyModel tiny;
    make_tiny_model(scratch_ / "model", tiny);
    tiny.layers = 1;
    make_tiny_model(scratch_ / "student", tiny);
    write_text(scratch_ / "text.txt", tiny_text(3, 120));
    write_text(scratch_ / "held.txt", tiny_text(4, 20));
  }
  std::string path(const std::string& name) const { return (scratch_ / name).string(); }
  Arguments train(const std::string& out, const Arguments& more = {}) const {
    Arguments all{"train", "--model", path("model"), "--text", path("text.txt"), "--split", "<|endoftext|>",
                  "--held-out", path("held.txt"), "--steps", "12", "--batch", "6", "--context", "32", "--lr", "0.003",
                  "--seed", "5", "--out", path(out), "--json"};
    return with(all, more);
  }
  Arguments distill(const std::string& out, const Arguments& more = {}) const {
    Arguments all = train(out, {"--teacher", path("model")});
    all[0] = "distill";
    *std::find(all.begin(), all.end(), path("model")) = path("student");
    return with(all, more);
  }
  void alone(const Arguments& arguments) {
    Program one(scratch_ / "one", arguments, {});
    ASSERT_EQ(one.wait(), 0) << one.errors();
  }
  // Losses of all steps, the held-out ones at the end and the weights of two folders.
  struct Difference {
    double loss = 0, held_out = 0, weights = 0;
  };
  Difference compare(const std::string& a, const std::string& b) const {
    Difference d;
    const auto x = curve_of(scratch_ / a), y = curve_of(scratch_ / b);
    EXPECT_EQ(x.size(), y.size());
    EXPECT_GT(x.size(), 12u);
    for (std::size_t i = 0; i + 1 < std::min(x.size(), y.size()); ++i)
      d.loss = std::max(d.loss, std::abs(x[i].at("loss").get<double>() - y[i].at("loss").get<double>()));
    const auto held = [](const Json& last) { return last.at("held_out").at("held.txt").at("loss").get<double>(); };
    d.held_out = std::abs(held(x.back()) - held(y.back()));
    const Checkpoint m(scratch_ / a), n(scratch_ / b);
    std::size_t count = 0;
    for (const TensorSpec& spec : m.tensors()) {
      const auto v = m.read_f32(spec.name), w = n.read_f32(spec.name);
      for (std::size_t i = 0; i < v.size(); ++i, ++count) d.weights += std::abs(static_cast<double>(v[i] - w[i]));
    }
    d.weights /= static_cast<double>(count);
    return d;
  }
  void two_equal_one(const Arguments& one, const std::string& a, const Arguments& two, const std::string& b, int size) {
    alone(one);
    Job job(scratch_ / "rank", size, two);
    ASSERT_EQ(job.wait(), std::vector<int>(static_cast<std::size_t>(size), 0)) << job.errors();
    const Difference d = compare(a, b);
    EXPECT_LT(d.loss, 2e-5);
    EXPECT_LT(d.held_out, 2e-5);
    EXPECT_LT(d.weights, 1e-5);  // in the mean: Adam turns a gradient near zero into a step of any sign
  }
  Scratch scratch_{"ranks"};
};

}  // namespace pare::testing
