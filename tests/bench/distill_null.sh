#!/bin/bash
# Does learning from the teacher beat learning from the text alone? One student, pruned from the teacher, trained on equal
# tokens by KL to the teacher and by next-token loss, and the untouched cut, each on held-out text; three seeds (they
# choose the order of the text).
#   tests/bench/distill_null.sh PARE TEACHER TEXT HELD_OUT OUT.json [TOKENS]
# SHAPE: the student, as options of prune --method shape. LR, PRECISION, EVAL_TOKENS, SEEDS: for other models and short runs.
set -eu
PARE=${1:?usage: distill_null.sh PARE TEACHER TEXT HELD_OUT OUT.json [TOKENS]}
TEACHER=$2 TEXT=$3 HELD_OUT=$4 OUT=$5 TOKENS=${6:-400000}
LR=${LR:-1e-3} PRECISION=${PRECISION:-f32} EVAL_TOKENS=${EVAL_TOKENS:-32768} SEEDS=${SEEDS:-1 2 3}
read -ra STUDENT <<<"${SHAPE:---layers 3 --no-correction}"
T=$(mktemp -d)
trap 'rm -rf "$T"' EXIT
"$PARE" prune --model "$TEACHER" --out "$T/student" --method shape "${STUDENT[@]}" --text "$TEXT" --quiet --json >"$T/pruned"
for seed in $SEEDS; do
  for arm in kl ce; do
    WEIGHTS=(--kl-weight 1 --ce-weight 0)
    [ $arm = ce ] && WEIGHTS=(--kl-weight 0 --ce-weight 1)
    "$PARE" distill --teacher "$TEACHER" --model "$T/student" "${WEIGHTS[@]}" --text "$TEXT" --held-out "$HELD_OUT" \
      --tokens "$TOKENS" --batch 8 --lr "$LR" --weight-decay 0 --precision "$PRECISION" --dtype float32 \
      --final-eval-tokens "$EVAL_TOKENS" --seed "$seed" --out "$T/model" --json --quiet >"$T/$arm.$seed.json"
    rm -rf "$T/model"
  done
done
COMMIT=$(git -C "$(dirname "$0")" rev-parse --short HEAD 2>/dev/null || echo unknown)
MACHINE=$(grep -m1 'model name' /proc/cpuinfo | cut -d: -f2- | sed 's/^ *//')
python3 - "$T" "$OUT" "$COMMIT" "$MACHINE" "$(basename "$TEACHER")" "$(basename "$HELD_OUT")" "${STUDENT[*]}" "$TOKENS" "$LR" "$SEEDS" <<'PY'
import json, math, statistics, sys
folder, out, commit, machine, teacher, held_out, student, tokens, lr, seeds = sys.argv[1:]
seeds = [int(s) for s in seeds.split()]
runs = []
for seed in seeds:
    for arm in ("kl", "ce"):
        held = next(iter(json.load(open(f"{folder}/{arm}.{seed}.json"))["result"]["held_out"].values()))
        if arm == "kl":
            runs.append({"arm": "cut", "seed": seed, "loss": held["before"]["loss"], "kl": held["kl_before"]})
        runs.append({"arm": arm, "seed": seed, "loss": held["after"]["loss"], "loss_stderr": held["after"]["standard_error"],
                     "kl": held["kl_after"], "kl_stderr": held["kl_standard_error"], "scored": held["after"]["tokens"]})
means = {}
for arm in ("cut", "ce", "kl"):
    means[arm] = {}
    for metric in ("loss", "kl"):
        values = [r[metric] for r in runs if r["arm"] == arm]
        mean = sum(values) / len(values)
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
        means[arm][metric] = {"mean": mean, "stderr_over_seeds": error}
    print(f"{arm:4} held-out loss {means[arm]['loss']['mean']:.4f} +- {means[arm]['loss']['stderr_over_seeds']:.4f}, "
          f"KL to the teacher {means[arm]['kl']['mean']:.4f} +- {means[arm]['kl']['stderr_over_seeds']:.4f}")
names = {"cut": "untouched cut", "ce": "next-token loss", "kl": "distilled (KL)"}
table = [[names[a], means[a]["kl"]["mean"], means[a]["kl"]["stderr_over_seeds"], means[a]["loss"]["mean"],
          means[a]["loss"]["stderr_over_seeds"]] for a in ("cut", "ce", "kl")]
command = f"tests/bench/distill_null.sh build/pare {teacher} TEXT {held_out} OUT.json {tokens}, student {student}"
json.dump({"benchmark": "distill_null", "command": command,
           "columns": ["student", "KL to the teacher", "over seeds", "held-out loss", "over seeds"], "table": table, "commit": commit, "machine": machine, "teacher": teacher, "student": student,
           "held_out": held_out, "tokens": int(tokens), "lr": float(lr), "means": means, "runs": runs},
          open(out, "w"), indent=1)
PY
