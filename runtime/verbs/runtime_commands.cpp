#include "runtime/verbs/cli.h"

namespace pare {

OptionDecl kv_option() {
  return {.name = "kv",
          .type = OptionType::kText,
          .help = "keys and values of past tokens: f32, f16, mixed (keys f16, values bf16), q8 (int8, a scale per position "
                  "and head); default: mixed beside int8 activations, f32 beside float ones and in a file of floats",
          .choices = {"f32", "f16", "mixed", "q8"}};
}

std::vector<Command> runtime_commands() {
  std::vector<Command> commands = {
      new_command(),  inspect_command(), verify_command(), tokenize_command(), train_tokenizer_command(),
      plan_command(), export_command(),  run_command(),    bench_command(),    eval_command_runtime()};
#ifdef PARE_SERVE
  commands.push_back(serve_command());
#endif
  return commands;
}

}  // namespace pare
