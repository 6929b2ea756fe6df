#include "runtime/serve/scheduler.h"

#include <fmt/format.h>

#include <algorithm>

#include "core/error.h"
#include "eval/rows.h"
#include "runtime/serve/stop_text.h"

namespace pare::serve {
namespace {

constexpr std::int64_t kBesideDecoding = 60;      // prompt tokens of a pass in which others wait for their next token
constexpr std::size_t kMostHeldBytes = 64 << 10;  // results that a slow reader leaves, before its sequences stand still
constexpr std::int64_t kBlockLogits = std::int64_t{1} << 22;  // held at a time: 16 MiB, or one row
constexpr std::size_t kDecodedBefore = 32;  // tokens of a prompt that is not echoed
constexpr auto kLookAgain = std::chrono::milliseconds(10);    // where every sequence stands still

const ApiError kStopping(503, "the server is being stopped", {}, "shutting_down");

std::int64_t characters(const std::string& text) {
  return std::count_if(text.begin(), text.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xC0) != 0x80; });
}

std::size_t bytes_of(const Delta& delta) {
  std::size_t bytes = sizeof(Delta) + delta.text.size();
  for (const ScoredToken& token : delta.tokens)
    bytes += sizeof(ScoredToken) + token.likeliest.size() * sizeof(ScoredToken::Alternative);
  return bytes;
}

// The `most` likeliest ids of a row; ties: the lowest id first.
std::vector<ScoredToken::Alternative> likeliest(std::span<const float> row, const RowSoftmax& softmax, int most) {
  std::vector<std::int32_t> best;
  const auto before = [&](std::int32_t a, std::int32_t b) {
    const float x = row[static_cast<std::size_t>(a)], y = row[static_cast<std::size_t>(b)];
    return x != y ? x > y : a < b;
  };
  for (std::int32_t id = 0; id < static_cast<std::int32_t>(row.size()) && most > 0; ++id) {
    const bool full = static_cast<int>(best.size()) == most;
    if (full && !before(id, best.back())) continue;
    if (full) best.pop_back();
    best.insert(std::upper_bound(best.begin(), best.end(), id, before), id);
  }
  std::vector<ScoredToken::Alternative> out;
  for (const std::int32_t id : best) out.push_back({id, softmax.log_prob(row.data(), id)});
  return out;
}

ScoredToken scored(std::int32_t id, std::span<const float> row, int alternatives) {
  RowSoftmax softmax;
  if (!row_softmax(row.data(), static_cast<std::int64_t>(row.size()), softmax))
    throw ApiError(500, "the model gives logits that are not finite; check its file with `pare verify`");
  ScoredToken out;
  out.id = id;
  out.log_prob = softmax.log_prob(row.data(), id);
  out.likeliest = likeliest(row, softmax, alternatives);
  return out;
}

}  // namespace

std::optional<Delta> Ticket::next(std::chrono::milliseconds patience) {
  std::unique_lock lock(mutex_);
  ready_.wait_for(lock, patience, [&] { return !results_.empty() || problem_; });
  if (problem_) throw *problem_;
  if (results_.empty()) return std::nullopt;
  Delta delta = std::move(results_.front());
  results_.pop_front();
  held_bytes_ -= bytes_of(delta);
  return delta;
}

void Ticket::put(Delta delta) {
  const std::lock_guard lock(mutex_);
  held_bytes_ += bytes_of(delta);
  results_.push_back(std::move(delta));
  ready_.notify_all();
}

void Ticket::fail(ApiError problem) {
  const std::lock_guard lock(mutex_);
  problem_.emplace(std::move(problem));
  ready_.notify_all();
}

bool Ticket::full() const {
  const std::lock_guard lock(mutex_);
  return held_bytes_ > kMostHeldBytes;
}

