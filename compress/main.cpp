// The full program: every verb that exists, in one table.
#include <map>
#include <string>
#include <vector>

#include "compress/compress.h"
#include "compress/eval_verb.h"
#include "compress/report_verb.h"
#include "compress/toolbox.h"
#include "distill/distill.h"
#include "model/ranks.h"
#include "model/train.h"
#include "prune/prune.h"
#include "quantize/quantize.h"
#include "runtime/verbs/cli.h"

namespace {

using namespace pare;

// Verbs of one process, and the options whose output several ranks would write over each other.
const std::map<std::string, std::vector<std::string>> kWriters = {{"export", {"out"}},
                                                                  {"new", {"out"}},
                                                                  {"train-tokenizer", {"out"}},
                                                                  {"report", {"run"}},
                                                                  {"eval", {"output", "cache"}}};

void refuse_ranks_of(Command& command) {
  const auto writer = kWriters.find(command.name);
  if (writer == kWriters.end()) return;
  command.run = [name = command.name, outputs = writer->second, run = command.run](const Options& options,
                                                                                   Context& context) {
    for (const std::string& output : outputs)
      if (options.has(output))
        refuse_ranks(name, "start it once; pare train, finetune, distill, prune and quantize run on several ranks");
    return run(options, context);
  };
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<Command> commands = {compress_command(real_toolbox()), train_command(), finetune_command(),
                                   distill_command(), prune_command(), quantize_command()};
  for (Command& command : runtime_commands()) {
    // The LibTorch program scores folders without a detour through a compact file.
    if (command.name == "eval") command = eval_command();
    commands.push_back(std::move(command));
  }
  commands.push_back(report_command());
  commands.push_back(doctor_command());
  for (Command& command : commands) refuse_ranks_of(command);
  return run_cli(argc, argv, commands,
                 "pare makes language models small: distill, prune, quantize, run, and prove how close the result is");
}
