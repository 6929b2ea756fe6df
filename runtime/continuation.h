// Continuing a text: one token a pass of the model, or several where guesses of what follows turn out right.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "core/json.h"
#include "runtime/engine.h"

namespace pare {

class Continuation {
 public:
  virtual ~Continuation() = default;
  // Appends to what is held; a token that next() gave last and that no pass has seen is forgotten before.
  virtual void feed(std::span<const std::int32_t> ids) = 0;
  // The next tokens, 1 to `most`; one of the model's ends is the last. The view lasts until the next call.
  virtual std::span<const std::int32_t> next(std::int64_t most) = 0;
  virtual std::int64_t position() const = 0;  // held: all that was fed or given but the token given last
  virtual std::int64_t room() const = 0;      // positions that are left
  virtual void reset() = 0;
  virtual Json counts() const { return nullptr; }  // since the last feed(); null where there is nothing to count
};

// A guess and the distribution that it was drawn from.
struct Guess {
  std::int32_t id = 0;
  Choices from;
};

class Drafter {
 public:
  virtual ~Drafter() = default;
  // `text` was fed to the model: what can be computed before the first guess.
  virtual void follow(std::span<const std::int32_t> text) = 0;
  // Up to `most` guesses of what follows; they last until the next call. Each may depend on `text` and on the guesses
  // before it alone, and so may whether it is made: a guess that is dropped after it was drawn would bend the result.
  virtual std::span<const Guess> guess(std::span<const std::int32_t> text, std::int64_t most) = 0;
  virtual void count(Json&) const {}
  virtual void restart_counts() {}
};

struct DraftOptions {
  std::int64_t tokens = 8;        // guesses a pass at most
  double confidence = 0;          // no further guess once the draft gives all of them together less than this
  std::vector<std::int64_t> ends; // tokens behind which nothing is guessed
};
// Guesses of a small model with the same tokens, drawn by `sampler`. Beyond its context it makes none.
std::unique_ptr<Drafter> model_drafter(std::shared_ptr<const Engine> draft, std::int64_t vocab_size, Sampler& sampler,
                                       const DraftOptions& options);
// What followed the last time when the text's last tokens stood there before: of `longest` to one of them, the most.
std::unique_ptr<Drafter> lookup_drafter(std::int64_t longest, const DraftOptions& options);

struct Verdict {
  std::int32_t id = 0;
  bool accepted = false;
};
using AcceptanceRule = Verdict (*)(const Choices& model, const Guess& guess, Sampler& sampler);
// The guess x with probability min(1, p(x) / q(x)), else a token drawn from max(0, p - q): distributed as p whatever q
// is (Leviathan, Kalman, Matias 2023; Chen et al. 2023).
Verdict accept_or_replace(const Choices& model, const Guess& guess, Sampler& sampler);

// By one model. With a drafter every pass takes its guesses along and keeps those that stand: the tokens are
// distributed as without, at temperature 0 they are the same. `ends`: tokens that end a text; `drafter` may be null.
std::unique_ptr<Continuation> continue_by(std::shared_ptr<const Engine> model, Sampler& sampler,
                                          std::vector<std::int64_t> ends, std::unique_ptr<Drafter> drafter = nullptr,
                                          AcceptanceRule rule = accept_or_replace);

// By the small model, token by token; where its likeliest token has a probability (temperature 1) below `threshold`,
// the large one reads what it has not seen yet and gives this token. The next one is the small model's again.
std::unique_ptr<Continuation> continue_with_fallback(std::shared_ptr<const Engine> small,
                                                     std::shared_ptr<const Engine> large, double threshold,
                                                     Sampler& sampler);

// At temperature 1: of a token, and of the likeliest one. Errors: exit 1, logits that are not finite.
double probability_of(std::span<const float> logits, std::int32_t id);
double top_probability(std::span<const float> logits);

// Errors: exit 3 where an id does not mean the same token in both. Rows of padding behind the tokenizer's ids may
// differ in number.
void require_same_tokens(const Engine& model, const Engine& other);

}  // namespace pare
