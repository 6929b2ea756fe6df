#!/bin/bash
# Does Wanda beat magnitude, and both the null of choosing at random? Each method at one sparsity, three seeds (they
# choose the calibration windows, and the weights of the null), scored on held-out text against the original.
#   tests/bench/prune_null.sh PARE MODEL CALIBRATION_TEXT HELD_OUT_TEXT OUT.json [SPARSITY]
# SPLIT: document separator of both texts. SAMPLES, CONTEXT, DOCUMENTS: sizes, for short runs. TAKE: extra prune flags.
# THREADS: 1 unless set.
set -eu
PARE=${1:?usage: prune_null.sh PARE MODEL CALIBRATION_TEXT HELD_OUT_TEXT OUT.json [SPARSITY]}
MODEL=$2 TEXT=$3 HELD_OUT=$4 OUT=$5 SPARSITY=${6:-0.5}
CONTEXT=${CONTEXT:-256} SAMPLES=${SAMPLES:-128} DOCUMENTS=${DOCUMENTS:-} SPLIT=${SPLIT:-} TAKE=${TAKE:-} THREADS=${THREADS:-1}
T=$(mktemp -d)
trap 'rm -rf "$T"' EXIT
SEPARATOR=()
[ -n "$SPLIT" ] && SEPARATOR=(--split "$SPLIT")
LIMIT=()
[ -n "$DOCUMENTS" ] && LIMIT=(--documents "$DOCUMENTS")
for seed in 1 2 3; do
  for method in wanda magnitude random; do
    # shellcheck disable=SC2086  # TAKE is a list of flags
    "$PARE" prune --model "$MODEL" --out "$T/model" --method "$method" --sparsity "$SPARSITY" --text "$TEXT" \
      "${SEPARATOR[@]}" --samples "$SAMPLES" --context "$CONTEXT" --seed "$seed" --threads "$THREADS" $TAKE --json --quiet >"$T/prune.$method.$seed.json"
    "$PARE" eval "$T/model" --against "$MODEL" --text "$HELD_OUT" "${SEPARATOR[@]}" --ctx "$CONTEXT" "${LIMIT[@]}" \
      --threads "$THREADS" --json --quiet >"$T/eval.$method.$seed.json"
    rm -rf "$T/model"
  done
done
COMMIT=$(git -C "$(dirname "$0")" rev-parse --short HEAD 2>/dev/null || echo unknown)
MACHINE=$(grep -m1 'model name' /proc/cpuinfo | cut -d: -f2- | sed 's/^ *//')
python3 - "$T" "$OUT" "$COMMIT" "$MACHINE" "$(basename "$MODEL")" "$(basename "$HELD_OUT")" "$SPARSITY" "$SAMPLES" "$CONTEXT" <<'PY'
import json, math, sys
folder, out, commit, machine, model, held_out, sparsity, samples, context = sys.argv[1:]
runs, means = [], {}
for method in ("wanda", "magnitude", "random"):
    for seed in (1, 2, 3):
        pruned = json.load(open(f"{folder}/prune.{method}.{seed}.json"))["result"]
        rows = json.load(open(f"{folder}/eval.{method}.{seed}.json"))["rows"]
        wanted = [r for r in rows if r["metric"] in ("mean_kl", "top1_agreement", "top1", "perplexity")]
        if not any(r["metric"] == "mean_kl" for r in wanted):
            sys.exit("prune_null.sh: the evaluation has no mean_kl row")
        runs.append({"method": method, "seed": seed, "sparsity": pruned["sparsity"],
                     "calibration_kl": pruned["calibration_kl"], "held_out": wanted})
    kl = [next(r["after"] for r in run["held_out"] if r["metric"] == "mean_kl") for run in runs if run["method"] == method]
    mean = sum(kl) / 3
    means[method] = {"mean_kl": mean, "stderr_over_seeds": math.sqrt(sum((x - mean) ** 2 for x in kl) / 2 / 3)}
    print(f"{method:10} held-out mean_kl {mean:.4f} nats, +- {means[method]['stderr_over_seeds']:.4f} over 3 seeds")
value = lambda run, metric: next(r["after"] for r in run["held_out"] if r["metric"] == metric and r["stage"] != "original")
average = lambda method, metric: sum(value(r, metric) for r in runs if r["method"] == method) / 3
table = [[m, means[m]["mean_kl"], means[m]["stderr_over_seeds"], average(m, "top1_agreement"), average(m, "perplexity")] for m in means]
command = f"tests/bench/prune_null.sh build/pare {model} CALIBRATION {held_out} OUT.json {sparsity}"
json.dump({"benchmark": "prune_null", "command": command, "columns": ["method", "mean KL", "over seeds", "top-1", "perplexity"],
           "table": table, "commit": commit, "machine": machine, "model": model, "held_out": held_out,
           "sparsity": float(sparsity), "samples": int(samples), "context": int(context), "means": means, "runs": runs},
          open(out, "w"), indent=1)
PY
