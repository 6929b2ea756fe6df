// The command line shared by the full program and the torch-free one: CLI11 parsers generated from Command tables.
#pragma once

#include <vector>

#include "core/context.h"
#include "core/options.h"

namespace pare {

// Parses, runs one command and returns the process exit code. Global flags: --json, --quiet, --threads, --seed, --help, --version.
int run_cli(int argc, char** argv, const std::vector<Command>& commands, const std::string& program_summary);

// --kv: how keys and values of past tokens are kept; not set: EngineOptions decides.
OptionDecl kv_option();

// Verbs that need no LibTorch.
Command new_command();
Command inspect_command();
Command verify_command();
Command tokenize_command();
Command train_tokenizer_command();
Command export_command();
Command plan_command();
Command run_command();
Command bench_command();
Command serve_command();         // in programs that are built with cpp-httplib
Command eval_command_runtime();  // compact files, and folders through an F32 compact temporary
std::vector<Command> runtime_commands();

}  // namespace pare
