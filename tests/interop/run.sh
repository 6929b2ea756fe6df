#!/bin/bash
# Real clients read what pare writes: transformers, compressed-tensors, tokenizers, safetensors.
#   tests/interop/run.sh BUILD_DIR        PARE_PYTHON: the interpreter that has them (default: python3)
# Exit 77 (skipped, said aloud) when that interpreter lacks them; 1 on any difference.
set -u
BUILD=$(cd "${1:?usage: run.sh BUILD_DIR}" && pwd) || exit 2
HERE=$(cd "$(dirname "$0")" && pwd)
ROOT=$(cd "$HERE/../.." && pwd)
PYTHON=${PARE_PYTHON:-python3}
export OMP_WAIT_POLICY=passive
if ! "$PYTHON" -c 'import torch, transformers, tokenizers, safetensors, compressed_tensors, gguf' 2>/dev/null; then
  echo "SKIPPED: $PYTHON has not all of torch, transformers, tokenizers, safetensors, compressed-tensors and gguf;"
  echo "install them with pip and name that interpreter in PARE_PYTHON. Nothing was checked against real clients."
  exit 77
fi
T=$(mktemp -d)
trap 'rm -rf "$T"' EXIT
FAILED=0
check() {
  local name=$1
  shift
  if "$@" >"$T/log" 2>&1; then echo "ok $name"; else
    FAILED=1
    echo "FAILED $name"
    tail -n 25 "$T/log"
  fi
}
for codec in q4 q4g128 q8 q3 q3g128 q2 w8a8; do
  "$BUILD/pare" quantize --quiet --model "$ROOT/examples/teacher" --out "$T/$codec" --codec $codec --text "$ROOT/README.md" \
    --samples 4 --context 128 >/dev/null && check "quantized folder $codec" "$PYTHON" "$HERE/compressed_tensors.py" "$T/$codec"
done
"$BUILD/pare" quantize --quiet --model "$ROOT/examples/teacher" --out "$T/signed" --codec q4 --method rtn-q4_0 >/dev/null &&
  check "scales of either sign" "$PYTHON" "$HERE/compressed_tensors.py" "$T/signed"
"$BUILD/pare" quantize --quiet --model "$ROOT/examples/teacher" --out "$T/q4m" --codec q4m --method rtn >/dev/null
check "GGUF files" "$PYTHON" "$HERE/gguf_file.py" "$BUILD/pare" "$ROOT/examples/teacher" "$T/q4" "$T/q8" "$T/q3" "$T/w8a8" \
  "$T/q4m"
for codec in q4a q8c; do
  "$BUILD/pare" quantize --quiet --model "$ROOT/examples/teacher" --out "$T/$codec" --codec $codec --method rtn >/dev/null
done
check "GPTQ folders" "$PYTHON" -B "$HERE/gptq_folder.py" "$BUILD/pare" "$ROOT/examples/teacher" "$T/q4" "$T/q4g128" "$T/q4a" \
  "$T/q8" "$T/q8c"
check "pruned folders" "$PYTHON" "$HERE/pruned_folder.py" "$BUILD/pare"
check "families" "$PYTHON" "$HERE/families.py" "$BUILD"
check "trained tokenizer" "$PYTHON" "$HERE/tokenizers_train.py" "$BUILD/pare" "$ROOT/README.md" --vocab-size 600
check "tokenizers" "$PYTHON" "$HERE/tokenizers_fuzz.py" "$BUILD/pare" "$ROOT"/tests/golden/tokenizers/*.json \
  "$ROOT/examples/teacher/tokenizer.json" --count 1000
if ! "$PYTHON" -c 'import sentencepiece, google.protobuf' 2>/dev/null; then
  echo "SKIPPED tokenizer.model: $PYTHON has not both of sentencepiece and protobuf"
elif [ ! -e "$BUILD/pare_sentencepiece.so" ]; then
  echo "SKIPPED tokenizer.model: built without libsentencepiece"
else
  check "tokenizer.model" "$PYTHON" "$HERE/sentencepiece_fuzz.py" "$BUILD/pare" --count 1000
fi
if [ -n "${PARE_LLAMA_CPP:-}" ]; then
  check "llama.cpp" "$PYTHON" -B "$HERE/llama_cpp.py" "$BUILD" --llama "$PARE_LLAMA_CPP"
else
  echo "SKIPPED llama.cpp: name a checkout with a build in it in PARE_LLAMA_CPP"
fi
if [ -n "${PARE_CHAT_TEMPLATES:-}" ]; then
  check "chat templates" "$PYTHON" "$HERE/chat_templates.py" "$BUILD/tests/render_chat" "$PARE_CHAT_TEMPLATES"/*.jinja \
    --mutate 500
else
  echo "SKIPPED chat templates: name a folder of published *.jinja files in PARE_CHAT_TEMPLATES"
fi
if "$PYTHON" -c 'import openai' 2>/dev/null; then
  check "openai client" "$PYTHON" -B "$HERE/openai_client.py" "$BUILD/pare-edge"
else
  echo "SKIPPED openai client: $PYTHON has not openai"
fi
if "$PYTHON" -c 'import lm_eval, aiohttp, tenacity' 2>/dev/null; then
  check "lm-evaluation-harness" "$PYTHON" -B "$HERE/lm_eval_client.py" "$BUILD/pare-edge" \
    ${PARE_EVAL_DATA:+--data "$PARE_EVAL_DATA"}
else
  echo "SKIPPED lm-evaluation-harness: $PYTHON has not lm-eval[api]"
fi
exit $FAILED
