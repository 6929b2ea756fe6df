#include "core/error.h"
#include "core/tokenizer_pipeline.h"
#include "core/tokenizer_text.h"

namespace pare::tok {
namespace {

constexpr int kMaxNesting = 8;

struct Range {
  std::size_t begin, end;
  bool match;
};

// Every single character that `test` accepts is a match.
template <class Test>
auto each_char(Test test) {
  return [test](std::string_view text, auto&& visit) {
    for (std::size_t i = 0; i < text.size();) {
      const std::size_t begin = i;
      if (test(next_char(text, i))) visit(begin, i);
    }
  };
}

}  // namespace

void PreTokenizer::load(const Node& node) {
  steps_.clear();
  bytes_ = false;
  if (!node.is_null()) add(node, 0);
  for (std::size_t i = 0; i < steps_.size(); ++i)
    if (steps_[i].kind == Kind::kByteLevel) steps_[i].map = i + 1 < steps_.size();
  bytes_ = !steps_.empty() && steps_.back().kind == Kind::kByteLevel;
}

void PreTokenizer::add(const Node& node, int depth) {
  if (depth > kMaxNesting) node.refuse("sequences nested at most 8 deep", "deeper nesting");
  const std::string type = node.type();
  const auto behavior_of = [](const Node& name) {
    const std::string text = name.text();
    if (text == "Removed") return Behavior::kRemoved;
    if (text == "Isolated") return Behavior::kIsolated;
    if (text == "MergedWithPrevious") return Behavior::kMergedWithPrevious;
    if (text == "MergedWithNext") return Behavior::kMergedWithNext;
    if (text == "Contiguous") return Behavior::kContiguous;
    name.refuse("Removed, Isolated, MergedWithPrevious, MergedWithNext or Contiguous", "\"" + text + "\"");
  };
  if (type == "Sequence") {
    for (const Node& item : node.items("pretokenizers")) add(item, depth + 1);
  } else if (type == "ByteLevel") {
    Step step{.kind = Kind::kByteLevel, .split = node.flag_or("use_regex", true),
              .add_prefix_space = node.flag("add_prefix_space"), .replacement = {}};
    if (step.split) step.pattern = Regex::compile(kGpt2Pattern, node.path());
    steps_.push_back(std::move(step));
  } else if (type == "Split") {
    steps_.push_back({.kind = Kind::kSplit, .behavior = behavior_of(node.at("behavior")), .invert = node.flag("invert"),
                      .pattern = load_pattern(node.at("pattern")), .replacement = {}});
  } else if (type == "Digits") {
    steps_.push_back({.kind = Kind::kDigits,
                      .behavior = node.flag("individual_digits") ? Behavior::kIsolated : Behavior::kContiguous,
                      .replacement = {}});
  } else if (type == "Metaspace") {
    Step step{.kind = Kind::kMetaspace, .split = node.flag_or("split", true), .replacement = {}, .prepend = Prepend::kAlways};
    append_char(step.replacement, single_char(node.at("replacement")));
    step.pattern = Regex::literal(step.replacement);
    const Node scheme = node.at_or_null("prepend_scheme");
    if (!scheme.is_null()) {
      const std::string text = scheme.text();
      if (text == "first") step.prepend = Prepend::kFirst;
      else if (text == "never") step.prepend = Prepend::kNever;
      else if (text != "always") scheme.refuse("always, first or never", "\"" + text + "\"");
    }
    if (!node.flag_or("add_prefix_space", true)) {
      // The older spelling; the reference refuses a scheme that contradicts it.
      if (!scheme.is_null() && step.prepend != Prepend::kNever)
        scheme.refuse("\"never\" next to add_prefix_space false", "\"" + scheme.text() + "\"");
      step.prepend = Prepend::kNever;
    }
    steps_.push_back(std::move(step));
  } else if (type == "Whitespace") {
    steps_.push_back({.kind = Kind::kSplit, .behavior = Behavior::kRemoved, .invert = true,
                      .pattern = Regex::compile(R"(\w+|[^\w\s]+)", node.path()), .replacement = {}});
  } else if (type == "WhitespaceSplit") {
    steps_.push_back({.kind = Kind::kWhitespaceSplit, .behavior = Behavior::kRemoved, .replacement = {}});
  } else if (type == "Punctuation") {
    const bool given = !node.at_or_null("behavior").is_null();
    steps_.push_back({.kind = Kind::kPunctuation,
                      .behavior = given ? behavior_of(node.at("behavior")) : Behavior::kIsolated, .replacement = {}});
  } else {
    node.unsupported("Sequence, ByteLevel, Split, Digits, Metaspace, Whitespace, WhitespaceSplit, Punctuation");
  }
}

// Matches and the gaps between them become pieces as the behaviour says (tokenizers, normalizer.rs: split).
template <class Matches>
void PreTokenizer::split(const Step& step, std::size_t index, std::string_view piece, bool at_start, const Sink& sink,
                         Matches&& matches) const {
  const auto emit = [&](std::size_t begin, std::size_t end) {
    if (begin < end) run(index + 1, piece.substr(begin, end - begin), at_start && begin == 0, sink);
  };
  if (step.behavior == Behavior::kIsolated || step.behavior == Behavior::kRemoved) {
    const bool keep_matches = step.behavior == Behavior::kIsolated || step.invert;
    const bool keep_gaps = step.behavior == Behavior::kIsolated || !step.invert;
    std::size_t done = 0;
    matches(piece, [&](std::size_t begin, std::size_t end) {
      if (keep_gaps) emit(done, begin);
      if (keep_matches) emit(begin, end);
      done = end;
    });
    if (keep_gaps) emit(done, piece.size());
    return;
  }
  std::vector<Range> ranges;
  std::size_t done = 0;
  matches(piece, [&](std::size_t begin, std::size_t end) {
    if (done != begin) ranges.push_back({done, begin, step.invert});
    ranges.push_back({begin, end, !step.invert});
    done = end;
  });
  if (done != piece.size()) ranges.push_back({done, piece.size(), step.invert});
  std::vector<Range> merged;
  bool previous = false;
  if (step.behavior == Behavior::kMergedWithNext) {
    for (auto range = ranges.rbegin(); range != ranges.rend(); ++range) {
      if (range->match && !previous && !merged.empty()) merged.back().begin = range->begin;
      else merged.push_back(*range);
      previous = range->match;
    }
    for (auto range = merged.rbegin(); range != merged.rend(); ++range) emit(range->begin, range->end);
    return;
  }
  for (const Range& range : ranges) {
    const bool join = step.behavior == Behavior::kContiguous ? range.match == previous : range.match && !previous;
    if (join && !merged.empty()) merged.back().end = range.end;
    else merged.push_back(range);
    previous = range.match;
  }
  for (const Range& range : merged) emit(range.begin, range.end);
}

void PreTokenizer::run(std::size_t index, std::string_view piece, bool at_start, const Sink& sink) const {
  if (index == steps_.size()) return sink(piece);
  const Step& step = steps_[index];
  const auto by_pattern = [&](std::string_view text, auto&& visit) { step.pattern.for_each(text, visit); };
  switch (step.kind) {
    case Kind::kSplit: return split(step, index, piece, at_start, sink, by_pattern);
    case Kind::kDigits: return split(step, index, piece, at_start, sink, each_char(is_numeric));
    case Kind::kWhitespaceSplit: return split(step, index, piece, at_start, sink, each_char(is_whitespace));
    case Kind::kPunctuation: return split(step, index, piece, at_start, sink, each_char(is_punctuation));
    case Kind::kMetaspace: {
      std::string text;
      text.reserve(piece.size() + piece.size() / 2);
      for (const char c : piece) {
        if (c == ' ') text += step.replacement;
        else text += c;
      }
      if (!text.starts_with(step.replacement) &&
          (step.prepend == Prepend::kAlways || (step.prepend == Prepend::kFirst && at_start)))
        text.insert(0, step.replacement);
      if (!step.split) return run(index + 1, text, at_start, sink);
      Step next = {.kind = Kind::kSplit, .behavior = Behavior::kMergedWithNext, .replacement = {}};
      return split(next, index, text, at_start, sink, by_pattern);
    }
    case Kind::kByteLevel: {
      std::string prefixed;
      if (step.add_prefix_space && !piece.starts_with(' ')) {
        prefixed = " ";
        prefixed += piece;
        piece = prefixed;
      }
      const auto finish = [&](std::string_view word, bool start) {
        if (!step.map) return run(index + 1, word, start, sink);
        std::string mapped;
        for (const char c : word) mapped += byte_to_piece(static_cast<unsigned char>(c));
        run(index + 1, mapped, start, sink);
      };
      if (!step.split) return finish(piece, at_start);
      std::size_t done = 0;
      step.pattern.for_each(piece, [&](std::size_t begin, std::size_t end) {
        if (done < begin) finish(piece.substr(done, begin - done), at_start && done == 0);
        finish(piece.substr(begin, end - begin), at_start && begin == 0);
        done = end;
      });
      if (done < piece.size()) finish(piece.substr(done), at_start && done == 0);
      return;
    }
  }
}

}  // namespace pare::tok
