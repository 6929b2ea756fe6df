// What a command may use besides its options, passed explicitly: no globals but the interrupt flag, which a
// signal handler has to reach.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <string_view>

#include "core/report.h"

namespace pare {

// Progress on stderr: one rewritten line on a terminal, a plain line every few seconds otherwise; silent with
// quiet. Thread-safe. The caller states rate and loss in `detail`; ETA and resident memory are added here.
class Progress {
 public:
  explicit Progress(bool quiet = false);
  ~Progress();
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;
  void begin(std::string title, std::int64_t total);  // total <= 0: unknown
  void update(std::int64_t done, std::string_view detail = {});
  void end(std::string_view summary = {});
  void note(std::string_view line);                   // a full line on stderr that stays

 private:
  struct State;
  State* state_;
};

class Ranks;  // of model/: the processes of one job

struct Context {
  bool json = false;          // stdout carries exactly one JSON object
  bool quiet = false;
  int threads = 0;            // 0: all cores of the machine
  std::uint64_t seed = 0;
  bool seed_given = false;    // on the command line, 0 included: stands over a recipe's
  Progress* progress = nullptr;  // never null inside a command
  Ranks* ranks = nullptr;        // null: this process alone
  int rank = 0;                  // others than 0 print no result
  Report report;                 // rows added by the command
  // A stage calls this when its folder and its rows are complete, just before the folder gets its final name.
  std::function<void()> before_commit = {};
  void print(std::string_view text) const;  // result text on stdout; nothing in JSON mode
};

// SIGINT/SIGTERM set the flag; long loops poll it, checkpoint and throw Error(kInterrupted).
void install_interrupt_handler();
bool interrupt_requested();
void throw_if_interrupted(const std::string& place, const std::string& how_to_resume);

std::uint64_t resident_bytes();       // current
std::uint64_t peak_resident_bytes();  // of this process so far

}  // namespace pare
