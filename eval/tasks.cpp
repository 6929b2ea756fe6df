#include "eval/tasks.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <map>

#include "core/error.h"
#include "core/tokenizer_text.h"
#include "eval/divergence.h"
#include "eval/rows.h"

namespace pare {
namespace {

constexpr std::size_t kMaxLine = 16 << 20;
constexpr std::int64_t kBlockLogits = std::int64_t{1} << 22;  // held at a time: 16 MiB, or one row

std::int64_t characters(std::string_view text) {
  std::int64_t n = 0;
  for (const char c : text) n += (static_cast<unsigned char>(c) & 0xC0) != 0x80;
  return n;
}

bool is_blank(char c) { return c == ' ' || c == '\n' || c == '\t' || c == '\r'; }

// What Python's str.isspace() and \s hold for white space.
bool is_python_space(char32_t code) { return tok::is_whitespace(code) || (code >= 0x1C && code <= 0x1F); }

// Bytes of valid UTF-8 up to the white space at its end, and from the white space at its beginning.
std::size_t end_without_space(std::string_view text) {
  std::size_t end = 0;
  for (std::size_t i = 0; i < text.size();)
    if (!is_python_space(tok::next_char(text, i))) end = i;
  return end;
}
std::size_t begin_without_space(std::string_view text) {
  for (std::size_t i = 0, begin = 0; i < text.size(); begin = i)
    if (!is_python_space(tok::next_char(text, i))) return begin;
  return text.size();
}

// Pieces that white space cuts a text into, empty ones at its ends included.
std::int64_t words(std::string_view text) {
  std::int64_t n = 1;
  bool inside = false;
  for (std::size_t i = 0; i < text.size();) {
    const bool space = is_python_space(tok::next_char(text, i));
    n += space && !inside;
    inside = space;
  }
  return n;
}

TaskItem::Pair pair_of(std::string context, std::string continuation, const std::string& written) {
  return {std::move(context), std::move(continuation), characters(written), std::ssize(written), words(written)};
}

// One line of a task file with its place, so that every complaint names file:line.
class Line {
 public:
  Line(const Json& json, std::string place) : json_(json), place_(std::move(place)) {}
  const std::string& place() const { return place_; }
  bool has(const char* key) const { return json_.contains(key); }

  std::string text(const char* key) const {
    const Json& value = field(key);
    if (!value.is_string()) throw input_error(place_, std::string("\"") + key + "\" to be a text", value.type_name());
    return value.get<std::string>();
  }

  std::int64_t index(const char* key, std::int64_t limit) const {
    const Json& value = field(key);
    const bool whole = value.is_number_integer() || value.is_number_unsigned();
    const bool fits = whole && !(value.is_number_unsigned() && value.get<std::uint64_t>() > INT32_MAX);
    const std::int64_t number = fits ? value.get<std::int64_t>() : -1;
    if (number < 0 || number >= limit) {
      throw input_error(place_,
                        std::string("\"") + key + "\" to be a whole number from 0 to " + std::to_string(limit - 1),
                        value.dump().substr(0, 60));
    }
    return number;
  }

  std::vector<std::string> texts(const char* key) const {
    const Json& value = field(key);
    std::vector<std::string> result;
    if (value.is_array()) {
      for (const Json& item : value) {
        if (!item.is_string()) break;
        result.push_back(item.get<std::string>());
      }
    }
    if (!value.is_array() || result.size() != value.size() || result.size() < 2) {
      throw input_error(place_, std::string("\"") + key + "\" to be a list of two texts or more",
                        value.dump(-1, ' ', false, Json::error_handler_t::replace).substr(0, 60));
    }
    return result;
  }

 private:
  const Json& field(const char* key) const {
    const auto it = json_.find(key);
    if (it == json_.end()) throw input_error(place_, std::string("key \"") + key + "\"", "no such key");
    return *it;
  }

