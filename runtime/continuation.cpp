#include "runtime/continuation.h"

#include <algorithm>
#include <chrono>
#include <cmath>

#include "core/error.h"

namespace pare {
namespace {

using Clock = std::chrono::steady_clock;
double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

bool is_end(const std::vector<std::int64_t>& ends, std::int32_t id) {
  return std::find(ends.begin(), ends.end(), id) != ends.end();
}

class ByModel : public Continuation {
 public:
  ByModel(std::shared_ptr<const Engine> model, Sampler& sampler, std::vector<std::int64_t> ends,
          std::unique_ptr<Drafter> drafter, AcceptanceRule rule)
      : config_(model->config()),
        session_(std::move(model)),
        sampler_(sampler),
        ends_(std::move(ends)),
        drafter_(std::move(drafter)),
        rule_(rule) {}

  void feed(std::span<const std::int32_t> ids) override {
    text_.resize(static_cast<std::size_t>(session_.position()));
    passes_ = made_in_passes_ = drafted_ = tested_ = accepted_ = 0;
    seconds_ = 0;
    if (drafter_) drafter_->restart_counts();
    if (ids.empty()) return;
    session_.feed(ids);
    rows_ = static_cast<std::int64_t>(ids.size());
    text_.insert(text_.end(), ids.begin(), ids.end());
    if (drafter_) drafter_->follow(text_);
  }

  std::span<const std::int32_t> next(std::int64_t most) override {
    const auto held = static_cast<std::size_t>(session_.position());
    const std::size_t unfed = text_.size() - held;  // the token given last, or none after feed()
    std::span<const Guess> guesses;
    if (unfed > 0) {
      if (drafter_) guesses = drafter_->guess(text_, most_guesses(most));
      fed_.assign(text_.begin() + static_cast<std::ptrdiff_t>(held), text_.end());
      for (const Guess& guess : guesses) fed_.push_back(guess.id);
    }
    const auto begun = Clock::now();
    if (unfed > 0) {
      session_.feed(fed_);
      rows_ = static_cast<std::int64_t>(fed_.size());
      ++passes_;
    }
    const auto vocab = static_cast<std::size_t>(config_.vocab_size);
    const std::size_t rows = guesses.size() + 1;
    logits_.resize(rows * vocab);
    session_.logits(rows_ - static_cast<std::int64_t>(rows), static_cast<std::int64_t>(rows), logits_.data());
    seconds_ += unfed > 0 ? seconds_since(begun) : 0;
    made_.clear();
    for (std::size_t i = 0; i < rows; ++i) {
      sampler_.weigh({logits_.data() + i * vocab, vocab}, choices_);
      if (i == guesses.size()) {
        made_.push_back(sampler_.draw(choices_));
        break;
      }
      const Verdict verdict = rule_(choices_, guesses[i], sampler_);
      made_.push_back(verdict.id);
      ++tested_;
      if (!verdict.accepted) break;
      ++accepted_;
      if (is_end(ends_, verdict.id)) break;
    }
    drafted_ += static_cast<std::int64_t>(guesses.size());
    if (unfed > 0) made_in_passes_ += static_cast<std::int64_t>(made_.size());
    text_.insert(text_.end(), made_.begin(), made_.end());
    if (const auto keep = static_cast<std::int64_t>(text_.size()) - 1; keep < session_.position())
      session_.truncate(keep);
    return made_;
  }

  std::int64_t position() const override { return session_.position(); }
  std::int64_t room() const override { return config_.max_position_embeddings - session_.position(); }
  void reset() override {
    session_.reset();
    text_.clear();
  }

  Json counts() const override {
    if (!drafter_) return nullptr;
    const auto share = [](std::int64_t part, std::int64_t of) {
      return of > 0 ? Json(static_cast<double>(part) / static_cast<double>(of)) : Json(nullptr);
    };
    Json out = {{"passes", passes_},
                {"tokens", made_in_passes_},
                {"tokens_per_pass", share(made_in_passes_, passes_)},
                {"drafted", drafted_},
                {"tested", tested_},
                {"accepted", accepted_},
                {"accepted_of_drafted", share(accepted_, drafted_)},
                {"accepted_of_tested", share(accepted_, tested_)},
                {"model_seconds", seconds_}};
    drafter_->count(out);
    return out;
  }

