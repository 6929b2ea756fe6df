// The torch-free program: everything that needs core, runtime and eval alone.
#include "runtime/verbs/cli.h"

int main(int argc, char** argv) {
  return pare::run_cli(argc, argv, pare::runtime_commands(),
                       "pare (edge): inspect, verify, export, run, bench and evaluate compact models");
}