  const Json& json_;
  std::string place_;
};

// lm-eval's target_delimiter: one blank between context and continuation.
std::string delimited(const std::string& continuation) {
  return " " + continuation;
}

enum class Shape { kChoices, kOptions, kContinuation, kPair, kText };

Shape shape_of(const Line& line) {
  if (line.has("query") && line.has("choices")) return Shape::kChoices;
  if (line.has("sentence_good")) return Shape::kPair;
  if (line.has("context") && line.has("continuation")) return Shape::kContinuation;
  if (line.has("sentence") && line.has("option1")) return Shape::kOptions;
  if (line.has("text")) return Shape::kText;
  throw input_error(line.place(),
                    "query/choices/gold, context/continuation, sentence_good/sentence_bad, "
                    "sentence/option1/option2/label or text",
                    "none of these sets of keys");
}

TaskItem item_of(const Line& line, Shape shape) {
  TaskItem item;
  switch (shape) {
    case Shape::kChoices: {
      const std::string query = line.text("query");
      for (const std::string& choice : line.texts("choices")) {
        item.pairs.push_back(pair_of(query, delimited(choice), choice));
      }
      item.gold = line.index("gold", static_cast<std::int64_t>(item.pairs.size()));
      break;
    }
    case Shape::kOptions: {
      const std::string sentence = line.text("sentence");
      const std::size_t gap = sentence.find('_');
      if (gap == std::string::npos) throw input_error(line.place(), "\"sentence\" with a gap \"_\"", "no gap");
      std::string rest = sentence.substr(gap + 1);
      rest.resize(end_without_space(rest));
      rest.erase(0, begin_without_space(rest));
      for (const char* key : {"option1", "option2"}) {
        const std::string context = sentence.substr(0, gap) + line.text(key);
        item.pairs.push_back(pair_of(context, delimited(rest), context));  // its choices are the contexts
      }
      item.gold = line.index("label", 2);
      break;
    }
    case Shape::kContinuation: {
      const std::string continuation = line.text("continuation");
      const bool has_blank = !continuation.empty() && is_blank(continuation.front());
      item.pairs.push_back(
          pair_of(line.text("context"), has_blank ? continuation : delimited(continuation), continuation));
      break;
    }
    case Shape::kPair:
      for (const char* key : {"sentence_good", "sentence_bad"}) {
        const std::string sentence = line.text(key);
        item.pairs.push_back(pair_of("", delimited(sentence), sentence));
      }
      break;
    case Shape::kText: {
      const std::string text = line.text("text");
      item.pairs.push_back(pair_of("", text, text));
      break;
    }
  }
  for (const TaskItem::Pair& pair : item.pairs) {
    const bool blank = std::all_of(pair.continuation.begin(), pair.continuation.end(), is_blank);
    if (blank) throw input_error(line.place(), "text to score", "an empty choice or continuation");
  }
  return item;
}

// The ids the model sees and how many of them, at the end, are scored.
struct Encoded {
  std::vector<std::int32_t> ids;
  std::int64_t scored = 0;
};

// As transformers' tokenizers do: special tokens are found in the text, and none is put before one that begins with
// what would stand in for its beginning.
std::vector<std::int32_t> encode_alone(const Tokenizer& tokenizer, const std::string& text,
                                       const TaskOptions& options) {
  const std::string prefix = tokenizer.decode(options.prefix_ids, false);
  const bool begun = !prefix.empty() && text.starts_with(prefix);
  return tokenizer.encode(text, !begun, true);
}

Encoded encode_pair(const Tokenizer& tokenizer, const TaskItem::Pair& pair, const TaskOptions& options,
                    const std::string& place) {
  Encoded result;
  std::int64_t context_ids = 0;
  if (pair.context.empty()) {
    result.ids = options.prefix_ids;
    const std::vector<std::int32_t> text = tokenizer.encode(pair.continuation, false, true);
    // A text that begins with the prefix itself gets no second one.
    if (!text.empty() && !result.ids.empty() && text.front() == result.ids.back()) result.ids.pop_back();
    context_ids = std::max<std::int64_t>(static_cast<std::int64_t>(result.ids.size()), 1);
    result.ids.insert(result.ids.end(), text.begin(), text.end());
    // Without any prefix the first token has nothing before it and cannot be scored.
  } else {
    // Trailing blanks of the context belong to the continuation, then one encoding is cut at the context's length.
    const std::string context = pair.context.substr(0, end_without_space(pair.context));
    result.ids = encode_alone(tokenizer, pair.context + pair.continuation, options);
    context_ids = std::ssize(encode_alone(tokenizer, context, options));
    if (context.empty()) context_ids = std::max<std::int64_t>(context_ids, 1);
  }
  const auto n = static_cast<std::int64_t>(result.ids.size());
  result.scored = n - std::max<std::int64_t>(context_ids, 1);
  if (result.scored < 1) throw input_error(place, "at least one token to score", "none");
  // lm-eval keeps the last context + 1 ids, the very last of which is only a target.
  const std::int64_t most = options.context > 0 ? options.context + 1 : n;
  if (result.scored > most - 1) {
    throw input_error(place, "a continuation of at most " + std::to_string(most - 1) + " tokens",
                      std::to_string(result.scored));
  }
  if (n > most) result.ids.erase(result.ids.begin(), result.ids.begin() + (n - most));
  return result;
}

struct PairScore {
  double log_prob = 0;
  bool greedy = true;  // every scored id is the argmax of its row
};

class Scorer {
 public:
  Scorer(LogitsSource& model, const Tokenizer& tokenizer, const TaskOptions& options)
      : model_(model), tokenizer_(tokenizer), options_(options) {}