struct Scheduler::Sequence {
  Sequence(std::shared_ptr<Ticket> whose, std::size_t of_prompt, std::size_t in_slot, Session& with,
           const Engine& engine)
      : ticket(std::move(whose)),
        index(of_prompt),
        slot(in_slot),
        session(with),
        sampler(sampling(ticket->work().sampling, index)),
        decoder(engine.tokenizer()),
        text(ticket->work().stops) {}
  static SamplerOptions sampling(SamplerOptions options, std::size_t index) {
    options.seed += index;
    return options;
  }
  const Work& work() const { return ticket->work(); }
  const std::vector<std::int32_t>& prompt() const { return work().prompts[index]; }
  bool reading() const { return fed < prompt().size(); }

  // A token of the choice; in its text, what it completes.
  struct Token {
    ScoredToken scored;
    std::size_t begin = 0, end = 0;  // bytes of the text before it, and with it
  };
  void push(ScoredToken token, bool of_prompt) {
    const std::size_t begin = text.length();
    token.offset = offset;
    const std::string piece = decoder.push(token.id);
    offset += characters(piece);
    of_prompt ? text.pass(piece) : text.push(piece);
    if (work().alternatives) tokens.push_back({std::move(token), begin, text.length()});
  }

  std::shared_ptr<Ticket> ticket;
  std::size_t index, slot;
  Session& session;
  Sampler sampler;
  StreamDecoder decoder;
  StopText text;
  std::size_t fed = 0;           // of the prompt
  std::vector<ScoredToken> prompt_scores;
  std::deque<Token> tokens;      // not given yet
  std::int64_t offset = 0;       // characters of the text
  std::int64_t made = 0;
  std::int32_t next = 0;         // behind the prompt: the token that is fed next
  bool over = false;
};

Scheduler::Scheduler(std::shared_ptr<const Engine> engine, const SchedulerOptions& options)
    : engine_(std::move(engine)),
      options_(options),
      sessions_(static_cast<std::size_t>(options.parallel)),
      taken_(static_cast<std::size_t>(options.parallel), false),
      thread_([this] { run(); }) {}