 private:
  // How many guesses a pass for `most` tokens can take along: as many as there is room for, and not across LongRoPE's
  // switch, behind which the tokens before it are turned otherwise.
  std::int64_t most_guesses(std::int64_t most) const {
    const auto length = static_cast<std::int64_t>(text_.size());
    std::int64_t count = std::min(most - 1, config_.max_position_embeddings - length);
    while (count > 0 && rope_beyond(config_, length + count) != rope_beyond(config_, length)) --count;
    return std::max<std::int64_t>(count, 0);
  }

  const ModelConfig& config_;
  Session session_;
  Sampler& sampler_;
  std::vector<std::int64_t> ends_;
  std::unique_ptr<Drafter> drafter_;
  AcceptanceRule rule_;
  std::vector<std::int32_t> text_, fed_, made_;
  std::vector<float> logits_;
  Choices choices_;
  std::int64_t rows_ = 0;  // of the session's last call
  std::int64_t passes_ = 0, made_in_passes_ = 0, drafted_ = 0, tested_ = 0, accepted_ = 0;
  double seconds_ = 0;  // in those passes
};

// A session that is made to hold a text which changes at its end.
class Follower {
 public:
  // Ids are given to it as the model has them: below vocab_size, whatever it is sent.
  explicit Follower(const std::shared_ptr<const Engine>& engine)
      : session_(engine), vocab_(engine->config().vocab_size), limit_(engine->config().max_position_embeddings) {}

  std::int64_t limit() const { return limit_; }
  std::int64_t passes() const { return passes_; }
  std::int64_t fed() const { return fed_; }

  // Takes it to the end of `text`, which is not empty and within limit(); its last row predicts what follows.
  void hold(std::span<const std::int32_t> text) {
    const auto known = std::mismatch(held_.begin(), held_.end(), text.begin(), text.end()).first - held_.begin();
    auto keep = std::min(static_cast<std::int64_t>(known), static_cast<std::int64_t>(text.size()) - 1);
    if (!session_.can_truncate(keep)) keep = 0;
    session_.truncate(keep);
    held_.resize(static_cast<std::size_t>(keep));
    append(text.subspan(static_cast<std::size_t>(keep)));
  }
  void append(std::span<const std::int32_t> ids) {
    own_.assign(ids.begin(), ids.end());
    // Of the padding behind the tokens one model may have more; what such an id would mean nobody has learned.
    for (std::int32_t& id : own_) id = id < vocab_ ? id : 0;
    session_.feed(own_);
    held_.insert(held_.end(), ids.begin(), ids.end());
    rows_ = static_cast<std::int64_t>(ids.size());
    ++passes_;
    fed_ += rows_;
  }
  // Behind the last token, the first `count` ids of the vocabulary.
  std::span<const float> logits(std::int64_t count) {
    logits_.resize(static_cast<std::size_t>(vocab_));
    session_.logits(rows_ - 1, 1, logits_.data());
    return {logits_.data(), static_cast<std::size_t>(std::min(count, vocab_))};
  }
  void restart_counts() { passes_ = fed_ = 0; }

 private:
  Session session_;
  std::int64_t vocab_, limit_, rows_ = 0, passes_ = 0, fed_ = 0;
  std::vector<std::int32_t> held_, own_;
  std::vector<float> logits_;
};

class ModelDrafter : public Drafter {
 public:
  ModelDrafter(const std::shared_ptr<const Engine>& draft, std::int64_t vocab_size, Sampler& sampler,
               const DraftOptions& options)
      : model_(draft), vocab_(vocab_size), sampler_(sampler), options_(options) {
    guesses_.resize(static_cast<std::size_t>(std::max<std::int64_t>(options.tokens, 0)));
  }

  void follow(std::span<const std::int32_t> text) override {
    if (static_cast<std::int64_t>(text.size()) <= model_.limit()) model_.hold(text);
    restart_counts();
  }

  std::span<const Guess> guess(std::span<const std::int32_t> text, std::int64_t most) override {
    // The last guess needs no position of its own.
    most = std::min({most, options_.tokens, model_.limit() + 1 - static_cast<std::int64_t>(text.size())});
    if (most <= 0) return {};
    const auto begun = Clock::now();
    model_.hold(text);
    std::size_t made = 0;
    double sure = 1;  // that all guesses so far stand, as the draft sees it
    while (true) {
      const std::span<const float> logits = model_.logits(vocab_);
      Guess& guess = guesses_[made];
      sampler_.weigh(logits, guess.from);
      guess.id = sampler_.draw(guess.from);
      if (static_cast<std::int64_t>(++made) == most || is_end(options_.ends, guess.id)) break;
      if (options_.confidence > 0 && (sure *= probability_of(logits, guess.id)) < options_.confidence) break;
      model_.append({&guess.id, 1});
    }
    seconds_ += seconds_since(begun);
    return {guesses_.data(), made};
  }

