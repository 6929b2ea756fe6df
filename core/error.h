// The one error type of pare: every failure names its place, what was expected, what was found and what to do.
#pragma once

#include <stdexcept>
#include <string>

namespace pare {

// Process exit codes; `main` maps an Error to one of them and nothing else calls exit().
enum class ExitCode : int {
  kOk = 0,
  kFailure = 1,       // run-time failure (I/O, out of memory, a stage that did not act)
  kUsage = 2,         // command line or recipe
  kInput = 3,         // input invalid or unsupported
  kQuality = 4,       // quality gate missed
  kResources = 5,     // refused in advance: disk, memory, device
  kInterrupted = 130  // stopped by the user after a clean checkpoint
};

class Error : public std::runtime_error {
 public:
  // place: file, tensor or recipe key. Any of expected/found/hint may be empty.
  Error(ExitCode code, std::string place, std::string expected, std::string found, std::string hint = {});

  ExitCode code() const { return code_; }
  const std::string& place() const { return place_; }
  const std::string& expected() const { return expected_; }
  const std::string& found() const { return found_; }
  const std::string& hint() const { return hint_; }

 private:
  ExitCode code_;
  std::string place_, expected_, found_, hint_;
};

// Shorthands for the common classes; same argument order.
Error input_error(std::string place, std::string expected, std::string found, std::string hint = {});
Error usage_error(std::string place, std::string expected, std::string found, std::string hint = {});
Error failure(std::string place, std::string expected, std::string found, std::string hint = {});

}  // namespace pare