Scheduler::~Scheduler() {
  close();
  abort();
  {
    const std::lock_guard lock(mutex_);
    ended_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

std::shared_ptr<Ticket> Scheduler::submit(Work work) {
  auto ticket = std::make_shared<Ticket>(std::move(work), Clock::now() + options_.time_limit);
  const std::lock_guard lock(mutex_);
  if (closed_) throw kStopping;
  if (open_ >= options_.parallel + options_.queue)
    throw ApiError(429, fmt::format("{} requests are being answered or wait already; try again later", open_), {},
                   "queue_full");
  ++open_;
  waiting_.push_back(ticket);
  changed_.notify_all();
  return ticket;
}

void Scheduler::close() {
  const std::lock_guard lock(mutex_);
  closed_ = true;
  changed_.notify_all();
}

bool Scheduler::wait_until_idle(Clock::time_point deadline) {
  std::unique_lock lock(mutex_);
  return changed_.wait_until(lock, deadline, [&] { return open_ == 0; });
}

void Scheduler::abort() {
  const std::lock_guard lock(mutex_);
  aborted_ = true;
  for (std::size_t i = 0; i < sessions_.size(); ++i)
    if (taken_[i]) sessions_[i]->cancel();
  changed_.notify_all();
}

Scheduler::Counts Scheduler::counts() const {
  const std::lock_guard lock(mutex_);
  Counts out = counts_;
  out.closed = closed_;
  out.running = std::count(taken_.begin(), taken_.end(), true);
  out.waiting = std::count_if(waiting_.begin(), waiting_.end(), [](const auto& t) { return t->started_ == 0; });
  return out;
}

void Scheduler::run() {
  while (true) {
    {
      std::unique_lock lock(mutex_);
      changed_.wait(lock, [&] { return ended_ || !waiting_.empty() || !running_.empty(); });
      drop_and_admit();
      if (ended_ && running_.empty() && waiting_.empty()) return;
    }
    if (step()) continue;
    std::unique_lock lock(mutex_);
    changed_.wait_for(lock, kLookAgain);
  }
}

// Why the request of a ticket is not computed any further; a cancelled one has nobody who would read it.
std::optional<ApiError> Scheduler::over(const Ticket& ticket) const {
  if (ticket.cancelled_) return ApiError(499, "the client has gone");
  if (aborted_ || (closed_ && ticket.started_ == 0)) return kStopping;
  if (Clock::now() >= ticket.deadline_)
    return ApiError(504, fmt::format("not finished within {} seconds", 1e-3 * options_.time_limit.count()), {},
                    "timeout");
  return std::nullopt;
}

void Scheduler::end_ticket(Ticket& ticket) {
  if (ticket.ended_) return;
  ticket.ended_ = true;
  --open_;
  changed_.notify_all();
}

void Scheduler::fail_ticket(Ticket& ticket, const ApiError& problem) {
  end_ticket(ticket);
  counts_.cut_off += problem.status == kStopping.status;
  ticket.fail(problem);
}

// Under mutex_.
void Scheduler::drop_and_admit() {
  const auto fail_if_over = [&](Ticket& ticket) {
    if (ticket.ended_) return;
    if (const auto problem = over(ticket)) fail_ticket(ticket, *problem);
  };
  for (Sequence& sequence : running_)
    if (!sequence.over) fail_if_over(*sequence.ticket);
  for (const auto& ticket : waiting_) fail_if_over(*ticket);
  running_.remove_if([&](const Sequence& sequence) {
    const bool gone = sequence.over || sequence.ticket->ended_;
    if (gone) taken_[sequence.slot] = false;
    return gone;
  });
  std::erase_if(waiting_, [](const auto& ticket) { return ticket->ended_; });
  // One sequence of every request by turns, so that one with many prompts does not keep the others waiting.
  while (!waiting_.empty()) {
    const auto slot = static_cast<std::size_t>(std::find(taken_.begin(), taken_.end(), false) - taken_.begin());
    if (slot == taken_.size()) return;
    const std::shared_ptr<Ticket> ticket = std::move(waiting_.front());
    waiting_.pop_front();
    try {
      if (!sessions_[slot]) sessions_[slot] = std::make_unique<Session>(engine_, options_.context);
      sessions_[slot]->reset();
      running_.emplace_back(ticket, ticket->started_, slot, *sessions_[slot], *engine_);
    } catch (const std::exception& problem) {
      fail_ticket(*ticket, ApiError(500, problem.what()));
      continue;
    }
    taken_[slot] = true;
    if (++ticket->started_ < ticket->work().prompts.size()) waiting_.push_back(ticket);
  }
}

// One pass of the model. False: every sequence stands still.
bool Scheduler::step() {
  std::vector<Sequence*> fed, readers;
  std::vector<std::span<const std::int32_t>> texts;
  for (Sequence& sequence : running_) {
    if (sequence.ticket->full()) continue;
    if (sequence.reading()) {
      readers.push_back(&sequence);
    } else {
      fed.push_back(&sequence);
      texts.push_back({&sequence.next, 1});
    }
  }
  if (fed.empty() && readers.empty()) return false;
  std::int64_t room = Session::kMostFedTogether - static_cast<std::int64_t>(fed.size());
  if (!fed.empty()) room = std::min(room, kBesideDecoding);
  const ModelConfig& config = engine_->config();
  for (std::size_t i = 0; i < readers.size(); ++i) {
    Sequence& reader = *readers[i];
    const auto rest = std::span(reader.prompt()).subspan(reader.fed);
    // LongRoPE turns a text by its whole length: one that is longer than the switch is fed in one piece.
    if (rope_beyond(config, static_cast<std::int64_t>(reader.prompt().size())) && !rope_beyond(config, 1)) {
      feed({&reader}, {rest});
      continue;
    }
    if (room == 0) break;
    const std::int64_t share = std::max<std::int64_t>(1, room / static_cast<std::int64_t>(readers.size() - i));
    const std::size_t count = std::min(rest.size(), static_cast<std::size_t>(share));
    room -= static_cast<std::int64_t>(count);
    fed.push_back(&reader);
    texts.push_back(rest.first(count));
  }
  feed(fed, texts);
  return true;
}

void Scheduler::feed(const std::vector<Sequence*>& fed, const std::vector<std::span<const std::int32_t>>& texts) {
  if (fed.empty()) return;
  const auto fail = [&](Sequence& sequence, const ApiError& problem) {
    const std::lock_guard lock(mutex_);
    fail_ticket(*sequence.ticket, problem);
    sequence.over = true;
  };
  std::vector<Session*> sessions;
  std::int64_t tokens = 0;
  for (std::size_t i = 0; i < fed.size(); ++i) {
    sessions.push_back(&fed[i]->session);
    tokens += static_cast<std::int64_t>(texts[i].size());
  }
  const auto vocab = static_cast<std::size_t>(engine_->config().vocab_size);
  const auto stopping = [&] {
    const std::lock_guard lock(mutex_);
    return aborted_;
  };
  // False: the sequence failed, and it alone.
  const auto attempt = [&](Sequence& sequence, const auto& body) {
    try {
      body();
      return true;
    } catch (const std::exception& problem) {
      const auto* api = dynamic_cast<const ApiError*>(&problem);
      fail(sequence, stopping() ? kStopping
                     : api      ? *api
                                : ApiError(500, problem.what()));
      return false;
    }
  };
  bool together = fed.size() > 1;
  try {
    if (together) Session::feed_each(sessions, texts);
  } catch (const std::exception&) {
    together = false;  // nothing was fed; alone, those that can be fed give the same
  }
  std::vector<Sequence*> choosing;
  sessions.clear();
  for (std::size_t i = 0; i < fed.size(); ++i) {
    Sequence& sequence = *fed[i];
    const bool fine = attempt(sequence, [&] {
      if (!together) {
        if (stopping()) throw kStopping;
        sequence.session.feed(texts[i]);
      }
      if (!sequence.reading()) return;
      sequence.fed += texts[i].size();
      if (sequence.work().echo && sequence.work().alternatives)
        score_prompt(sequence, static_cast<std::int64_t>(texts[i].size()));
      if (!sequence.reading()) prompt_done(sequence);
    });
    if (!fine || sequence.over || sequence.reading()) continue;
    choosing.push_back(&sequence);
    sessions.push_back(&sequence.session);
  }
  try {
    logits_.resize(std::max(logits_.size(), choosing.size() * vocab));
    Session::logits_each(sessions, logits_.data());
  } catch (const std::exception& problem) {
    for (Sequence* const sequence : choosing) fail(*sequence, ApiError(500, problem.what()));
    return;
  }
  for (std::size_t i = 0; i < choosing.size(); ++i)
    attempt(*choosing[i], [&] { take_token(*choosing[i], {logits_.data() + i * vocab, vocab}); });
  const std::lock_guard lock(mutex_);
  ++counts_.passes;
  counts_.tokens += tokens;
  counts_.together = std::max(counts_.together, static_cast<std::int64_t>(fed.size()));
}

// The last `count` tokens of the prompt that were fed: what their rows say of the tokens behind them.
void Scheduler::score_prompt(Sequence& sequence, std::int64_t count) {
  const auto vocab = static_cast<std::int64_t>(engine_->config().vocab_size);
  const std::vector<std::int32_t>& prompt = sequence.prompt();
  const auto first = static_cast<std::int64_t>(sequence.fed) - count;
  const auto rows = std::min(count, static_cast<std::int64_t>(prompt.size()) - 1 - first);
  const std::int64_t block = std::max<std::int64_t>(1, kBlockLogits / vocab);
  for (std::int64_t begin = 0; begin < rows; begin += block) {
    const std::int64_t n = std::min(block, rows - begin);
    logits_.resize(std::max(logits_.size(), static_cast<std::size_t>(n * vocab)));
    sequence.session.logits(begin, n, logits_.data());
    for (std::int64_t i = 0; i < n; ++i) {
      const std::int32_t id = prompt[static_cast<std::size_t>(first + begin + i + 1)];
      sequence.prompt_scores.push_back(scored(id, {logits_.data() + i * vocab, static_cast<std::size_t>(vocab)},
                                              *sequence.work().alternatives));
    }
  }
}

void Scheduler::prompt_done(Sequence& sequence) {
  const std::vector<std::int32_t>& prompt = sequence.prompt();
  // Where the prompt is no part of the text, its end is all that what follows may depend on.
  const std::size_t first = sequence.work().echo ? 0 : prompt.size() - std::min(prompt.size(), kDecodedBefore);
  for (std::size_t i = first; i < prompt.size(); ++i) {
    if (!sequence.work().echo) {
      sequence.decoder.push(prompt[i]);
      continue;
    }
    ScoredToken token;
    token.id = prompt[i];
    if (i > 0 && sequence.work().alternatives) token = std::move(sequence.prompt_scores[i - 1]);
    sequence.push(std::move(token), true);
  }
  sequence.prompt_scores.clear();
  if (sequence.work().most_tokens == 0) end_text(sequence, "length");
  else if (sequence.work().echo) give(sequence, nullptr);
}

void Scheduler::take_token(Sequence& sequence, std::span<const float> logits) {
  const Work& work = sequence.work();
  const std::int32_t id = sequence.sampler(logits);
  ScoredToken token;
  token.id = id;
  if (work.alternatives) token = scored(id, logits, *work.alternatives);
  if (std::find(work.ends.begin(), work.ends.end(), id) != work.ends.end())
    return end_text(sequence, "stop", work.end_scored ? std::optional(std::move(token)) : std::nullopt);
  ++sequence.made;
  sequence.push(std::move(token), false);
  sequence.next = id;
  const bool last = sequence.made == work.most_tokens || sequence.session.position() >= options_.context;
  if (sequence.text.stopped() || last) return end_text(sequence, "length");
  give(sequence, nullptr);
}

void Scheduler::end_text(Sequence& sequence, const char* finish, std::optional<ScoredToken> end) {
  if (!sequence.text.stopped()) {
    const std::string rest = sequence.decoder.finish();
    sequence.text.push(rest);
    sequence.offset += characters(rest);
  }
  if (end && sequence.work().alternatives && !sequence.text.stopped()) {  // it adds nothing to the text
    end->offset = sequence.offset;
    sequence.tokens.push_back({std::move(*end), sequence.text.length(), sequence.text.length()});
  }
  sequence.text.finish();
  {  // before the client can know it: whoever has an answer may ask again
    const std::lock_guard lock(mutex_);
    if (++sequence.ticket->finished_ == sequence.work().prompts.size()) end_ticket(*sequence.ticket);
  }
  give(sequence, sequence.text.stopped() ? "stop" : finish);
  sequence.over = true;
}

void Scheduler::give(Sequence& sequence, const char* finish) {
  Delta delta;
  delta.index = sequence.index;
  delta.text = sequence.text.take();
  delta.made = sequence.made;
  delta.finish = finish;
  const std::size_t settled = sequence.text.settled();
  while (!sequence.tokens.empty()) {
    Sequence::Token& token = sequence.tokens.front();
    if (token.end > settled && finish == nullptr) break;
    // What a stop string cut off has no tokens either.
    if (!sequence.text.stopped() || token.begin < settled) delta.tokens.push_back(std::move(token.scored));
    sequence.tokens.pop_front();
  }
  if (finish != nullptr || !delta.text.empty() || !delta.tokens.empty()) sequence.ticket->put(std::move(delta));
}

}  // namespace pare::serve
