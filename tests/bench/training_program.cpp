// pare with the verbs train and distill alone: what tests/bench/training.py measures, soon built on another LibTorch.
#include "distill/distill.h"
#include "model/train.h"
#include "runtime/verbs/cli.h"

int main(int argc, char** argv) {
  return pare::run_cli(argc, argv, {pare::train_command(), pare::distill_command()},
                       "pare: the verbs train and distill alone");
}
