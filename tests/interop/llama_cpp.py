#!/usr/bin/env python3
"""llama.cpp as a client of pare's GGUF files, and pare as a reader of llama.cpp's.

 families     a small model of every family, in every type: llama.cpp's tokens of greedy decoding over 64 steps (float32
              KV cache) are those of pare's runtime wherever its margin is clear, and the logits agree
 teacher      the same for examples/teacher and for codes of it; perplexity by llama-perplexity against `pare eval` on
              the same text and windows
 tokenizers   1,000 texts: ids of llama.cpp, of the folder's tokenizer and of the one that pare rebuilds from the file
 k_quants     a small Llama and a small Gemma with rows of 256 in Q2_K to Q6_K, with llama-imatrix's importances too:
              llama.cpp's tokens are those of the runtime on the same file and on the folder made of it
 foreign      files that llama-quantize made, K-quants too, in `pare eval`

usage: llama_cpp.py BUILD_DIR [--llama DIR] [--only NAME ...] [--text FILE] [--json FILE]
DIR: a checkout of llama.cpp with a build in it (libllama.so, llama-perplexity, llama-quantize), or PARE_LLAMA_CPP.
Exit code 1 on any difference, 77 (said aloud) where there is no llama.cpp. Standard library only; the package `gguf`
reads the files too where it is installed, and `tokenizers` judges where llama.cpp differs."""
import argparse
import array
import json
import os
import pathlib
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import unicodedata

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
TOKENIZERS = ROOT / "tests/golden/tokenizers"
sys.path[0] = str(HERE)
try:
    import gguf
except ImportError:
    gguf = None
try:
    import tokenizers
except ImportError:
    tokenizers = None

STEPS = 64
# Largest difference of a logit, and the margin above which the tokens have to be the same, both relative to the spread
# of the logits. llama.cpp multiplies F16 with inputs rounded to F16, BF16 with BF16, blocks with int8 in blocks of 32,
# K-quants with int8 in blocks of 256; pare multiplies by floats here. Its GELU comes from a table of halves. The
# margins of types that round inputs are what was seen to hold, not twice the bound. Small differences choose other
# experts: with them, types other than F32 are held to nine of ten clear steps.
BOUNDS = {"f32": (1e-4, None), "gelu f32": (5e-3, None), "f16": (2e-2, 2e-2), "bf16": (1e-1, 1e-1),
          "q8": (0.25, 0.15), "q4": (0.25, 0.15), "k": (0.6, 0.3)}


def small(family, architecture, tokenizer, **keys):
    base = dict(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
                num_key_value_heads=2, head_dim=16, max_position_embeddings=256, rms_norm_eps=1e-5,
                rope_theta=10000.0, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, torch_dtype="float32")
    return tokenizer, {"architectures": [architecture], "model_type": family, **base, **keys}


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
LONG = {"type": "longrope", "short_factor": [1.0 + 0.05 * i for i in range(6)],
        "long_factor": [1.5 + 0.7 * i for i in range(6)]}