  PairScore score(const TaskItem::Pair& pair, const std::string& place) {
    return score(encode_pair(tokenizer_, pair, options_, place), place);
  }

  // The log-probability of a text, in windows of the context that overlap by one id; the last one is filled up with
  // what stands before.
  double score_text(const std::string& text, const std::string& place) {
    const std::vector<std::int32_t> ids = tokenizer_.encode(text, false, true);
    if (ids.empty()) throw input_error(place, "at least one token to score", "none");
    if (options_.prefix_ids.empty())
      throw input_error(place, "a token that begins a text, of which the first one is predicted", "none in the model");
    const auto n = static_cast<std::int64_t>(ids.size());
    const std::int64_t most = options_.context > 0 ? options_.context : n;
    double sum = 0;
    for (std::int64_t end = 0; end < n;) {
      const std::int64_t count = std::min(most, n - end);
      Encoded window;
      window.scored = count;
      if (end == 0) window.ids.push_back(options_.prefix_ids.back());
      end += count;
      const std::int64_t begin = end == count ? 0 : end - most - 1;
      window.ids.insert(window.ids.end(), ids.begin() + begin, ids.begin() + end);
      sum += score(window, place).log_prob;
    }
    return sum;
  }

 private:
  PairScore score(const Encoded& encoded, const std::string& place) {
    const std::int64_t vocab = model_.vocab_size();
    for (const std::int32_t id : encoded.ids) {
      if (id < 0 || id >= vocab) {
        throw input_error(place, "ids below the vocabulary size " + std::to_string(vocab), std::to_string(id));
      }
    }
    const std::span<const std::int32_t> input(encoded.ids.data(), encoded.ids.size() - 1);
    const auto n = static_cast<std::int64_t>(input.size());
    const std::int64_t first = n - encoded.scored;
    const std::int64_t block =
        options_.rows_per_block > 0 ? options_.rows_per_block : std::max<std::int64_t>(1, kBlockLogits / vocab);
    // Choices of one token share their input: the window is run once, and its rows stay where they fit into one block.
    const bool same = std::equal(input.begin(), input.end(), seen_.begin(), seen_.end());
    if (!same) {
      seen_.clear();
      model_.begin(input);
      seen_.assign(input.begin(), input.end());
    }
    PairScore result;
    for (std::int64_t t = 0; t < encoded.scored; t += block) {
      const std::int64_t count = std::min(block, encoded.scored - t);
      if (!same || first + t != held_first_ || count != held_count_) {
        held_count_ = 0;
        rows_.resize(static_cast<std::size_t>(count * vocab));
        model_.logits(first + t, count, rows_.data());
        held_first_ = first + t;
        held_count_ = count;
      }
      for (std::int64_t i = 0; i < count; ++i) {
        const float* row = rows_.data() + i * vocab;
        const std::int32_t target = encoded.ids[static_cast<std::size_t>(first + t + i + 1)];
        RowSoftmax softmax;
        if (!row_softmax(row, vocab, softmax)) {
          throw failure(model_.name(), "finite logits", "NaN or infinity at " + place);
        }
        result.log_prob += softmax.log_prob(row, target);
        result.greedy = result.greedy && softmax.argmax == target;
      }
    }
    return result;
  }

