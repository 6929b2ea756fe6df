// pare tokenize: what a tokenizer makes of a text, and back.
#include <cstdio>
#include <iostream>

#include "core/checkpoint.h"
#include "core/compact.h"
#include "core/error.h"
#include "core/gguf_file.h"
#include "core/tokenizer.h"
#include "runtime/verbs/cli.h"

namespace pare {
namespace {

Tokenizer open_tokenizer(const fs::path& path) {
  if (fs::is_directory(path)) return Tokenizer::from_file(path / "tokenizer.json");
  if (path.extension() != ".json" && path.extension() != ".model" && CompactFile::is_compact(path)) {
    const auto text = CompactFile(path).embedded("tokenizer.json");
    if (!text) throw input_error(path.string(), "a compact file with a tokenizer", "none inside");
    return Tokenizer::from_text(*text, path.string() + ": tokenizer.json");
  }
  if (GgufFile::is_gguf(path)) {
    const auto text = Checkpoint::open(path).tokenizer_text();
    if (!text) throw input_error(path.string(), "a GGUF file with a tokenizer", "none inside");
    return Tokenizer::from_text(*text, path.string() + ": tokenizer");
  }
  return Tokenizer::from_file(path);
}

std::string lossy(const std::string& text) {  // JSON carries valid UTF-8 only
  return Json(text).dump(-1, ' ', false, Json::error_handler_t::replace);
}

std::string ids_text(const std::vector<std::int32_t>& ids) {
  std::string out = "[";
  for (std::size_t i = 0; i < ids.size(); ++i) out += (i ? "," : "") + std::to_string(ids[i]);
  return out + "]";
}

std::string from_hex(const std::string& hex, const std::string& place) {
  std::string bytes;
  if (hex.size() % 2 != 0 || hex.find_first_not_of("0123456789abcdefABCDEF") != std::string::npos)
    throw input_error(place, "pairs of hex digits", "\"" + hex.substr(0, 40) + "\"");
  for (std::size_t i = 0; i < hex.size(); i += 2) bytes += static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16));
  return bytes;
}

std::vector<std::int32_t> ids_of(const Json& list, const std::string& place) {
  std::vector<std::int32_t> ids;
  if (!list.is_array()) throw input_error(place, "a list of ids", list.type_name());
  for (const Json& id : list) {
    if (!id.is_number_integer() || id.get<std::int64_t>() < 0 || id.get<std::int64_t>() > INT32_MAX)
      throw input_error(place, "ids as whole numbers", id.dump());
    ids.push_back(id.get<std::int32_t>());
  }
  return ids;
}

// One request a line: {"text": ...} or {"hex": bytes} to encode, {"ids": [...]} to decode; optional flags
// "special" (run the post-processor), "parse" (recognise special tokens), "keep" (show special tokens).
Json run_batch(const Tokenizer& tokenizer) {
  std::ios::sync_with_stdio(false);
  std::string line;
  std::int64_t number = 0;
  while (std::getline(std::cin, line)) {
    const std::string place = "stdin:" + std::to_string(++number);
    const Json request = parse_json(line, place);
    if (!request.is_object()) throw input_error(place, "an object", request.type_name());
    for (const auto& [key, value] : request.items()) {
      const bool flag = key == "special" || key == "parse" || key == "keep";
      if (!flag && key != "text" && key != "hex" && key != "ids")
        throw input_error(place, "text, hex, ids, special, parse or keep", "\"" + key + "\"");
      if (key != "ids" && (flag ? !value.is_boolean() : !value.is_string()))
        throw input_error(place + ": " + key, flag ? "true or false" : "a text", value.type_name());
    }
    const auto flag = [&](const char* key, bool fallback) { return request.value(key, fallback); };
    if (request.contains("ids")) {
      const auto ids = ids_of(request["ids"], place + ": ids");
      std::cout << "{\"text\":" << lossy(tokenizer.decode(ids, !flag("keep", false))) << "}\n";
    } else if (request.contains("text") || request.contains("hex")) {
      const std::string text = request.contains("text") ? request["text"].get<std::string>()
                                                        : from_hex(request["hex"].get<std::string>(), place);
      std::cout << ids_text(tokenizer.encode(text, flag("special", true), flag("parse", true))) << "\n";
    } else {
      throw input_error(place, "text, hex or ids", "none of them");
    }
  }
  std::cout.flush();
  if (!std::cout) throw failure("stdout", "", "writing failed");
  return {{"lines", number}};
}

