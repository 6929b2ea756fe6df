// Post-processors (what stands around a text) and decoders (pieces -> text).
#include <algorithm>

#include "core/error.h"
#include "core/tokenizer_pipeline.h"
#include "core/tokenizer_text.h"

namespace pare::tok {
namespace {

constexpr int kMaxNesting = 8;

// The byte of "<0xHH>", or -1. The reference parses the two characters as a number, so "+F" counts too.
int fallback_byte(std::string_view piece) {
  if (piece.size() != 6 || !piece.starts_with("<0x") || piece[5] != '>') return -1;
  const auto digit = [](char c) {
    return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
  };
  const int low = digit(piece[4]);
  const int high = piece[3] == '+' ? 0 : digit(piece[3]);
  return high < 0 || low < 0 ? -1 : high * 16 + low;
}

// Appends the bytes that a ByteLevel piece stands for; a piece with a foreign character stands for itself.
void append_bytes(std::string_view piece, std::string& out) {
  const std::size_t before = out.size();
  for (std::size_t i = 0; i < piece.size();) {
    const int byte = char_to_byte(next_char(piece, i));
    if (byte < 0) {
      out.resize(before);
      out += piece;
      return;
    }
    out += static_cast<char>(byte);
  }
}

void add_template(const Node& node, Template& out, int depth) {
  if (depth > kMaxNesting) node.refuse("sequences nested at most 8 deep", "deeper nesting");
  const std::string type = node.type();
  if (type == "Sequence") {
    for (const Node& item : node.items("processors")) add_template(item, out, depth + 1);
    return;
  }
  if (type == "ByteLevel") return;  // changes offsets only
  if (type != "TemplateProcessing") node.unsupported("Sequence, ByteLevel, TemplateProcessing");
  std::vector<std::int32_t> before, after;
  bool seen = false;
  for (const Node& item : node.items("single")) {
    if (item.has("Sequence")) {
      const std::string name = item.at("Sequence").text("id");
      if (name != "A" || seen) item.refuse("sequence A exactly once", name == "A" ? "it twice" : name);
      seen = true;
      continue;
    }
    const std::string name = item.at("SpecialToken").text("id");
    const Node tokens = node.at("special_tokens");
    for (const Node& id : tokens.at(name.c_str()).items("ids"))
      (seen ? after : before).push_back(static_cast<std::int32_t>(id.integer(0, kMaxId)));
  }
  if (!seen) node.refuse("sequence A in \"single\"", "none");
  out.before.insert(out.before.begin(), before.begin(), before.end());
  out.after.insert(out.after.end(), after.begin(), after.end());
}

}  // namespace

void Template::load(const Node& node) {
  if (!node.is_null()) add_template(node, *this, 0);
}

void Decoder::load(const Node& node) {
  steps_.clear();
  none_ = node.is_null();
  if (!none_) add(node, 0);
}

void Decoder::add(const Node& node, int depth) {
  if (depth > kMaxNesting) node.refuse("sequences nested at most 8 deep", "deeper nesting");
  const std::string type = node.type();
  const auto simple = [&](Kind kind) { steps_.push_back({.kind = kind, .content = {}}); };
  if (type == "Sequence") {
    for (const Node& item : node.items("decoders")) add(item, depth + 1);
  } else if (type == "ByteLevel") {
    simple(Kind::kByteLevel);
  } else if (type == "ByteFallback") {
    simple(Kind::kByteFallback);
  } else if (type == "Fuse") {
    simple(Kind::kFuse);
  } else if (type == "Replace") {
    const Node pattern = node.at("pattern");
    steps_.push_back({.kind = Kind::kReplace, .pattern = load_pattern(pattern), .content = node.text("content"),
                      .regex = pattern.has("Regex")});
  } else if (type == "Strip") {
    constexpr std::int64_t kMany = 1 << 20;
    steps_.push_back({.kind = Kind::kStrip, .content = {}, .code = single_char(node.at("content")),
                      .start = static_cast<std::size_t>(node.at("start").integer(0, kMany)),
                      .stop = static_cast<std::size_t>(node.at("stop").integer(0, kMany))});
  } else if (type == "Metaspace") {
    const Node scheme = node.at_or_null("prepend_scheme");
    const bool never = scheme.is_null() ? !node.flag_or("add_prefix_space", true) : scheme.text() == "never";
    steps_.push_back({.kind = Kind::kMetaspace, .content = {}, .code = single_char(node.at("replacement")),
                      .drop_first = !never});
  } else {
    node.unsupported("Sequence, ByteLevel, ByteFallback, Fuse, Replace, Strip, Metaspace");
  }
}

std::string Decoder::apply(std::vector<std::string> pieces) const {
  if (none_) {
    std::string out;
    for (std::size_t i = 0; i < pieces.size(); ++i) out += (i ? " " : "") + pieces[i];
    return out;
  }
  for (const Step& step : steps_) {
    switch (step.kind) {
      case Kind::kByteLevel: {
        std::string bytes;
        for (const std::string& piece : pieces) append_bytes(piece, bytes);
        pieces.assign(1, is_valid_utf8(bytes) ? std::move(bytes) : replace_invalid_utf8(bytes));
        break;
      }
      case Kind::kFuse: {
        std::string joined;
        for (const std::string& piece : pieces) joined += piece;
        pieces.assign(1, std::move(joined));
        break;
      }
      case Kind::kReplace:
        for (std::string& piece : pieces) {
          std::string out;
          std::size_t done = 0;
          step.pattern.for_each(piece, [&](std::size_t begin, std::size_t end) {
            out.append(piece, done, begin - done);
            out += step.content;
            done = end;
          });
          piece = out.append(piece, done);
        }
        break;
      case Kind::kByteFallback: {
        std::vector<std::string> out;
        std::string run;
        const auto flush = [&] {
          if (run.empty()) return;
          if (is_valid_utf8(run)) {
            out.push_back(run);
          } else {
            for (std::size_t i = 0; i < run.size(); ++i) out.emplace_back("\xEF\xBF\xBD");
          }
          run.clear();
        };
        for (std::string& piece : pieces) {
          const int byte = fallback_byte(piece);
          if (byte >= 0) {
            run += static_cast<char>(byte);
          } else {
            flush();
            out.push_back(std::move(piece));
          }
        }
        flush();
        pieces = std::move(out);
        break;
      }
      case Kind::kStrip:
        for (std::string& piece : pieces) {
          std::size_t begin = 0, end = piece.size();
          for (std::size_t n = 0; n < step.start && begin < end; ++n) {
            std::size_t i = begin;
            if (next_char(piece, i) != step.code) break;
            begin = i;
          }
          for (std::size_t n = 0; n < step.stop && end > begin; ++n) {
            std::size_t at = end - 1;
            while (at > begin && (static_cast<unsigned char>(piece[at]) & 0xC0) == 0x80) --at;
            std::size_t i = at;
            if (next_char(piece, i) != step.code) break;
            end = at;
          }
          piece = piece.substr(begin, end - begin);
        }
        break;
      case Kind::kMetaspace:
        for (std::size_t p = 0; p < pieces.size(); ++p) {
          std::string out;
          for (std::size_t i = 0; i < pieces[p].size();) {
            const char32_t code = next_char(pieces[p], i);
            if (code != step.code) append_char(out, code);
            else if (p > 0 || !step.drop_first) out += ' ';
          }
          pieces[p] = std::move(out);
        }
        break;
    }
  }
  std::string out;
  for (const std::string& piece : pieces) out += piece;
  return out;
}

bool Decoder::open_end(const std::vector<std::string>& pieces) const {
  if (pieces.empty()) return false;
  for (const Step& step : steps_) {
    if (step.kind == Kind::kByteFallback && fallback_byte(pieces.back()) >= 0) return true;
    if (step.kind == Kind::kByteLevel) {
      std::string bytes;
      for (const std::string& piece : pieces) append_bytes(piece, bytes);
      if (incomplete_tail(bytes) > 0) return true;
    }
  }
  return false;
}

bool Decoder::can_stream() const {
  if (none_) return true;
  bool joined = false;
  for (const Step& step : steps_) {
    // Before pieces are joined each step sees one piece, which is never cut; afterwards only the strip
    // of one leading character is safe.
    const bool per_piece = step.kind == Kind::kReplace || step.kind == Kind::kMetaspace || step.kind == Kind::kStrip;
    if (joined && per_piece && !(step.kind == Kind::kStrip && step.start <= 1 && step.stop == 0))
      return false;
    if (joined && !per_piece && step.kind != Kind::kFuse) return false;
    joined = joined || step.kind == Kind::kFuse || step.kind == Kind::kByteLevel;
  }
  return true;
}

}  // namespace pare::tok
