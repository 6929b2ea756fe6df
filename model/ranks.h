// The ranks of one job: one command, started several times on one machine or on several, the way torchrun and mpirun
// start programs. They talk through LibTorch's c10d (Gloo). No LibTorch types here.
#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "core/context.h"
#include "core/error.h"
#include "core/options.h"

namespace at {
class Tensor;
}

namespace pare {

// From the environment: RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT (torchrun), else OMPI_COMM_WORLD_RANK,
// _SIZE, _LOCAL_RANK (mpirun), where the address may be missing if all ranks are on one machine. size 1: one process.
// Errors: exit 2 for what is incomplete or contradicts itself.
struct RankPlace {
  int rank = 0, size = 1;
  int local = -1;  // unknown
  std::string address;
  int port = 0;
};
RankPlace rank_place();

// Some rank ended or does not answer. The message names it and, where it could still say so, its reason.
class RankLost : public Error {
 public:
  using Error::Error;
};

// Every function that talks is called by all ranks in the same order and throws RankLost. Alone (size 1) each does
// what remains of it without any network.
class Ranks {
 public:
  Ranks();
  // Waits for all ranks. timeout: of joining and of every wait for another rank; a process that ends is noticed at
  // once by those that wait for it. Errors: exit 1 naming the address and the time; exit 5 where this build has no c10d.
  Ranks(const RankPlace& place, std::chrono::seconds timeout);
  ~Ranks();
  Ranks(const Ranks&) = delete;
  Ranks& operator=(const Ranks&) = delete;

  int rank() const { return place_.rank; }
  int size() const { return place_.size; }
  int local() const { return place_.local; }  // -1: unknown
  bool first() const { return place_.rank == 0; }
  bool alone() const { return place_.size == 1; }

  // Contiguous, float32, float64 or int64, on any device; every rank gets the same bits.
  void sum(const at::Tensor& values);
  void broadcast(const at::Tensor& values, int from = 0);
  // From one rank to another; the others do nothing.
  void move(const at::Tensor& values, int from, int to);
  std::string broadcast(const std::string& text);      // rank 0's
  // The same, but the others wait as long as rank 0 lives (at most a week): it may work alone for hours before. Call
  // wait_long on all ranks first.
  void wait_long();
  std::string broadcast_late(const std::string& text);
  std::vector<std::string> gather(const std::string& text);  // of every rank, on every rank
  bool any(bool flag);

  // Refuses (exit 2 on every rank) an object of which some rank has another value than rank 0; `what` names it.
  void agree(const std::string& what, const Json& mine);
  // Rank 0 does it, the others wait; where it fails, every rank throws the same error.
  void first_does(const std::function<void()>& work);
  // Error(exit 130) on all ranks where one of them was interrupted.
  void throw_if_interrupted(const std::string& place, const std::string& how_to_resume);

  // Tells the others why this rank ends, before its connections close.
  void leave(const std::string& reason) noexcept;

 private:
  struct Group;
  template <class Talk>
  void talk(const Talk& work, bool late = false);
  RankPlace place_;
  std::chrono::seconds timeout_{0};
  std::unique_ptr<Group> group_;
};

// Those of the run; one process alone where it has none.
Ranks& ranks_of(const Context& run);

// "cuda" becomes the device of this rank on its machine; other names stay. Error: exit 2 for "cuda" where the place of
// this rank on its machine is not known.
std::string rank_device(const std::string& name, const Context& run);

// The command with the option --rank-timeout, which joins the ranks of the environment around its run. Ranks other
// than 0 report no progress and print no result.
Command ranked(Command command, int timeout = 600);
// Error: exit 2, for a command that runs on one machine.
void refuse_ranks(const std::string& command, const std::string& hint);
// In words, for `pare doctor`.
std::string rank_backend();

}  // namespace pare