Json run(const Options& options, Context& context) {
  std::string given;
  int count = options.get<bool>("batch") ? 1 : 0;
  if (count > 0) given = "--batch";
  for (const char* name : {"text", "file", "decode"}) {
    if (!options.has(name)) continue;
    ++count;
    given += (given.empty() ? "--" : " and --") + std::string(name);
  }
  if (count != 1)
    throw usage_error("tokenize", "one of --text, --file, --decode or --batch", count == 0 ? "none" : given);
  if (options.has("decode")) refuse_unused(options, {"no-special", "plain"}, "with --decode", "pare tokenize");
  else refuse_unused(options, {"show-special"}, "without --decode", "pare tokenize");
  if (options.get<bool>("batch"))
    refuse_unused(options, {"no-special", "plain"}, "with --batch, whose lines say it themselves", "pare tokenize");
  const Tokenizer tokenizer = open_tokenizer(options.get<std::string>("tokenizer"));
  if (options.get<bool>("batch")) {
    if (context.json) throw usage_error("--batch", "either --batch or --json", "both");
    return run_batch(tokenizer);
  }
  if (options.has("decode")) {
    std::vector<std::int32_t> ids;
    for (const auto& word : options.get<std::vector<std::string>>("decode")) {
      if (word.empty() || word.size() > 9 || word.find_first_not_of("0123456789") != std::string::npos)
        throw usage_error("--decode", "ids as whole numbers", "\"" + word + "\"");
      ids.push_back(std::stoi(word));
    }
    const std::string text = tokenizer.decode(ids, !options.get<bool>("show-special"));
    context.print(text + "\n");
    return {{"text", text}, {"count", ids.size()}};
  }
  const std::string text =
      options.has("file") ? read_text(options.get<std::string>("file")) : options.get<std::string>("text");
  const auto ids = tokenizer.encode(text, !options.get<bool>("no-special"), !options.get<bool>("plain"));
  Json tokens = Json::array();
  std::string lines;
  char number[32];
  for (const std::int32_t id : ids) {
    const std::string piece = tokenizer.token(id);
    std::snprintf(number, sizeof number, "%8d  ", id);
    lines += number + lossy(piece) + (tokenizer.is_special(id) ? "  special" : "") + "\n";
    if (context.json) tokens.push_back(piece);
  }
  context.print(lines + std::to_string(ids.size()) + " tokens, " + std::to_string(text.size()) + " bytes\n");
  return {{"ids", ids}, {"tokens", std::move(tokens)}, {"count", ids.size()}, {"bytes", text.size()}};
}

}  // namespace

Command tokenize_command() {
  Command command;
  command.name = "tokenize";
  command.summary = "Show the tokens and ids of a text, or the text of ids";
  command.options = {
      {.name = "tokenizer",
       .type = OptionType::kPath,
       .help = "model folder, compact file, GGUF file, tokenizer.json or tokenizer.model",
       .required = true,
       .positional = true},
      {.name = "text", .type = OptionType::kText, .help = "text to encode"},
      {.name = "file", .type = OptionType::kPath, .help = "file whose text to encode"},
      {.name = "decode", .type = OptionType::kTextList, .help = "ids to decode"},
      {.name = "no-special", .type = OptionType::kFlag, .help = "leave out what the post-processor adds (BOS)",
       .default_value = false},
      {.name = "plain", .type = OptionType::kFlag, .help = "text that looks like a special token stays text",
       .default_value = false},
      {.name = "show-special", .type = OptionType::kFlag, .help = "decode special tokens too", .default_value = false},
      {.name = "batch", .type = OptionType::kFlag,
       .help = "one JSON request a line on stdin: {\"text\"}, {\"hex\"} or {\"ids\"}; one answer a line",
       .default_value = false},
  };
  command.run = run;
  command.example = "pare tokenize model --text 'Once upon a time'";
  return command;
}

}  // namespace pare