FAMILIES = {
    "llama": small("llama", "LlamaForCausalLM", "llama3"),
    "llama_scaled": small("llama", "LlamaForCausalLM", "smollm", rope_scaling=LLAMA3, attention_bias=True,
                          mlp_bias=True, tie_word_embeddings=True, head_dim=24, num_key_value_heads=1),
    "llama_linear": small("llama", "LlamaForCausalLM", "deepseek", rope_scaling={"type": "linear", "factor": 4.0}),
    "llama_widths": small("llama", "LlamaForCausalLM", "llama3", intermediate_size=[128, 64, 96],
                          num_attention_heads=[4, 2, 4], num_key_value_heads=[2, 1, 1]),
    "mistral": small("mistral", "MistralForCausalLM", "llama2", sliding_window=None),
    "mixtral": small("mixtral", "MixtralForCausalLM", "mistral", num_local_experts=4, num_experts_per_tok=2,
                     sliding_window=None),
    "qwen2": small("qwen2", "Qwen2ForCausalLM", "qwen2", tie_word_embeddings=True),
    "qwen3": small("qwen3", "Qwen3ForCausalLM", "qwen2", head_dim=32),
    "qwen3_moe": small("qwen3_moe", "Qwen3MoeForCausalLM", "qwen2", num_experts=4, num_experts_per_tok=2,
                       moe_intermediate_size=96, norm_topk_prob=True),
    "gemma": small("gemma", "GemmaForCausalLM", "gemma", tie_word_embeddings=True, hidden_act="gelu",
                   hidden_activation=None),
    "gemma2": small("gemma2", "Gemma2ForCausalLM", "gemma", tie_word_embeddings=True, query_pre_attn_scalar=16,
                    sliding_window=24, attn_logit_softcapping=5.0, final_logit_softcapping=10.0,
                    hidden_activation="gelu_pytorch_tanh", num_hidden_layers=4),
    "gemma3": small("gemma3_text", "Gemma3ForCausalLM", "gemma", tie_word_embeddings=True, query_pre_attn_scalar=16,
                    sliding_window=24, sliding_window_pattern=3, hidden_activation="gelu_pytorch_tanh",
                    rope_theta=1000000.0, rope_local_base_freq=10000.0, num_hidden_layers=4,
                    rope_scaling={"rope_type": "linear", "factor": 8.0}),
    "phi3": small("phi3", "Phi3ForCausalLM", "llama2", sliding_window=None),
    # llama.cpp chooses the factors by its context, which it makes a multiple of 256: short ones here.
    "phi3_long": small("phi3", "Phi3ForCausalLM", "llama2", rope_scaling=LONG, partial_rotary_factor=0.75,
                       original_max_position_embeddings=256, max_position_embeddings=512, sliding_window=None,
                       tie_word_embeddings=True),
    "smollm3": small("smollm3", "SmolLM3ForCausalLM", "llama3", num_hidden_layers=5, tie_word_embeddings=True),
    "gpt2": ("gpt2", {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 512, "n_embd": 64,
                      "n_layer": 3, "n_head": 4, "n_positions": 256, "activation_function": "gelu_new",
                      "layer_norm_epsilon": 1e-5, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32"}),
    "gpt_neox": small("gpt_neox", "GPTNeoXForCausalLM", "gpt2", hidden_act="gelu_new", rotary_pct=0.25,
                      rotary_emb_base=10000, use_parallel_residual=True, layer_norm_eps=1e-5),
    "gpt_neox_sequential": small("gpt_neox", "GPTNeoXForCausalLM", "gpt2", hidden_act="gelu_new", rotary_pct=1.0,
                                 rotary_emb_base=10000, use_parallel_residual=False, layer_norm_eps=1e-5),
}
GELU = ("gemma", "gpt")


class Difference(Exception):
    pass


def run(*arguments, **how):
    done = subprocess.run([str(a) for a in arguments], capture_output=True, text=True, **how)
    if done.returncode != 0:
        raise Difference(f"{pathlib.Path(str(arguments[0])).name} {arguments[1]}: exit {done.returncode}: "
                         f"{done.stderr[-600:]}")
    return done.stdout


class Llama:
    """The binaries of a build, and a client of our own against its library."""

    def __init__(self, folder, work):
        found = [path.parent for path in folder.glob("*/bin/libllama.so")]
        if not found:
            raise FileNotFoundError(f"{folder} has no build with libllama.so in */bin")
        self.bin = found[0]
        self.client = work / "llama_client"
        run("g++", "-O1", "-std=c++17", f"-I{folder}/include", f"-I{folder}/ggml/include", HERE / "llama_client.cpp",
            f"-L{self.bin}", f"-Wl,-rpath,{self.bin}", "-lllama", "-lggml", "-lggml-base", "-o", self.client)

    def greedy(self, file, ids, out):
        text = run(self.client, "greedy", file, STEPS, out, *ids)
        return [int(word) for word in text.split()]

    def tokenize(self, file, texts):
        lines = "".join(text.encode().hex() + "\n" for text in texts)
        return [[int(w) for w in line.split()] for line in run(self.client, "tokenize", file, input=lines).split("\n")[:-1]]

    def perplexity(self, file, text, context):
        for _ in range(20):  # on a busy machine its log may end before the last line
            done = subprocess.run([self.bin / "llama-perplexity", "-m", file, "-f", text, "-c", str(context), "-b",
                                   str(context), "-ub", str(context), "-fa", "off", "-ctk", "f32", "-ctv", "f32", "-t",
                                   "2", "--no-warmup"], capture_output=True, text=True)
            found = re.search(r"Final estimate: PPL = ([0-9.]+)", done.stdout + done.stderr)
            if found:
                return float(found.group(1))
        raise Difference(f"llama-perplexity: exit {done.returncode}: {(done.stdout + done.stderr)[-600:]}")


def rows(path, width):
    numbers = array.array("f")
    numbers.frombytes(path.read_bytes())
    return [numbers[i:i + width] for i in range(0, len(numbers), width)]


def plain_tokenizer(name):
    """A golden tokenizer without the added tokens that swallow spaces or match whole words, which llama.cpp has not."""
    tokenizer = json.loads((TOKENIZERS / f"{name}.json").read_text())
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["special"] and not t["lstrip"]]
    for token in tokenizer["added_tokens"]:
        token["rstrip"] = False
    return tokenizer


def make_model(pare, name, folder, deviation=1.0 / 64 ** 0.5):
    """Random weights in F32, of a size that spreads the logits."""
    tokenizer, config = FAMILIES[name]
    source = folder.parent / f"{name}.json"
    source.write_text(json.dumps(config))
    run(pare, "new", source, "--out", folder, "--quiet")
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length, = struct.unpack("<Q", data[:8])
    header = json.loads(data[8:8 + length])
    rng, tensors, payload, at = random.Random(name), {}, [], 0
    for key, about in header.items():
        if key == "__metadata__":
            continue
        count = 1
        for size in about["shape"]:
            count *= size
        norm = "norm" in key or ".ln_" in key
        middle = 0.0 if not norm or name.startswith("gemma") or key.endswith("bias") else 1.0
        spread = 0.1 if norm or len(about["shape"]) == 1 else deviation
        values = array.array("f", (middle + spread * rng.gauss(0, 1) for _ in range(count)))
        payload.append(values.tobytes())
        tensors[key] = {"dtype": "F32", "shape": about["shape"], "data_offsets": [at, at + 4 * count]}
        at += 4 * count
    text = json.dumps({"__metadata__": {"format": "pt"}, **tensors}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(payload))
    (folder / "tokenizer.json").write_text(json.dumps(plain_tokenizer(tokenizer)))


class Check:
    def __init__(self, build, llama, work, text):
        self.pare = build / "pare-edge"
        self.toolkit = build / "pare"
        self.forced = build / "tests/forced_logits"
        self.llama, self.work, self.text = llama, work, text
        self.results, self.failed = {}, 0

    def report(self, name, good, **numbers):
        self.failed += not good
        self.results[name] = {**numbers, "ok": bool(good)}
        shown = ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in numbers.items())
        print(f"{'ok' if good else 'FAILED':6} {name}: {shown}", flush=True)

    def guarded(self, name, check, *arguments):
        try:
            check(name, *arguments)
        except Difference as problem:
            self.report(name, False, problem=str(problem))

    def export(self, folder, name, *options):
        out = self.work / f"{name}.gguf"
        run(self.pare, "export", folder, "--to", "gguf", "--out", out, "--quiet", *options)
        if gguf is not None:
            reader = gguf.GGUFReader(out)
            if not reader.tensors or reader.get_field("general.architecture") is None:
                raise Difference("the gguf package finds no tensors")
        return out

    def compare(self, name, file, kind, vocab, experts=False):
        """Greedy tokens of llama.cpp; the runtime is led along them and must want the same."""
        bound, wanted = BOUNDS[kind]
        ids = [1, 17, 42, 3, 99, 250, 7, 31]
        theirs, ours = self.work / "theirs", self.work / "ours"
        tokens = self.llama.greedy(file, ids, theirs)
        run(self.forced, file, STEPS, ours, *ids, *tokens[:-1])
        a, b = rows(theirs, vocab), rows(ours, vocab)
        worst = spread = 0.0
        wrong = close = 0
        for step in range(STEPS):
            mean = sum(b[step]) / vocab
            deviation = (sum((x - mean) ** 2 for x in b[step]) / vocab) ** 0.5
            spread += deviation / STEPS
            worst = max(worst, max(abs(x - y) for x, y in zip(a[step], b[step])) / deviation)
            best = sorted(range(vocab), key=b[step].__getitem__)[-2:]
            margin = b[step][best[1]] - b[step][best[0]]
            clear = margin > (1e-3 if wanted is None else wanted * deviation)
            close += not clear
            wrong += clear and best[1] != tokens[step]
        chosen = experts and wanted is not None
        good = wrong <= (STEPS - close) // 10 if chosen else wrong == 0 and worst < bound
        self.report(name, good, different=wrong, too_close=close, largest_difference=worst,
                    spread=spread)

    def families(self):
        for name in FAMILIES:
            folder = self.work / name
            make_model(self.pare, name, folder)
            for codec in ("f32", "f16", "bf16", "q8", "q4"):
                gelu = codec == "f32" and name.startswith(GELU)

                def one(label, codec=codec, gelu=gelu):
                    file = self.export(folder, label.replace(" ", "-"), "--codec", codec)
                    self.compare(label, file, "gelu f32" if gelu else codec, 512, "num_experts_per_tok" in FAMILIES[name][1])

                self.guarded(f"{name} {codec}", one)

    def k_quants(self):
        wide = dict(hidden_size=256, intermediate_size=512, num_attention_heads=4, head_dim=64)
        for name, source in (("wide_llama", "llama"), ("wide_gemma", "gemma")):
            tokenizer, config = FAMILIES[source]
            FAMILIES[name] = (tokenizer, {**config, **wide})
            folder = self.work / name
            make_model(self.pare, name, folder, 1.0 / 256 ** 0.5)
            base = self.export(folder, f"{name}-f32", "--codec", "f32")
            matrix = self.work / f"{name}-imatrix.gguf"
            run(self.llama.bin / "llama-imatrix", "-m", base, "-f", self.text, "-o", matrix, "-c", 128, "--chunks", 4,
                "-t", 2, "-ngl", 0, "--no-ppl")
            for codec in ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k"):
                for more in ((), ("--imatrix", matrix)):
                    def one(label, codec=codec, more=more):
                        file = self.export(folder, label.replace(" ", "-"), "--codec", codec, *more)
                        if gguf is not None:
                            kinds = {t.tensor_type.name for t in gguf.GGUFReader(file).tensors}
                            if kinds != {"F32", codec.upper()}:
                                raise Difference(f"tensors of types {kinds}")
                        self.compare(label, file, "k", 512)
                        back = self.work / "k-folder"
                        shutil.rmtree(back, ignore_errors=True)
                        run(self.pare, "export", file, "--to", "folder", "--out", back, "--quiet")
                        again = self.export(back, f"{label.replace(' ', '-')}-again", "--codec", "f32")
                        self.compare(f"{label}, its folder in F32", again, "f32" if source == "llama" else "gelu f32", 512)

                    self.guarded(f"{name} {codec}{' imatrix' if more else ''}", one)

    def ours(self, file, *more):
        done = run(self.pare, "eval", file, "--text", self.text, "--ctx", 256, "--score", "second-half", "--json",
                   "--no-speed", "--quiet", *more)
        return json.loads(done)

    def perplexities(self, name, file, *more):
        result = self.ours(file, *more)
        ours = find(result, "perplexity")
        theirs = self.llama.perplexity(file, self.text, 256)
        self.report(f"{name} perplexity", abs(ours / theirs - 1) < 0.005, ours=ours, theirs=theirs,
                    relative=ours / theirs - 1)

    def teacher(self):
        teacher = ROOT / "examples/teacher"
        for codec in ("f32", "f16", "bf16", "q8", "q4", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k"):
            def one(label, codec=codec):
                file = self.export(teacher, f"teacher-{codec}", "--codec", codec)
                self.compare(label, file, "k" if codec.endswith("_k") else codec, 2048)
                self.perplexities(label, file)

            self.guarded(f"teacher {codec}", one)
        if not self.toolkit.exists():
            print("SKIPPED codes of the teacher: the torch-free build does not quantize")
            return
        for codec in ("q4", "q4g128", "q8", "q4a", "q3", "w8a8"):
            def codes(label, codec=codec):
                folder = self.work / f"codes-{codec}"
                run(self.toolkit, "quantize", "--model", teacher, "--out", folder, "--codec", codec, "--method", "rtn",
                    "--quiet")
                more = ["--requantize"] if codec == "q4a" else []
                file = self.export(folder, f"codes-{codec}", *more)
                self.compare(label, file, "q4", 2048)
                self.perplexities(label, file)

            self.guarded(f"teacher codes {codec}", codes)

    def foreign(self):
        source = self.export(ROOT / "examples/teacher", "foreign-f32", "--codec", "f32")
        for kind in ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K",
                     "BF16", "F16"):
            def one(label, kind=kind):
                file = self.work / f"foreign-{kind}.gguf"
                run(self.llama.bin / "llama-quantize", "--output-tensor-type", "q8_0", source, file, kind, 2)
                self.perplexities(label, file)
                folder = self.work / f"foreign-{kind}"
                run(self.pare, "export", file, "--to", "folder", "--out", folder, "--quiet")
                a, b = find(self.ours(file, "--act", "float"), "perplexity"), find(self.ours(folder), "perplexity")
                self.report(f"{label} folder", abs(a / b - 1) < 1e-5, file=a, folder=b)

            self.guarded(f"foreign {kind}", one)

    def tokenizers(self):
        texts = sample_texts(1000)
        requests = "".join(json.dumps({"hex": t.encode().hex(), "special": False}) + "\n" for t in texts)
        names = [path.stem for path in sorted(TOKENIZERS.glob("*.json"))] + ["teacher"]
        for name in names:
            def one(label, name=name):
                folder = self.work / f"tokenizer-{name}"
                if name == "teacher":
                    shutil.copytree(ROOT / "examples/teacher", folder)
                else:
                    make_model(self.pare, "llama", folder)
                    (folder / "tokenizer.json").write_text(json.dumps(plain_tokenizer(name)))
                file = self.export(folder, f"tokenizer-{name}")
                # What GGUF has no words for, and the export says: NFC, and mistral's prefix. Its Metaspace puts a space
                # at the very beginning alone, and not before what stands for one already, a blank or a literal U+2581;
                # llama.cpp always does, behind special tokens too. So `tokenizers` decides, and ours is held to it.
                special = ("<s>", "</s>", "<|end|>")
                known = {"qwen2": lambda t: unicodedata.normalize("NFC", t) != t,
                         "mistral": lambda t: t.startswith((" ", "\u2581")) or any(s in t for s in special)}
                beyond = known.get(name, lambda t: False)
                mine = [json.loads(x) for x in run(self.pare, "tokenize", folder, "--batch", input=requests).splitlines()]
                again = [json.loads(x) for x in run(self.pare, "tokenize", file, "--batch", input=requests).splitlines()]
                theirs = self.llama.tokenize(file, texts)
                wrong = [i for i in range(len(texts)) if mine[i] != theirs[i] and not beyond(texts[i])]
                if name == "mistral":  # there llama.cpp has to say what ours says of the text with one more blank
                    first = [i for i in range(len(texts)) if beyond(texts[i]) and not any(s in texts[i] for s in special)]
                    asked = "".join(json.dumps({"hex": (" " + texts[i]).encode().hex(), "special": False}) + "\n" for i in first)
                    more = run(self.pare, "tokenize", folder, "--batch", input=asked).splitlines()
                    wrong += [i for i, line in zip(first, more) if theirs[i] != json.loads(line)]
                    if not any(texts[i].startswith("\u2581") for i in first):
                        raise Difference("no text begins with U+2581")
                    if tokenizers is not None:
                        judge = tokenizers.Tokenizer.from_str(json.dumps(plain_tokenizer(name)))
                        for i in first:
                            if judge.encode(texts[i], add_special_tokens=False).ids != mine[i]:
                                raise Difference(f"tokenizers says otherwise of {texts[i]!r}")
                rebuilt = [i for i in range(len(texts)) if mine[i] != again[i]]
                numbers = {"texts": len(texts), "beyond_gguf": sum(map(beyond, texts)), "llama_cpp_differs": len(wrong), "rebuilt_differs": len(rebuilt)}
                for kind, list_ in (("first", wrong), ("first_rebuilt", rebuilt)):
                    if list_:
                        i = list_[0]
                        numbers[kind] = repr((texts[i], mine[i], theirs[i] if kind == "first" else again[i]))
                self.report(label, not wrong and not rebuilt, **numbers)

            self.guarded(f"tokenizer {name}", one)