  void count(Json& out) const override {
    out["draft_passes"] = model_.passes();
    out["draft_seconds"] = seconds_;
  }
  void restart_counts() override {
    model_.restart_counts();
    seconds_ = 0;
  }

 private:
  Follower model_;
  std::int64_t vocab_;
  Sampler& sampler_;
  DraftOptions options_;
  std::vector<Guess> guesses_;
  double seconds_ = 0;
};

class LookupDrafter : public Drafter {
 public:
  LookupDrafter(std::int64_t longest, const DraftOptions& options) : longest_(longest), options_(options) {}

  void follow(std::span<const std::int32_t>) override {}

  std::span<const Guess> guess(std::span<const std::int32_t> text, std::int64_t most) override {
    guesses_.clear();
    const auto size = static_cast<std::int64_t>(text.size());
    most = std::min(most, options_.tokens);
    std::int64_t best = 0, from = 0;  // tokens that agree, and where what followed them begins
    for (std::int64_t end = size - 1; end > 0 && best < longest_ && most > 0; --end) {
      std::int64_t same = 0;
      while (same < std::min(longest_, end) && text[static_cast<std::size_t>(end - 1 - same)] ==
                                                   text[static_cast<std::size_t>(size - 1 - same)])
        ++same;
      if (same > best) {
        best = same;
        from = end;
      }
    }
    for (std::int64_t i = from; best > 0 && i < from + most; ++i) {  // what repeats goes on beyond the text's end
      const std::int32_t id = i < size ? text[static_cast<std::size_t>(i)]
                                       : guesses_[static_cast<std::size_t>(i - size)].id;
      guesses_.push_back({id, Choices::certain(id)});
      if (is_end(options_.ends, id)) break;
    }
    return guesses_;
  }

 private:
  std::int64_t longest_;
  DraftOptions options_;
  std::vector<Guess> guesses_;
};

class WithFallback : public Continuation {
 public:
  WithFallback(const std::shared_ptr<const Engine>& small, const std::shared_ptr<const Engine>& large,
               double threshold, Sampler& sampler)
      : small_(small),
        large_(large),
        limit_(std::min(small_.limit(), large_.limit())),
        vocab_(std::min(small->config().vocab_size, large->config().vocab_size)),
        threshold_(threshold),
        sampler_(sampler) {}

  void feed(std::span<const std::int32_t> ids) override {
    text_.resize(static_cast<std::size_t>(position_));
    small_.restart_counts();
    large_.restart_counts();
    tokens_ = handed_over_ = 0;
    large_seconds_ = 0;
    if (ids.empty()) return;
    if (static_cast<std::int64_t>(ids.size()) > limit_ - position_) {
      throw input_error("context", "at most " + std::to_string(limit_) + " positions (the shorter of both models)",
                        std::to_string(position_ + static_cast<std::int64_t>(ids.size())), "shorten the text");
    }
    text_.insert(text_.end(), ids.begin(), ids.end());
    small_.hold(text_);
    position_ = static_cast<std::int64_t>(text_.size());
    small_.restart_counts();
  }

  std::span<const std::int32_t> next(std::int64_t) override {
    if (position_ < static_cast<std::int64_t>(text_.size())) {
      small_.append(std::span(text_).subspan(static_cast<std::size_t>(position_)));
      position_ = static_cast<std::int64_t>(text_.size());
    }
    std::span<const float> logits = small_.logits(vocab_);
    ++tokens_;
    if (top_probability(logits) < threshold_) {
      const auto begun = Clock::now();
      large_.hold(text_);
      logits = large_.logits(vocab_);
      ++handed_over_;
      large_seconds_ += seconds_since(begun);
    }
    given_ = sampler_(logits);
    text_.push_back(given_);
    return {&given_, 1};
  }

  std::int64_t position() const override { return position_; }
  std::int64_t room() const override { return limit_ - position_; }
  void reset() override {
    text_.clear();
    position_ = 0;
  }

  Json counts() const override {
    return {{"tokens", tokens_},
            {"handed_over", handed_over_},
            {"handed_over_share",
             tokens_ > 0 ? Json(static_cast<double>(handed_over_) / static_cast<double>(tokens_)) : Json(nullptr)},
            {"large_passes", large_.passes()},
            {"large_positions", large_.fed()},
            {"large_seconds", large_seconds_}};
  }

