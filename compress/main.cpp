// The full program: every verb that exists, in one table.
#include <vector>

#include "compress/compress.h"
#include "compress/eval_verb.h"
#include "compress/report_verb.h"
#include "compress/toolbox.h"
#include "distill/distill.h"
#include "model/train.h"
#include "prune/prune.h"
#include "quantize/quantize.h"
#include "runtime/verbs/cli.h"

int main(int argc, char** argv) {
  using namespace pare;
  std::vector<Command> commands = {compress_command(real_toolbox()), train_command(), finetune_command(),
                                   distill_command(), prune_command(), quantize_command()};
  for (Command& command : runtime_commands()) {
    // The LibTorch program scores folders without a detour through a compact file.
    if (command.name == "eval") command = eval_command();
    commands.push_back(std::move(command));
  }
  commands.push_back(report_command());
  commands.push_back(doctor_command());
  return run_cli(argc, argv, commands,
                 "pare makes language models small: distill, prune, quantize, run, and prove how close the result is");
}
