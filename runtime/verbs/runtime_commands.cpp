#include "runtime/verbs/cli.h"

namespace pare {

std::vector<Command> runtime_commands() {
  return {new_command(),    inspect_command(), verify_command(), tokenize_command(), train_tokenizer_command(),
          export_command(),  run_command(),    bench_command(),    eval_command_runtime()};
}

}  // namespace pare
