// pare train-tokenizer: byte-level BPE from text files.
#include "core/corpus.h"
#include "core/error.h"
#include "core/tokenizer.h"
#include "runtime/verbs/cli.h"

namespace pare {
namespace {

Json tokenizer_config(const std::vector<std::string>& specials) {
  Json config = {{"tokenizer_class", "PreTrainedTokenizerFast"},
                 {"add_prefix_space", false},
                 {"clean_up_tokenization_spaces", false}};
  // The first special token begins and ends documents, as GPT-2's <|endoftext|> does.
  if (!specials.empty()) {
    config["bos_token"] = specials.front();
    config["eos_token"] = specials.front();
    config["unk_token"] = nullptr;
  }
  return config;
}

Json run(const Options& options, Context& context) {
  TokenizerTraining training;
  training.vocab_size = options.get<std::int64_t>("vocab-size");
  training.min_frequency = options.get<std::int64_t>("min-frequency");
  training.special_tokens = options.get<std::vector<std::string>>("special-tokens");
  std::vector<fs::path> files;
  for (const auto& file : options.get<std::vector<std::string>>("text")) files.emplace_back(file);
  std::optional<std::string> split;
  if (options.has("split")) split = options.get<std::string>("split");

  // The folder is begun when there is something to put into it: bad text leaves nothing behind.
  const fs::path wanted = options.get<std::string>("out");
  if (fs::exists(fs::symlink_status(wanted)))
    throw usage_error(wanted.string(), "an output that does not exist yet", "an existing one",
                      "remove it or choose another --out");
  std::vector<std::string> texts;
  std::uint64_t bytes = 0;
  for (Document& document : read_documents(files, split)) {
    bytes += document.text.size();
    texts.push_back(std::move(document.text));
  }
  context.progress->note("learning merges from " + std::to_string(bytes) + " bytes in " + std::to_string(texts.size()) +
                         " documents");
  const std::string text = train_tokenizer(texts, training);
  const Tokenizer tokenizer = Tokenizer::from_text(text, "the trained tokenizer");
  if (tokenizer.size() < training.vocab_size)
    context.progress->note("the text gives only " + std::to_string(tokenizer.size()) + " of the " +
                           std::to_string(training.vocab_size) + " tokens asked for");
  FolderTransaction folder(wanted);
  write_text(folder.work() / "tokenizer.json", text);
  write_text(folder.work() / "tokenizer_config.json", tokenizer_config(training.special_tokens).dump(2) + "\n");
  folder.commit();
  const std::string out = options.get<std::string>("out");
  context.print(out + ": " + std::to_string(tokenizer.size()) + " tokens from " + std::to_string(bytes) + " bytes\n");
  return {{"out", out}, {"vocab_size", tokenizer.size()}, {"text_bytes", bytes}, {"documents", texts.size()}};
}

}  // namespace

Command train_tokenizer_command() {
  Command command;
  command.name = "train-tokenizer";
  command.summary = "Learn a byte-level BPE vocabulary from text and write tokenizer.json";
  command.options = {
      {.name = "text",
       .type = OptionType::kTextList,
       .help = "text or jsonl files, or folders of them",
       .required = true},
      {.name = "vocab-size",
       .type = OptionType::kInteger,
       .help = "tokens, with the 256 bytes and the special tokens",
       .default_value = 2048,
       .minimum = 256,
       .maximum = 1000000},
      {.name = "out", .type = OptionType::kPath, .help = "folder to write", .required = true},
      {.name = "split", .type = OptionType::kText, .help = "text that separates documents inside a file"},
      {.name = "special-tokens",
       .type = OptionType::kTextList,
       .help = "special tokens; they get the first ids",
       .default_value = Json::array({"<|endoftext|>"})},
      {.name = "min-frequency",
       .type = OptionType::kInteger,
       .help = "times a pair must occur to be merged",
       .default_value = 2,
       .minimum = 1},
  };
  command.run = run;
  command.example = "pare train-tokenizer --text stories.txt --split '<|endoftext|>' --vocab-size 2048 --out tokenizer";
  return command;
}

}  // namespace pare