def sample_texts(count):
    """Prose, code and lines of many scripts that tests of this repository hold, whole and in slices."""
    known = []
    for path in sorted(TOKENIZERS.glob("*.jsonl"))[:1]:
        known += [json.loads(line)["text"] for line in path.read_text().splitlines()]
    prose = "\n".join((ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md", "runtime/FORMAT.md",
                                                             "core/tokenizer.cpp", "tests/golden/tokenizers/training.txt"))
    rng = random.Random(5)
    texts = [t for t in known if "\ufffd" not in t and "\0" not in t]
    while len(texts) < count:
        at = rng.randrange(len(prose))
        texts.append(prose[at:at + rng.randrange(1, 300)])
    return texts[:count]


def find(result, metric):
    for row in result.get("report", result.get("rows", [])):
        if row.get("metric") == metric:
            return float(row["after"])
    raise Difference(f"no {metric} in {str(result)[:300]}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("build", type=pathlib.Path)
    parser.add_argument("--llama", type=pathlib.Path, default=os.environ.get("PARE_LLAMA_CPP"))
    parser.add_argument("--only", nargs="*", default=["families", "teacher", "k_quants", "tokenizers", "foreign"])
    parser.add_argument("--text", type=pathlib.Path)
    parser.add_argument("--json", type=pathlib.Path)
    given = parser.parse_args()
    if not given.llama:
        print("SKIPPED llama.cpp: name a checkout with a build in it in PARE_LLAMA_CPP or --llama. Nothing was checked "
              "against llama.cpp.")
        return 77
    work = pathlib.Path(tempfile.mkdtemp(prefix="pare-llama-"))
    try:
        llama = Llama(pathlib.Path(given.llama).resolve(), work)
        text = given.text
        if text is None:
            text = work / "text.txt"
            text.write_text("\n".join((ROOT / n).read_text() for n in ("README.md", "runtime/FORMAT.md")))
        check = Check(given.build.resolve(), llama, work, text.resolve())
        for part in given.only:
            getattr(check, part)()
        if given.json:
            given.json.write_text(json.dumps(check.results, indent=1) + "\n")
    except FileNotFoundError as problem:
        print(f"SKIPPED llama.cpp: {problem}")
        return 77
    finally:
        shutil.rmtree(work)
    return 1 if check.failed else 0


if __name__ == "__main__":
    sys.exit(main())