  LogitsSource& model_;
  const Tokenizer& tokenizer_;
  const TaskOptions& options_;
  std::vector<std::int32_t> seen_;
  std::int64_t held_first_ = 0, held_count_ = 0;  // rows of `seen_` that stand in rows_
  std::vector<float> rows_;
};

std::int64_t first_maximum(const std::vector<double>& values) {
  return std::max_element(values.begin(), values.end()) - values.begin();
}

}  // namespace

Task read_task(const fs::path& jsonl, std::int64_t limit) {
  std::error_code error;
  if (!fs::is_regular_file(jsonl, error)) throw input_error(jsonl.string(), "a jsonl file", "no such file");
  std::ifstream in(jsonl, std::ios::binary);
  if (!in) throw input_error(jsonl.string(), "a readable file", "cannot be opened");
  Task task;
  task.name = jsonl.stem().string();
  task.file = jsonl;
  std::optional<Shape> shape;
  std::string text;
  for (std::int64_t number = 1; std::getline(in, text); ++number) {
    if (std::all_of(text.begin(), text.end(), is_blank)) continue;
    ++task.items_in_file;
    if (limit > 0 && std::ssize(task.items) == limit) continue;  // only counted
    const std::string place = jsonl.string() + ":" + std::to_string(number);
    if (text.size() > kMaxLine)
      throw input_error(place, "a line of at most 16 MiB", std::to_string(text.size()) + " bytes");
    const Json json = parse_json(text, place);
    if (!json.is_object()) throw input_error(place, "a JSON object", json.type_name());
    const Line line(json, place);
    if (!shape) {
      shape = shape_of(line);
      task.kind = *shape == Shape::kText           ? TaskKind::kText
                  : *shape == Shape::kPair         ? TaskKind::kMinimalPair
                  : *shape == Shape::kContinuation ? TaskKind::kContinuation
                                                   : TaskKind::kMultipleChoice;
    }
    task.items.push_back(item_of(line, *shape));
  }
  if (task.items.empty()) throw input_error(jsonl.string(), "at least one task item", "an empty file");
  return task;
}

TaskResult score_task(LogitsSource& model, const Tokenizer& tokenizer, const Task& task, const TaskOptions& options,
                      Progress& progress) {
  TaskResult result;
  result.name = task.name;
  result.kind = task.kind;
  result.file = task.file;
  result.items_in_file = task.items_in_file;
  result.items = static_cast<std::int64_t>(task.items.size());
  Scorer scorer(model, tokenizer, options);
  std::vector<double> right, right_norm, right_bytes, log_probs;
  double all_bytes = 0, all_words = 0;
  progress.begin(task.name, result.items);
  for (std::size_t i = 0; i < task.items.size(); ++i) {
    throw_if_interrupted("eval", "run the same command again");
    const TaskItem& item = task.items[i];
    const std::string place = task.name + " item " + std::to_string(i + 1);
    std::vector<double> plain, normed, by_bytes;
    bool greedy = false;
    progress.update(static_cast<std::int64_t>(i));
    if (task.kind == TaskKind::kText) {
      log_probs.push_back(scorer.score_text(item.pairs[0].continuation, place));
      all_bytes += static_cast<double>(item.pairs[0].bytes);
      all_words += static_cast<double>(item.pairs[0].words);
      continue;
    }
    for (const TaskItem::Pair& pair : item.pairs) {
      const PairScore score = scorer.score(pair, place);
      plain.push_back(score.log_prob);
      normed.push_back(score.log_prob / static_cast<double>(std::max<std::int64_t>(pair.characters, 1)));
      by_bytes.push_back(score.log_prob / static_cast<double>(std::max<std::int64_t>(pair.bytes, 1)));
      greedy = score.greedy;
    }
    if (task.kind == TaskKind::kContinuation) {
      log_probs.push_back(plain[0]);
      result.picks.push_back(greedy ? 1 : 0);
      right.push_back(greedy ? 1 : 0);
    } else {
      result.picks.push_back(first_maximum(plain));
      right.push_back(result.picks.back() == item.gold ? 1 : 0);
      right_norm.push_back(first_maximum(normed) == item.gold ? 1 : 0);
      right_bytes.push_back(first_maximum(by_bytes) == item.gold ? 1 : 0);
    }
  }
  progress.end();
  if (task.kind == TaskKind::kText) {
    double sum = 0;
    for (const double log_prob : log_probs) sum += log_prob;
    result.word_perplexity = std::exp(-(sum / all_words));
    result.byte_perplexity = std::exp(-(sum / all_bytes));
    result.bits_per_byte = -(sum / all_bytes) / std::log(2);
    return result;
  }
  result.accuracy = plain_mean(right);
  if (task.kind == TaskKind::kMultipleChoice) {
    result.accuracy_norm = plain_mean(right_norm);
    result.accuracy_bytes = plain_mean(right_bytes);
  }
  if (task.kind == TaskKind::kContinuation) {
    const Estimate mean = plain_mean(log_probs);
    Estimate perplexity{std::exp(-mean.value), {}};
    if (mean.standard_error) perplexity.standard_error = perplexity.value * *mean.standard_error;
    result.perplexity = perplexity;
  }
  return result;
}

void set_agreement(TaskResult& result, const TaskResult& original) {
  if (result.picks.size() != original.picks.size()) {
    throw failure(result.name, std::to_string(original.picks.size()) + " picks", std::to_string(result.picks.size()));
  }
  if (result.picks.empty()) return;
  std::vector<double> same(result.picks.size());
  for (std::size_t i = 0; i < same.size(); ++i) same[i] = result.picks[i] == original.picks[i] ? 1 : 0;
  result.agreement = plain_mean(same);
}

void each_metric(const TaskResult& result,
                 const std::function<void(const char*, const std::optional<Estimate>&, const char*)>& see) {
  const auto plain = [](const std::optional<double>& value) {
    return value ? std::optional<Estimate>(Estimate{*value, {}}) : std::nullopt;
  };
  see("acc", result.accuracy, "share");
  see("acc_norm", result.accuracy_norm, "share");
  see("acc_bytes", result.accuracy_bytes, "share");
  see("perplexity", result.perplexity, "");
  see("word_perplexity", plain(result.word_perplexity), "");
  see("byte_perplexity", plain(result.byte_perplexity), "");
  see("bits_per_byte", plain(result.bits_per_byte), "bits");
  see("agreement", result.agreement, "share");
}

void add_rows(const TaskResult& result, const TaskResult* original, const std::string& stage, Report& report) {
  std::map<std::string, double> before;
  if (original) {
    each_metric(*original, [&](const char* metric, const std::optional<Estimate>& value, const char*) {
      if (value) before[metric] = value->value;
    });
  }
  each_metric(result, [&](const char* metric, const std::optional<Estimate>& value, const char* unit) {
    if (!value) return;
    const auto was = before.find(metric);
    report.add({stage, result.name + " " + metric,
                was == before.end() ? std::nullopt : std::optional<double>(was->second), value->value, unit,
                value->standard_error});
  });
}

Json to_json(const TaskResult& result) {
  const char* kinds[] = {"multiple_choice", "continuation", "minimal_pair", "text"};
  Json json = {{"task", result.name}, {"kind", kinds[static_cast<int>(result.kind)]}, {"items", result.items}};
  each_metric(result, [&](const char* metric, const std::optional<Estimate>& value, const char*) {
    if (value) json[metric] = to_json(*value);
  });
  return json;
}

}  // namespace pare
