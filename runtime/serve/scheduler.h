// Requests of several clients computed together: a pass of the model takes the next token of every sequence that is
// being decoded and, beside them, as many tokens of new prompts as keep it short. What a sequence gets is what it
// would get alone, bit for bit.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "runtime/engine.h"
#include "runtime/serve/api_error.h"

namespace pare::serve {

using Clock = std::chrono::steady_clock;

// What a client asks for. Every prompt becomes one sequence.
struct Work {
  std::vector<std::vector<std::int32_t>> prompts;  // at least one; none empty, none beyond the context
  std::int64_t most_tokens = 0;                    // new ones, of each sequence
  SamplerOptions sampling;                         // sequence i draws with seed + i
  std::vector<std::string> stops;                  // none empty
  std::vector<std::int64_t> ends;                  // tokens that end a text
  bool echo = false;                               // the prompt belongs to the text
  std::optional<int> alternatives;                 // set: log-probabilities, and so many of the likeliest tokens
  bool end_scored = false;                         // with alternatives: the token that ends a text is one of them
};

struct ScoredToken {
  struct Alternative {
    std::int32_t id;
    double log_prob;
  };
  std::int32_t id = 0;
  std::int64_t offset = 0;               // characters before it in the choice's text
  std::optional<double> log_prob;        // at temperature 1; none for the first token of a prompt
  std::vector<Alternative> likeliest;    // the most likely first
};

// What one sequence has newly given.
struct Delta {
  std::size_t index = 0;             // of its prompt
  std::string text;
  std::vector<ScoredToken> tokens;   // with Work::alternatives, otherwise empty
  std::int64_t made = 0;             // tokens of this sequence so far, without an end token
  const char* finish = nullptr;      // "stop" or "length" in the last one
};

// The results of one request as they come. The scheduler never waits for whoever reads them: a sequence whose results
// are not fetched stands still.
class Ticket {
 public:
  Ticket(Work work, Clock::time_point deadline) : work_(std::move(work)), deadline_(deadline) {}
  // The next result, or nothing within `patience`. Errors: ApiError where the request cannot be finished.
  std::optional<Delta> next(std::chrono::milliseconds patience);
  void cancel() { cancelled_ = true; }  // nobody wants the rest
  const Work& work() const { return work_; }

 private:
  friend class Scheduler;
  void put(Delta delta);
  void fail(ApiError problem);
  bool full() const;

  const Work work_;
  const Clock::time_point deadline_;
  std::atomic<bool> cancelled_{false};
  mutable std::mutex mutex_;
  std::condition_variable ready_;
  std::deque<Delta> results_;
  std::size_t held_bytes_ = 0;
  std::optional<ApiError> problem_;
  // Of the scheduler:
  std::size_t started_ = 0, finished_ = 0;  // sequences
  bool ended_ = false;
};

struct SchedulerOptions {
  int parallel = 4;             // sequences that are computed at a time
  int queue = 64;               // requests that wait beside those of which a sequence is computed
  std::int64_t context = 0;     // positions of a sequence
  std::chrono::milliseconds time_limit{600000};  // of a request, from its arrival
};

class Scheduler {
 public:
  Scheduler(std::shared_ptr<const Engine> engine, const SchedulerOptions& options);
  ~Scheduler();
  // Errors: ApiError 429 where the queue is full, 503 after close().
  std::shared_ptr<Ticket> submit(Work work);

  void close();                              // nothing new is taken; what has not begun fails
  bool wait_until_idle(Clock::time_point);   // true: nothing is left to compute
  void abort();                              // what is being computed fails

  struct Counts {
    std::int64_t running = 0, waiting = 0;  // sequences; requests of which none is running
    std::int64_t passes = 0, tokens = 0;    // of the model; that were fed, prompts included
    std::int64_t together = 0;              // the most sequences of one pass
    std::int64_t cut_off = 0;               // requests that failed because of close() or abort()
    bool closed = false;
  };
  Counts counts() const;

 private:
  struct Sequence;
  void run();
  void drop_and_admit();
  std::optional<ApiError> over(const Ticket& ticket) const;
  void end_ticket(Ticket& ticket);
  void fail_ticket(Ticket& ticket, const ApiError& problem);
  bool step();
  void feed(const std::vector<Sequence*>& fed, const std::vector<std::span<const std::int32_t>>& texts);
  void score_prompt(Sequence& sequence, std::int64_t count);
  void prompt_done(Sequence& sequence);
  void take_token(Sequence& sequence, std::span<const float> logits);
  void end_text(Sequence& sequence, const char* finish, std::optional<ScoredToken> end = std::nullopt);
  void give(Sequence& sequence, const char* finish);

  const std::shared_ptr<const Engine> engine_;
  const SchedulerOptions options_;
  std::vector<std::unique_ptr<Session>> sessions_;  // one a slot, kept from request to request; made when first needed
  std::vector<bool> taken_;                         // slots
  std::list<Sequence> running_;
  std::vector<float> logits_;

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::shared_ptr<Ticket>> waiting_;  // requests with sequences that have not begun
  int open_ = 0;                                 // requests that are not finished
  bool closed_ = false, aborted_ = false, ended_ = false;
  Counts counts_;
  std::thread thread_;
};

}  // namespace pare::serve
