#!/bin/bash
# Drives the built program through input that must be refused: the right exit code, a message that names the place,
# the input untouched, nothing under the output name.
#   tests/cli/bad_input.sh BUILD_DIR
set -u
BUILD=$(cd "${1:?usage: bad_input.sh BUILD_DIR}" && pwd)
PARE="$BUILD/pare"
EDGE="$BUILD/pare-edge"
MAKE="$BUILD/tests/make_tiny_model"
for program in "$PARE" "$EDGE" "$MAKE"; do
  [ -x "$program" ] || { echo "missing $program"; exit 1; }
done
T=$(mktemp -d)
trap 'chmod -R u+w "$T"; rm -rf "$T"' EXIT
FAILED=0 CASES=0

hash_of() { (cd "$1" 2>/dev/null && find . -type f -print0 | sort -z | xargs -0 sha256sum; find . -type d | sort) 2>/dev/null | sha256sum; }

# refuse NAME CODE PATTERN COMMAND...: stderr must match PATTERN; $IN stays as it is; $OUT does not appear.
refuse() {
  local name=$1 code=$2 pattern=$3
  shift 3
  local before=$(hash_of "$IN") existed=0
  [ -e "$OUT" ] && existed=1
  CASES=$((CASES + 1))
  timeout 120 "$@" >"$T/stdout" 2>"$T/stderr"
  local got=$? problem=""
  [ "$got" = "$code" ] || problem="exit $got, expected $code"
  grep -Eqi -- "$pattern" "$T/stderr" || problem="$problem; message does not match /$pattern/"
  grep -Eq 'terminate called|Segmentation|AddressSanitizer|runtime error:|std::bad_alloc' "$T/stderr" && problem="$problem; crash"
  [ "$(hash_of "$IN")" = "$before" ] || problem="$problem; the input changed"
  [ "$existed" = 1 ] || [ ! -e "$OUT" ] || problem="$problem; $OUT exists"
  if [ -n "$problem" ]; then
    FAILED=$((FAILED + 1))
    echo "FAILED $name: ${problem#; }"
    echo "  command: $*"
    sed 's/^/  | /' "$T/stderr" | tail -8
  else
    echo "ok $name"
  fi
  rm -rf "$T/out.partial" "$T/out.work"
}

accept() {
  local name=$1
  shift
  CASES=$((CASES + 1))
  if ! timeout 300 "$@" >"$T/stdout" 2>"$T/stderr"; then
    FAILED=$((FAILED + 1))
    echo "FAILED $name: exit not 0"
    echo "  command: $*"
    tail -8 "$T/stderr" | sed 's/^/  | /'
    return 1
  fi
  echo "ok $name"
}