 private:
  Follower small_, large_;
  std::int64_t limit_, vocab_;
  double threshold_;
  Sampler& sampler_;
  std::vector<std::int32_t> text_;
  std::int64_t position_ = 0;  // of the small model, which all are fed to
  std::int32_t given_ = 0;
  std::int64_t tokens_ = 0, handed_over_ = 0;
  double large_seconds_ = 0;
};

}  // namespace

Verdict accept_or_replace(const Choices& model, const Guess& guess, Sampler& sampler) {
  if (sampler.uniform() * guess.from.probability(guess.id) < model.probability(guess.id)) return {guess.id, true};
  thread_local std::vector<double> drafted;  // q by id
  std::int32_t highest = 0;
  for (const Choices::Choice& choice : guess.from.all) highest = std::max(highest, choice.id);
  drafted.assign(static_cast<std::size_t>(highest) + 1, 0);
  for (const Choices::Choice& choice : guess.from.all)
    drafted[static_cast<std::size_t>(choice.id)] = choice.weight / guess.from.total;
  Choices rest;
  for (Choices::Choice choice : model.all) {
    const auto id = static_cast<std::size_t>(choice.id);
    choice.weight = choice.weight / model.total - (id < drafted.size() ? drafted[id] : 0);
    if (choice.weight <= 0) continue;
    rest.total += choice.weight;
    rest.all.push_back(choice);
  }
  // Nothing is left only where both are the same but for rounding.
  return {sampler.draw(rest.all.empty() ? model : rest), false};
}

std::unique_ptr<Continuation> continue_by(std::shared_ptr<const Engine> model, Sampler& sampler,
                                          std::vector<std::int64_t> ends, std::unique_ptr<Drafter> drafter,
                                          AcceptanceRule rule) {
  return std::make_unique<ByModel>(std::move(model), sampler, std::move(ends), std::move(drafter), rule);
}

std::unique_ptr<Continuation> continue_with_fallback(std::shared_ptr<const Engine> small,
                                                     std::shared_ptr<const Engine> large, double threshold,
                                                     Sampler& sampler) {
  return std::make_unique<WithFallback>(small, large, threshold, sampler);
}

std::unique_ptr<Drafter> model_drafter(std::shared_ptr<const Engine> draft, std::int64_t vocab_size, Sampler& sampler,
                                       const DraftOptions& options) {
  return std::make_unique<ModelDrafter>(draft, vocab_size, sampler, options);
}

std::unique_ptr<Drafter> lookup_drafter(std::int64_t longest, const DraftOptions& options) {
  return std::make_unique<LookupDrafter>(longest, options);
}

double probability_of(std::span<const float> logits, std::int32_t id) {
  float peak = -INFINITY;
  for (const float logit : logits) peak = std::max(peak, logit);
  double total = 0;
  for (const float logit : logits) total += static_cast<double>(std::exp(logit - peak));
  if (!(total >= 1) || !std::isfinite(total))
    throw failure("logits", "numbers", "values that are not finite", "check the weights with `pare verify`");
  return static_cast<double>(std::exp(logits[static_cast<std::size_t>(id)] - peak)) / total;
}

double top_probability(std::span<const float> logits) {
  const auto best = std::max_element(logits.begin(), logits.end());
  return probability_of(logits, static_cast<std::int32_t>(best - logits.begin()));
}

void require_same_tokens(const Engine& model, const Engine& other) {
  const std::string place = other.file().path().filename().string(), name = model.file().path().filename().string();
  const char* hint = "both must have been made with the same tokenizer, as a model and its student are";
  if (model.file().embedded("tokenizer.json") == other.file().embedded("tokenizer.json")) return;
  const Tokenizer &a = model.tokenizer(), &b = other.tokenizer();
  if (a.size() != b.size()) {
    throw input_error(place, "the " + std::to_string(a.size()) + " tokens of " + name, std::to_string(b.size()), hint);
  }
  for (std::int32_t id = 0; id < a.size(); ++id) {
    if (a.token(id) == b.token(id) && a.is_special(id) == b.is_special(id)) continue;
    throw input_error(place, "token " + std::to_string(id) + " as in " + name + ", \"" + a.token(id) + "\"",
                      "\"" + b.token(id) + "\"", hint);
  }
}

}  // namespace pare