le64() { # a number as 8 little-endian bytes
  local n=$1 i
  for i in 1 2 3 4 5 6 7 8; do
    printf "\\x$(printf %02x $((n & 255)))"
    n=$((n >> 8))
  done
}
safetensors() { # HEADER BYTES-OF-DATA > file
  le64 ${#1}
  printf '%s' "$1"
  head -c "$2" /dev/zero
}
fresh() { rm -rf "$T/m"; cp -r "$T/good" "$T/m"; IN="$T/m"; OUT="$T/out"; rm -rf "$OUT"; }

"$MAKE" "$T/good" 2 128 || exit 1
"$MAKE" "$T/ragged" 2 172 || exit 1
"$MAKE" --text "$T/text.txt" 40 || exit 1
TEXT="$T/text.txt"
IN="$T/good" OUT="$T/out"
export PARE_NO_COLOR=1

# Every verb that reads a model folder refuses the same folders.
each_verb() { # NAME CODE PATTERN
  local name=$1 code=$2 pattern=$3
  refuse "$name: compress" "$code" "$pattern" "$PARE" compress --model "$IN" --out "$OUT" --text "$TEXT" --eval-text "$TEXT"
  refuse "$name: compress --dry-run" "$code" "$pattern" "$PARE" compress --dry-run --model "$IN" --out "$OUT" --text "$TEXT" --eval-text "$TEXT"
  refuse "$name: quantize" "$code" "$pattern" "$PARE" quantize --model "$IN" --out "$OUT" --text "$TEXT"
  refuse "$name: prune" "$code" "$pattern" "$PARE" prune --method wanda --sparsity 0.5 --model "$IN" --out "$OUT" --text "$TEXT"
  refuse "$name: export" "$code" "$pattern" "$PARE" export "$IN" --to compact --codec f32 --out "$OUT"
}

echo "--- weights"
fresh; head -c 4 "$T/good/model.safetensors" > "$T/m/model.safetensors"; each_verb "four bytes" 3 "model.safetensors"
fresh; : > "$T/m/model.safetensors"; each_verb "empty file" 3 "model.safetensors"
size=$(stat -c %s "$T/good/model.safetensors")
fresh; head -c $((size - 1)) "$T/good/model.safetensors" > "$T/m/model.safetensors"; each_verb "one byte short" 3 "model.safetensors"
fresh; head -c 300 "$T/good/model.safetensors" > "$T/m/model.safetensors"; each_verb "cut in the header" 3 "model.safetensors"
fresh; { le64 $((size * 2)); tail -c +9 "$T/good/model.safetensors"; } > "$T/m/model.safetensors"; each_verb "header longer than the file" 3 "model.safetensors"
fresh; { le64 9000000000000000000; tail -c +9 "$T/good/model.safetensors"; } > "$T/m/model.safetensors"; each_verb "header of exabytes" 3 "model.safetensors"
fresh; { le64 100000001; tail -c +9 "$T/good/model.safetensors"; head -c 100000100 /dev/zero; } > "$T/m/model.safetensors"; each_verb "header over 100 MB" 3 "model.safetensors"
fresh; safetensors '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}' 12 > "$T/m/model.safetensors"; each_verb "overlapping tensors" 3 "model.safetensors"
fresh; safetensors '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[12,20]}}' 20 > "$T/m/model.safetensors"; each_verb "a hole in the data" 3 "model.safetensors"
fresh; safetensors '{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,8]}}' 8 > "$T/m/model.safetensors"; each_verb "shape lies about bytes" 3 "model.safetensors"
fresh; safetensors '{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}}' 0 > "$T/m/model.safetensors"; each_verb "shape overflows" 3 "model.safetensors"
fresh; safetensors '{"a":{"dtype":"F31","shape":[2],"data_offsets":[0,8]}}' 8 > "$T/m/model.safetensors"; each_verb "unknown dtype" 3 "model.safetensors"
fresh; safetensors 'not json' 8 > "$T/m/model.safetensors"; each_verb "header is not JSON" 3 "model.safetensors"
fresh; safetensors '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}' 4 > "$T/m/model.safetensors"; each_verb "duplicate key" 3 "model.safetensors"
fresh; rm "$T/m/model.safetensors"; each_verb "no weights" 3 "safetensors"
fresh; rm "$T/m/model.safetensors"; printf '{"metadata":{},"weight_map":{"model.norm.weight":"model-00001-of-00002.safetensors"}}' > "$T/m/model.safetensors.index.json"; each_verb "missing shard" 3 "model-00001-of-00002"
fresh; rm "$T/m/model.safetensors"; printf '{"metadata":{},"weight_map":{"model.norm.weight":"../../etc/passwd"}}' > "$T/m/model.safetensors.index.json"; each_verb "shard outside the folder" 3 "index|passwd"

echo "--- configuration"
edit() { fresh; sed -i "s/$1/$2/" "$T/m/config.json"; cmp -s "$T/m/config.json" "$T/good/config.json" && { echo "FAILED edit $1: config unchanged"; FAILED=$((FAILED + 1)); }; }
edit '"num_hidden_layers": *2' '"num_hidden_layers": 3'; each_verb "missing tensors" 3 "layers\.2"
edit '"num_hidden_layers": *2' '"num_hidden_layers": 1'; each_verb "extra tensors" 3 "layers\.1"
edit '"intermediate_size": *128' '"intermediate_size": 160'; each_verb "wrong shapes" 3 "(128|160)"
edit '"num_hidden_layers": *2' '"num_hidden_layers": 2000000000'; each_verb "absurd number of layers" 3 "num_hidden_layers|layers"
edit '"num_hidden_layers": *2' '"num_hidden_layers": -1'; each_verb "negative layers" 3 "num_hidden_layers"
edit '"hidden_size": *64' '"hidden_size": "64"'; each_verb "size as text" 3 "hidden_size"
edit '"model_type": *"llama"' '"model_type": "mamba"'; sed -i 's/LlamaForCausalLM/MambaForCausalLM/' "$T/m/config.json"; each_verb "unknown architecture" 3 "mamba"
fresh; printf '{' > "$T/m/config.json"; each_verb "broken config.json" 3 "config.json"
fresh; rm "$T/m/config.json"; each_verb "no config.json" 3 "config.json"
fresh; head -c 200 "$T/good/tokenizer.json" > "$T/m/tokenizer.json"
refuse "broken tokenizer: compress" 3 "tokenizer.json" "$PARE" compress --model "$IN" --out "$OUT" --text "$TEXT"
refuse "broken tokenizer: quantize" 3 "tokenizer.json" "$PARE" quantize --model "$IN" --out "$OUT" --text "$TEXT"
fresh; sed -i 's/"type": *"BPE"/"type":"Unigram"/' "$T/m/tokenizer.json"
refuse "tokenizer of another kind: compress" 3 "tokenizer.json|Unigram" "$PARE" compress --model "$IN" --out "$OUT" --text "$TEXT"

echo "--- text, output, options"
fresh; : > "$T/empty.txt"; printf ' \n\n' > "$T/blank.txt"
refuse "empty text: compress" 3 "empty.txt" "$PARE" compress --model "$IN" --out "$OUT" --text "$T/empty.txt"
refuse "empty text: quantize" 3 "empty.txt" "$PARE" quantize --model "$IN" --out "$OUT" --text "$T/empty.txt"
refuse "empty held-out text" 3 "empty.txt" "$PARE" compress --model "$IN" --out "$OUT" --text "$TEXT" --eval-text "$T/empty.txt"
refuse "missing text" 3 "nowhere.txt" "$PARE" compress --model "$IN" --out "$OUT" --text "$T/nowhere.txt"
printf '{"text": 3}\n' > "$T/bad.jsonl"
refuse "jsonl of the wrong form" 3 "bad.jsonl:1" "$PARE" compress --model "$IN" --out "$OUT" --text "$T/bad.jsonl"
refuse "missing model" 3 "nowhere" "$PARE" compress --model "$T/nowhere" --out "$OUT"
refuse "output below a file" 1 "a-file" "$PARE" compress --model "$IN" --out "$TEXT/a-file" --text "$TEXT"
refuse "output on /proc" 1 "proc" "$PARE" quantize --model "$IN" --out /proc/pare-out --text "$TEXT"
mkdir "$OUT"; echo mine > "$OUT/precious"
refuse "existing output: compress" 2 "exist" "$PARE" compress --model "$IN" --out "$OUT" --text "$TEXT"
refuse "existing output: quantize" 2 "exist" "$PARE" quantize --model "$IN" --out "$OUT" --text "$TEXT"
refuse "existing output: prune" 2 "exist" "$PARE" prune --method wanda --sparsity 0.5 --model "$IN" --out "$OUT" --text "$TEXT"
[ "$(cat "$OUT/precious")" = mine ] || { echo "FAILED existing output was touched"; FAILED=$((FAILED + 1)); }
rm -rf "$OUT"
refuse "output is the input" 2 "." "$PARE" compress --model "$IN" --out "$IN" --text "$TEXT"
refuse "output inside the input" 2 "." "$PARE" compress --model "$IN" --out "$IN/out" --text "$TEXT"
refuse "unknown flag" 2 "text" "$PARE" compress --model "$IN" --out "$OUT" --txet "$TEXT"
refuse "unknown verb" 2 "compress" "$PARE" compres --model "$IN" --out "$OUT"
refuse "no model given" 2 "model" "$PARE" compress --out "$OUT"
printf 'stages:\n  - quantize: {codc: q4}\n' > "$T/r.yaml"
refuse "unknown recipe key" 2 "r.yaml:2:.*codc.*codec" "$PARE" compress "$T/r.yaml" --model "$IN" --out "$OUT"
printf 'stages: [a' > "$T/r.yaml"
refuse "recipe syntax" 2 "r.yaml:" "$PARE" compress "$T/r.yaml" --model "$IN" --out "$OUT"
refuse "recipe missing" 2 "nowhere.yaml" "$PARE" compress "$T/nowhere.yaml" --model "$IN" --out "$OUT"
refuse "unknown device" 2 "device|quantum" "$PARE" compress --model "$IN" --out "$OUT" --text "$TEXT" --device quantum
refuse "missed gate" 4 "mean-kl at most 0(\.0)?, measured" "$PARE" compress --model "$IN" --out "$OUT" --text "$TEXT" --eval-text "$TEXT" --require-mean-kl 0

rm -rf "$T/m"; cp -r "$T/ragged" "$T/m"
refuse "group does not divide, no fallback" "${GROUP_CODE:-3}" "172" "$PARE" quantize --model "$IN" --out "$OUT" --text "$TEXT" --codec q4g128 --fallback none
refuse "the same in a dry run" "${GROUP_CODE:-3}" "172" "$PARE" compress --dry-run --model "$IN" --out "$OUT" --text "$TEXT" --set quantize.codec=q4g128 --set quantize.fallback=none

refuse "quantize: an embedding has no inputs to round" 2 "embed_tokens.*q8c" "$PARE" quantize --model "$IN" --out "$OUT" --text "$TEXT" --embedding-codec w8a8
refuse "quantize: a codec that is not there" 2 "did you mean \"q3" "$PARE" quantize --model "$IN" --out "$OUT" --text "$TEXT" --codec q3g16

refuse "prune: sparsegpt without text" 2 "sparsegpt.*calibration text" "$PARE" prune --method sparsegpt --sparsity 0.5 --model "$IN" --out "$OUT"
refuse "prune: refitting without text" 2 "magnitude.*calibration text" "$PARE" prune --method magnitude --sparsity 0.5 --reconstruct --model "$IN" --out "$OUT"
refuse "prune: blocks that share out a pattern" 2 "allocation owl.*--pattern 2:4" "$PARE" prune --method wanda --pattern 2:4 --allocation owl --model "$IN" --out "$OUT" --text "$TEXT"
refuse "prune: damping of nothing" 2 "damping" "$PARE" prune --method wanda --sparsity 0.5 --damping 0.1 --model "$IN" --out "$OUT" --text "$TEXT"
refuse "prune: a budget that nothing meets" 2 "smallest that is searched takes" "$PARE" prune --method shape --max-bytes 1K --codec q4 --model "$IN" --out "$OUT" --text "$TEXT"
refuse "prune: two budgets" 2 "one of --max-params" "$PARE" prune --method shape --max-bytes 1M --max-params 99 --model "$IN" --out "$OUT" --text "$TEXT"
refuse "prune: bytes of no codec" 2 "codec" "$PARE" prune --method shape --max-bytes 1M --codec q99 --model "$IN" --out "$OUT" --text "$TEXT"
refuse "prune: a codec without a budget" 2 "which it is for" "$PARE" prune --method shape --layers 2 --codec q4 --model "$IN" --out "$OUT" --text "$TEXT"
refuse "prune: a multiple of no width" 2 "no use for --multiple-of" "$PARE" prune --method shape --layers 2 --multiple-of 16 --model "$IN" --out "$OUT" --text "$TEXT"
refuse "quantize: zeros and no code for them" 2 "exactly 0.*q4m" "$PARE" quantize --codec q4m --sparsity 0.5 --model "$IN" --out "$OUT" --text "$TEXT"
refuse "quantize: a pattern across scales" 2 "pattern.*5:10" "$PARE" quantize --pattern 5:10 --model "$IN" --out "$OUT" --text "$TEXT"
refuse "quantize: zeros that move" 2 "tune-codes" "$PARE" quantize --sparsity 0.5 --tune-codes 10 --model "$IN" --out "$OUT" --text "$TEXT"

echo "--- options that would do nothing"
unused() { # NAME OPTION COMMAND...
  local name=$1 option=$2
  shift 2
  refuse "$name" 2 "$option has no use" "$@"
}
unused "eval: split without text" "--split" "$PARE" eval "$IN" --tasks "$T/none.jsonl" --split x
unused "eval: form of no output" "--output-format" "$PARE" eval "$IN" --text "$TEXT" --output-format lm-eval
unused "eval: act without a compact file" "--act" "$PARE" eval "$IN" --text "$TEXT" --act float
unused "eval: top-k without a cache" "--top-k" "$PARE" eval "$IN" --text "$TEXT" --top-k 5
unused "run: top-p at temperature 0" "--top-p" "$PARE" run "$T/none.pare" -p x --top-p 0.5
unused "run: threshold without fallback" "--threshold" "$PARE" run "$T/none.pare" -p x --threshold 0.3
unused "run: draft tokens without a draft" "--draft-tokens" "$PARE" run "$T/none.pare" -p x --draft-tokens 3
unused "run: confidence of a look-up" "--draft-confidence" "$EDGE" run "$T/none.pare" -p x --lookup 3 --draft-confidence 0.2
unused "tokenize: show-special of a text" "--show-special" "$PARE" tokenize "$IN" --text x --show-special
unused "tokenize: plain of ids" "--plain" "$PARE" tokenize "$IN" --decode 1 --plain
unused "train: steps and tokens" "--steps" "$PARE" train --model "$IN" --out "$OUT" --text "$TEXT" --steps 3 --tokens 999
unused "finetune: alpha without adapters" "--lora-alpha" "$PARE" finetune --model "$IN" --out "$OUT" --text "$TEXT" --lora-alpha 3
unused "finetune: epochs and steps" "--epochs" "$PARE" finetune --model "$IN" --out "$OUT" --text "$TEXT" --steps 3 --epochs 2
unused "train: eval-every without held-out" "--eval-every" "$PARE" train --model "$IN" --out "$OUT" --text "$TEXT" --eval-every 3
unused "distill: cache-top-k without cache" "--cache-top-k" "$PARE" distill --teacher "$IN" --model "$IN" --out "$OUT" --text "$TEXT" --cache-top-k 3
unused "distill: cache-samples without cache" "--cache-samples" "$PARE" distill --teacher "$IN" --model "$IN" --out "$OUT" --text "$TEXT" --cache-samples 3
unused "distill: beta of another loss" "--beta" "$PARE" distill --teacher "$IN" --model "$IN" --out "$OUT" --text "$TEXT" --loss skew-kl --beta 0.3
unused "distill: alpha of another loss" "--alpha" "$PARE" distill --teacher "$IN" --model "$IN" --out "$OUT" --text "$TEXT" --loss jsd --alpha 0.3
unused "distill: loss without weight" "--loss" "$PARE" distill --teacher "$IN" --model "$IN" --out "$OUT" --text "$TEXT" --loss jsd --kl-weight 0 --ce-weight 1
unused "distill: layers without hidden-weight" "--hidden-layers" "$PARE" distill --teacher "$IN" --model "$IN" --out "$OUT" --text "$TEXT" --hidden-layers 0:1
unused "distill: continuations without on-policy" "--on-policy-tokens" "$PARE" distill --teacher "$IN" --model "$IN" --out "$OUT" --text "$TEXT" --on-policy-tokens 4
unused "distill: hidden states of a cache" "--hidden-weight" "$PARE" distill --teacher "$IN" --model "$IN" --out "$OUT" --text "$TEXT" --cache "$T/c.h5" --hidden-weight 1
unused "distill: continuations of a cache" "--on-policy" "$PARE" distill --teacher "$IN" --model "$IN" --out "$OUT" --text "$TEXT" --cache "$T/c.h5" --on-policy 0.5
refuse "distill: unknown loss" 2 "forward-kl.*adaptive-kl" "$PARE" distill --teacher "$IN" --model "$IN" --out "$OUT" --text "$TEXT" --loss mse
refuse "distill: another loss than the cache's" 2 "forward-kl" "$PARE" distill --teacher "$IN" --model "$IN" --out "$OUT" --text "$TEXT" --cache "$T/c.h5" --loss reverse-kl
refuse "distill: temperature of a cache without samples" 2 "cache-samples" "$PARE" distill --teacher "$IN" --model "$IN" --out "$OUT" --text "$TEXT" --cache "$T/c.h5" --tau 2
refuse "distill: cache of nothing" 2 "at least 1 without --cache-samples" "$PARE" distill --teacher "$IN" --model "$IN" --out "$OUT" --text "$TEXT" --cache "$T/c.h5" --cache-top-k 0
refuse "distill: continuations longer than the context" 2 "fewer than --context 16" "$PARE" distill --teacher "$IN" --model "$IN" --out "$OUT" --text "$TEXT" --context 16 --on-policy 1 --on-policy-tokens 16
refuse "distill: layers that do not exist" 2 "STUDENT:TEACHER" "$PARE" distill --teacher "$IN" --model "$IN" --out "$OUT" --text "$TEXT" --context 16 --hidden-weight 1 --hidden-layers 0:99
unused "compress: samples with text" "--samples" "$PARE" compress --model "$IN" --out "$OUT" --text "$TEXT" --eval-text "$TEXT" --samples 3
refuse "bench: -t and --threads" 2 "either -t or --threads" "$PARE" bench "$T/none.pare" -t 1 --threads 2
refuse "bench: nothing" 2 "nothing to measure" "$PARE" bench "$T/none.pare" -p 0 -n 0
unused "bench: depth without decoding" "--depth" "$PARE" bench "$T/none.pare" -n 0 --depth 3
unused "bench: sequences without decoding" "--sequences" "$PARE" bench "$T/none.pare" -n 0 --sequences 3
refuse "bench: machine before a file that is none" 3 "none.pare" "$PARE" bench "$T/none.pare" --roofline
refuse "run: draft and fallback" 2 "one of --draft and --fallback" "$PARE" run "$T/none.pare" -p x --draft "$T/none.pare" --fallback "$T/none.pare"
refuse "serve: no such file" 3 "none.pare" "$EDGE" serve "$T/none.pare" --port 0
refuse "serve: no port" 2 "port" "$EDGE" serve "$T/none.pare" --port 65536
refuse "serve: nothing at a time" 2 "parallel" "$EDGE" serve "$T/none.pare" --parallel 0
refuse "serve: a queue below nothing" 2 "queue" "$EDGE" serve "$T/none.pare" --queue -1
refuse "serve: size in no unit" 2 "max-body" "$EDGE" serve "$T/none.pare" --max-body much
refuse "eval: the harness's results of no tasks" 2 "--tasks with it" "$EDGE" eval "$T/none.pare" --text "$TEXT" --output x.json \
  --output-format lm-eval
refuse "eval: the harness's results against an original" 2 "one model alone" "$EDGE" eval "$T/none.pare" --tasks "$T/x.jsonl" \
  --against "$T/none.pare" --output "$T" --output-format lm-eval
refuse "eval: output into no folder" 2 "folder that exists" "$EDGE" eval "$T/none.pare" --text "$TEXT" --output "$T/none/x.json"
refuse "run: draft and look-up" 2 "one of --draft and --lookup" "$EDGE" run "$T/none.pare" -p x --draft "$T/none.pare" --lookup 3
refuse "run: look-up and fallback" 2 "one of --lookup and --fallback" "$EDGE" run "$T/none.pare" -p x --lookup 3 --fallback "$T/none.pare"
refuse "run: look-up of no tokens" 2 "lookup" "$EDGE" run "$T/none.pare" -p x --lookup 0
refuse "run: too many guesses" 2 "draft-tokens.*64" "$EDGE" run "$T/none.pare" -p x --draft x --draft-tokens 65
refuse "run: threshold that is no probability" 2 "threshold" "$EDGE" run "$T/none.pare" -p x --fallback x --threshold nan
refuse "run: unknown cache" 2 "f32.*f16.*mixed.*q8" "$PARE" run "$T/none.pare" -p x --kv f8
unused "eval: cache of a folder" "--kv" "$PARE" eval "$IN" --text "$TEXT" --kv q8

echo "--- no space left"
fresh
# A file size limit fails writes as a full disk does; the signal must not end the process.
refuse "write limit: quantize" 1 "write|large|space" bash -c "trap '' XFSZ; ulimit -f 40; exec '$PARE' quantize --model '$IN' --out '$OUT' --text '$TEXT'"
refuse "write limit: compress" 1 "write|large|space" bash -c "trap '' XFSZ; ulimit -f 40; exec '$PARE' compress --model '$IN' --out '$OUT' --text '$TEXT'"
refuse "write limit: export" 1 "write|large|space" bash -c "trap '' XFSZ; ulimit -f 40; exec '$PARE' export '$IN' --to compact --codec f32 --out '$OUT'"
refuse "write limit: export to GGUF" 1 "write|large|space" bash -c "trap '' XFSZ; ulimit -f 40; exec '$PARE' export '$IN' --to gguf --codec f32 --out '$OUT'"
refuse "write limit: new" 1 "write|large|space" bash -c "trap '' XFSZ; ulimit -f 40; exec '$EDGE' new '$IN/config.json' --out '$OUT'"
[ ! -e "$OUT.partial" ] || { FAILED=$((FAILED + 1)); echo "FAILED: new left a partial folder behind"; }
# Weights fit below this limit, the activations that --max-ram sends to a file do not.
refuse "write limit: activations of quantize" 1 "calibration activations" bash -c "trap '' XFSZ; ulimit -f 8192; exec '$PARE' quantize --model '$IN' --out '$OUT' --random-tokens --samples 4000 --context 64 --max-ram 290M"
rm -rf "$OUT.partial"
mkdir "$T/full"
mkdir "$T/temporary"
refuse "write limit: eval of a folder" 1 "write|large|space" bash -c "trap '' XFSZ; export TMPDIR='$T/temporary'; ulimit -f 40; exec '$EDGE' eval '$IN' --text '$TEXT'"
[ -z "$(ls -A "$T/temporary")" ] || { FAILED=$((FAILED + 1)); echo "FAILED: eval left a temporary file behind"; }
if unshare -rm true 2>/dev/null && unshare -rm mount -t tmpfs -o size=256k none "$T/full" 2>/dev/null; then
  full() { unshare -rm bash -c "mount -t tmpfs -o size=256k none '$T/full' && '$PARE' $1; code=\$?; [ ! -e '$T/full/out' ] || exit 99; exit \$code"; }
  export -f full; export T PARE
  refuse "full disk: quantize" 1 "space" bash -c "full \"quantize --model '$IN' --out '$T/full/out' --text '$TEXT'\""
  refuse "full disk: export" 1 "space" bash -c "full \"export '$IN' --to compact --codec f32 --out '$T/full/out'\""
  refuse "full disk: compress" 5 "disk" bash -c "full \"compress --model '$IN' --out '$T/full/out' --text '$TEXT'\""
else
  echo "SKIPPED full disk: no permission to mount a tmpfs"
fi

echo "--- a new folder"
fresh
refuse "new: unknown shape" 2 "did you mean Llama-3.2-1B" "$EDGE" new Llama-3.2-1 --out "$OUT"
refuse "new: empty config" 3 "no architecture" bash -c "echo '{}' > '$T/empty.json'; exec '$EDGE' new '$T/empty.json' --out '$OUT'"
refuse "new: truncated config" 3 "cut.json" bash -c "head -c 40 '$IN/config.json' > '$T/cut.json'; exec '$EDGE' new '$T/cut.json' --out '$OUT'"
refuse "new: no layers" 2 "layers" "$EDGE" new "$IN/config.json" --layers 0 --out "$OUT"
refuse "new: more than the disk holds" 5 "free bytes" "$EDGE" new Mixtral-8x7B --layers 10000 --out "$OUT"
refuse "new: no tokenizer there" 3 "tokenizer.json" "$EDGE" new "$IN/config.json" --tokenizer "$T/nowhere" --out "$OUT"
refuse "new: existing output" 2 "does not exist yet" "$EDGE" new "$IN/config.json" --out "$IN"
OUT="$T/theirs"; mkdir "$OUT.partial"; echo theirs > "$OUT.partial/quantize.json"
refuse "new: unfinished work of another command" 2 "another command" "$EDGE" new "$IN/config.json" --out "$OUT"
[ "$(cat "$OUT.partial/quantize.json" 2>/dev/null)" = theirs ] || { FAILED=$((FAILED + 1)); echo "FAILED: new touched another command's work"; }
rm -rf "$OUT.partial"

echo "--- GGUF"
fresh
refuse "GGUF: codec that it has not" 2 "GGUF blocks" "$PARE" export "$IN" --to gguf --codec q4g128 --out "$OUT"
refuse "GGUF: existing output" 2 "does not exist yet" "$PARE" export "$IN" --to gguf --out "$IN/config.json"
refuse "GGUF: tokenizer_config.json that is a list" 3 "tokenizer_config.json" bash -c "cp -r '$IN' '$T/listed'; echo '[]' > '$T/listed/tokenizer_config.json'; exec '$PARE' export '$T/listed' --to gguf --out '$OUT'"
"$EDGE" export "$IN" --to gguf --out "$T/good.gguf" --quiet || { echo "cannot make a GGUF file"; exit 1; }
head -c 3000 "$T/good.gguf" > "$T/cut.gguf"
(head -c 8 "$T/good.gguf"; printf '\377\377\377\377\377\377\377\177'; tail -c +17 "$T/good.gguf") > "$T/many.gguf"
for verb in inspect run bench; do
  for file in cut many; do refuse "GGUF: $file, by $verb" 3 "$file.gguf: byte" "$EDGE" $verb "$T/$file.gguf"; done
done
refuse "GGUF: cut off, by eval" 3 "cut.gguf: byte" "$EDGE" eval "$T/cut.gguf" --text "$T/good.gguf"
refuse "serve: a context that the model does not have" 3 "--ctx" "$EDGE" serve "$T/good.gguf" --port 0 --ctx 100000000
refuse "serve: an address of nobody here" 1 "listened on" "$EDGE" serve "$T/good.gguf" --port 0 --host 203.0.113.7
refuse "GGUF: cut off, by export" 3 "cut.gguf: byte" "$EDGE" export "$T/cut.gguf" --out "$OUT"
refuse "GGUF where a folder is asked for" 3 "to folder" "$PARE" quantize --model "$T/good.gguf" --out "$OUT" --codec q4 --method rtn
refuse "GGUF: requantize for another target" 2 "to gguf" "$EDGE" export "$IN" --requantize --out "$OUT"
refuse "folder: a codec" 2 "keep" "$EDGE" export "$T/good.gguf" --to folder --codec q4 --out "$OUT"
refuse "export: neither an output nor --dry-run" 2 "dry-run" "$EDGE" export "$T/good.gguf"
refuse "export: dry run of a codec that GGUF has not" 2 "GGUF blocks" "$EDGE" export "$IN" --to gguf --codec q4g128 --dry-run
refuse "GGUF: K-quants for another target" 2 "to gguf" "$EDGE" export "$IN" --codec q4_k --out "$OUT"
refuse "GGUF: a K-quant that there is not" 2 "q2_k to q6_k" "$EDGE" export "$IN" --to gguf --codec q4_k_m --out "$OUT"
refuse "GGUF: rows that K-quants do not take" 3 "whole blocks of 256" "$EDGE" export "$IN" --to gguf --codec q4_k --no-fallback --out "$OUT"
refuse "GGUF: importances for a codec without a search" 2 "q2_k to q6_k" "$EDGE" export "$IN" --to gguf --codec q8 --imatrix "$T/good.gguf" --out "$OUT"
refuse "GGUF: importances for another target" 2 "to gguf" "$EDGE" export "$IN" --imatrix "$T/good.gguf" --out "$OUT"
refuse "GGUF: importances in a model" 3 "llama-imatrix" "$EDGE" export "$IN" --to gguf --codec q4_k --imatrix "$T/good.gguf" --out "$OUT"
refuse "GGUF: importances, cut off" 3 "cut.gguf: byte" "$EDGE" export "$IN" --to gguf --codec q4_k --imatrix "$T/cut.gguf" --out "$OUT"
refuse "plan: cut off" 3 "cut.gguf: byte" "$EDGE" plan "$T/cut.gguf"
refuse "quantize: no size" 2 "max-ram.*4G" "$PARE" quantize --model "$IN" --out "$OUT" --text "$TEXT" --max-ram 4GB
refuse "prune: no shape" 2 "needs --layers" "$PARE" prune --method shape --model "$IN" --out "$OUT" --text "$TEXT"
refuse "prune: more blocks than there are" 2 "where the model has" "$PARE" prune --method shape --layers 99 --model "$IN" --out "$OUT" --text "$TEXT"
refuse "prune: a budget beside a shape" 2 "max-params and --layers" "$PARE" prune --method shape --layers 1 --max-params 9 --model "$IN" --out "$OUT" --text "$TEXT"
refuse "prune: a budget out of reach" 2 "searched takes, [0-9]+ parameters" "$PARE" prune --method shape --max-params 9 --model "$IN" --out "$OUT" --text "$TEXT"
refuse "prune: a speed beyond the range" 2 "^pare prune: --min-tokens-per-second: expected at least 0.001 and at most 1000000, found" "$PARE" prune --method shape --min-tokens-per-second 1e9 --model "$IN" --out "$OUT" --text "$TEXT"
refuse "prune: experts of a model without" 2 "the model has none" "$PARE" prune --method shape --experts 1 --model "$IN" --out "$OUT" --text "$TEXT"
refuse "prune: too little memory" 5 "max-ram" "$PARE" prune --method wanda --sparsity 0.5 --model "$IN" --out "$OUT" --text "$TEXT" --max-ram 100M
refuse "quantize: too little memory" 5 "max-ram" "$PARE" quantize --model "$IN" --out "$OUT" --text "$TEXT" --max-ram 100M

accept "quantize: a preset whose ranks wait" "$PARE" quantize --preset fast --rank-timeout 5 --model "$IN" --out "$T/waits"
accept "dry run of such a recipe" "$PARE" compress --dry-run --set quantize.preset=balanced --set quantize.rank-timeout=5 --model "$IN" --out "$OUT" --text "$TEXT"
for verb in "new Llama-3.2-1B --layers 1" "export $IN" "train-tokenizer --text $TEXT" "compress --model $IN --text $TEXT"; do
  refuse "two ranks: ${verb%% *}" 2 "hint: .*pare train, finetune, distill" env WORLD_SIZE=2 RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=29511 "$PARE" $verb --out "$OUT"
done
refuse "two ranks: report" 2 "WORLD_SIZE: expected 1" env WORLD_SIZE=2 RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=29511 "$PARE" report "$IN"
accept "two ranks: what only reads" env WORLD_SIZE=2 RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=29511 "$PARE" plan "$IN"

echo "--- compact files"
fresh
accept "export" "$PARE" export "$IN" --to compact --codec q8 --out "$T/good.pare"
IN="$T/files"; mkdir -p "$IN"
size=$(stat -c %s "$T/good.pare")
for cut in 0 7 100 2000 $((size / 2)) $((size - 1)); do
  head -c "$cut" "$T/good.pare" > "$IN/cut.pare"
  refuse "compact file cut at $cut: run" 3 "cut.pare" "$PARE" run "$IN/cut.pare" -p x -n 2
  refuse "compact file cut at $cut: verify" 3 "cut.pare" "$PARE" verify "$IN/cut.pare"
done
cp "$T/good.pare" "$IN/flip.pare"
printf '\x55' | dd of="$IN/flip.pare" bs=1 seek=$((size / 2)) conv=notrunc 2>/dev/null
refuse "one byte changed: verify" 3 "flip.pare|hash|differ" "$PARE" verify "$IN/flip.pare"
for way in draft fallback; do
  refuse "run: no $way there" 3 "nowhere.pare" "$EDGE" run "$T/good.pare" -p x -n 2 --$way "$T/nowhere.pare"
  refuse "run: $way cut off" 3 "cut.pare" "$EDGE" run "$T/good.pare" -p x -n 2 --$way "$IN/cut.pare"
  refuse "run: a folder as $way" 3 "good" "$EDGE" run "$T/good.pare" -p x -n 2 --$way "$T/good"
  rm -rf "$T/strange" "$T/strange.pare"; cp -r "$T/good" "$T/strange"
  sed -i 's/endoftext/endofsong/g' "$T/strange/tokenizer.json"
  cmp -s "$T/good/tokenizer.json" "$T/strange/tokenizer.json" && { echo "FAILED no other tokenizer"; FAILED=$((FAILED + 1)); }
  accept "export with another tokenizer" "$PARE" export "$T/strange" --to compact --codec q8 --out "$T/strange.pare"
  refuse "run: $way with other tokens" 3 "strange.pare.*as in good.pare" "$EDGE" run "$T/good.pare" -p x -n 2 --$way "$T/strange.pare"
  accept "run: the model as its own $way" "$EDGE" run "$T/good.pare" -p x -n 9 --$way "$T/good.pare"
done
refuse "a folder is no compact file: run" 3 "." "$PARE" run "$T/good" -p x -n 2
refuse "text is no compact file: run" 3 "text.txt" "$PARE" run "$TEXT" -p x -n 2
refuse "no chat template: run --chat" 3 "chat template.*found none" "$PARE" run "$T/good.pare" --chat -p x
refuse "system message without chat: run" 2 "--system has no use without --chat" "$PARE" run "$T/good.pare" -p x --system s
refuse "end tokens ignored in a chat: run" 2 "--ignore-eos has no use" "$PARE" run "$T/good.pare" --chat --ignore-eos
template() { # NAME TEMPLATE: the model with it, exported to T/NAME.pare
  rm -rf "$T/talks"; cp -r "$T/good" "$T/talks"
  printf '%s' "$2" > "$T/talks/chat_template.jinja"
  accept "export with a chat template" "$PARE" export "$T/talks" --to compact --codec q8 --out "$T/$1.pare"
}
template broken '{{ messages'
refuse "broken chat template" 3 "chat_template.jinja: line 1" "$PARE" run "$T/broken.pare" --chat -p x
template reads $'hi\n{% include "/etc/passwd" %}'
refuse "chat template that reads a file" 3 "chat_template.jinja: line 2.*include" "$EDGE" run "$T/reads.pare" --chat -p x
template endless '{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}'
refuse "chat template without end" 3 "more than 10000000 steps" "$PARE" run "$T/endless.pare" --chat -p x
template talks '{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}'
accept "two turns of a chat" bash -c "printf 'one\ntwo\n' | '$EDGE' run '$T/talks.pare' --chat --json -n 3 > '$T/turns.json'"
grep -q '"prompt": *"\[user\]one\[assistant\].*\[user\]two' "$T/turns.json" || { echo "FAILED the chat forgot its first turn"; FAILED=$((FAILED + 1)); }
cp "$T/good.pare" "$T/exists.pare"
OUT="$T/out"
refuse "export over an existing file" 2 "exist" "$PARE" export "$T/good" --to compact --codec f32 --out "$T/exists.pare"
cmp -s "$T/good.pare" "$T/exists.pare" || { echo "FAILED the existing file was changed"; FAILED=$((FAILED + 1)); }

echo "--- examples and reports"
fresh
for line in '{"prompt": "a", "response": ""}' '{"prompt": "a"}' '{"messages": [{"role": "user", "content": "a"}]}' '{"prompt": '; do
  printf '{"prompt": "a", "response": "b"}\n%s\n' "$line" > "$T/bad.jsonl"
  refuse "finetune: $line" 3 "bad.jsonl:2" "$PARE" finetune --model "$IN" --out "$OUT" --text "$T/bad.jsonl"
done
printf '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n' > "$T/chat.jsonl"
refuse "finetune: a chat without a template" 3 "chat.jsonl:1.*chat template" "$PARE" finetune --model "$IN" --out "$OUT" --text "$T/chat.jsonl"
refuse "finetune: no such linear" 2 "q_proj" "$PARE" finetune --model "$IN" --out "$OUT" --text "$TEXT" --lora-rank 2 --lora-targets query
refuse "report of nothing" 3 "train.jsonl" "$PARE" report "$T/nowhere"
printf '{"step": 1}\n{"step": \n' > "$T/m/train.jsonl"
refuse "report of a broken curve" 3 "train.jsonl:2" "$PARE" report "$IN" --out "$OUT"
fresh
accept "finetune with adapters" "$PARE" finetune --model "$IN" --out "$T/tuned" --text "$TEXT" --held-out "$TEXT" --lora-rank 2 --steps 2 --batch 1 --context 64 --adapter
accept "report of it" "$PARE" report "$T/tuned"
accept "report from inside" bash -c "cd '$T/tuned' && '$PARE' report ."
[ ! -e "$T/tuned/..html" ] || { echo "FAILED a hidden page inside the run"; FAILED=$((FAILED + 1)); }
grep -q '<svg' "$T/tuned.html" || { echo "FAILED the page has no curves"; FAILED=$((FAILED + 1)); }

echo "--- one JSON object"
fresh
one_object() { # NAME CODE COMMAND...
  local name=$1 code=$2
  shift 2
  CASES=$((CASES + 1))
  "$@" >"$T/stdout" 2>"$T/stderr"
  local got=$?
  if [ "$got" != "$code" ] || ! "$BUILD/tests/make_tiny_model" --json-object "$T/stdout"; then
    echo "FAILED $name: exit $got, stdout: $(head -c 300 "$T/stdout")"
    FAILED=$((FAILED + 1))
  else
    echo "ok $name"
  fi
}
one_object "doctor --json" 0 "$PARE" doctor --json
one_object "dry run --json" 0 "$PARE" compress --dry-run --json --model "$IN" --out "$OUT" --text "$TEXT"
one_object "compress --json" 0 "$PARE" compress --json --model "$IN" --out "$OUT" --text "$TEXT" --eval-text "$TEXT"
one_object "compress --json again" 0 "$PARE" compress --json --model "$IN" --out "$OUT" --text "$TEXT" --eval-text "$TEXT"
grep -q '"already finished"' "$T/stdout" || { echo "FAILED the second run did work"; FAILED=$((FAILED + 1)); }
one_object "error --json" 3 "$PARE" compress --json --model "$T/nowhere" --out "$OUT"

echo "$CASES cases, $FAILED failed"
[ "$FAILED" = 0 ]
