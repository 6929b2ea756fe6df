#!/usr/bin/env python3
"""Loads what `pare prune` wrote in transformers: every method and dtype loads without a missing or unused tensor, has
the shapes of its config.json, and gives the logits that pare's own arithmetic gives (checked through the calibration
loss: transformers scores the same windows of a document as `pare eval` does). The untouched original is the control.

usage: pruned_folder.py PARE [MODEL_FOLDER TEXT_FILE]     exit code 1 on any difference, 77 when transformers is missing

Without a model folder small random models of every family are made here, with a tokenizer of their own: Llama, Qwen2
and Mistral for every method, the others for the cut of all that they have.
"""
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile

try:
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
except ImportError as problem:
    print(f"SKIPPED: pruned_folder.py needs torch, transformers and tokenizers ({problem})")
    sys.exit(77)

WORDS = "river stone quiet letter north opens carries garden seven blue wind paper answer slowly light".split()
METHODS = {
    "magnitude": ["--method", "magnitude", "--sparsity", "0.5"],
    "wanda": ["--method", "wanda", "--pattern", "2:4"],
    "sparsegpt": ["--method", "sparsegpt", "--pattern", "4:8", "--reconstruct"],
    "owl": ["--method", "sparsegpt", "--sparsity", "0.5", "--allocation", "owl"],
    "random": ["--method", "random", "--sparsity", "0.3"],
    "layers": ["--method", "shape", "--layers", "2"],
    "ffn": ["--method", "shape", "--ffn", "64", "--no-correction"],
    "all": ["--method", "shape", "--layers", "3", "--ffn", "96", "--hidden", "32"],  # and heads, experts: see cut_heads
}
CONTEXT = 48


def make_text(path):
    state, out = 1, []
    for _ in range(1200):
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        out.append(WORDS[(state >> 33) % len(WORDS)])
    with open(path, "w") as file:
        file.write(" ".join(out))


def make_model(folder, text, family, dtype):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train([text], trainers.BpeTrainer(vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                                special_tokens=["<|endoftext|>"], show_progress=False))
    common = dict(vocab_size=320, hidden_size=64, intermediate_size=160, num_hidden_layers=4, num_attention_heads=4,
                  num_key_value_heads=2, max_position_embeddings=128, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(7)
    windows = dict(head_dim=16, sliding_window=16, query_pre_attn_scalar=16)
    every = {key: value for key, value in common.items() if key != "num_key_value_heads"}
    plain = {key: common[key] for key in ("vocab_size", "bos_token_id", "eos_token_id")}
    config, kind = {
        "llama": lambda: (transformers.LlamaConfig(**common, mlp_bias=True, tie_word_embeddings=True),
                          transformers.LlamaForCausalLM),
        "qwen2": lambda: (transformers.Qwen2Config(**common, tie_word_embeddings=False), transformers.Qwen2ForCausalLM),
        "mistral": lambda: (transformers.MistralConfig(**common, sliding_window=None), transformers.MistralForCausalLM),
        "qwen3": lambda: (transformers.Qwen3Config(**common, head_dim=16), transformers.Qwen3ForCausalLM),
        "gemma": lambda: (transformers.GemmaConfig(**common, head_dim=16), transformers.GemmaForCausalLM),
        "gemma2": lambda: (transformers.Gemma2Config(**common, **windows), transformers.Gemma2ForCausalLM),
        "gemma3": lambda: (transformers.Gemma3TextConfig(**common, **windows), transformers.Gemma3ForCausalLM),
        "phi3": lambda: (transformers.Phi3Config(**common, pad_token_id=0, sliding_window=16),
                         transformers.Phi3ForCausalLM),
        "smollm3": lambda: (transformers.SmolLM3Config(**common, pad_token_id=0), transformers.SmolLM3ForCausalLM),
        "mixtral": lambda: (transformers.MixtralConfig(**common, num_local_experts=4, num_experts_per_tok=2),
                            transformers.MixtralForCausalLM),
        "qwen3_moe": lambda: (transformers.Qwen3MoeConfig(**common, head_dim=16, num_experts=4, num_experts_per_tok=2,
                                                          moe_intermediate_size=160), transformers.Qwen3MoeForCausalLM),
        "gpt2": lambda: (transformers.GPT2Config(**plain, n_embd=64, n_layer=4, n_head=4, n_positions=128, n_inner=160),
                         transformers.GPT2LMHeadModel),
        "gpt_neox": lambda: (transformers.GPTNeoXConfig(**every),
                             transformers.GPTNeoXForCausalLM),
    }[family]()
    model = kind(config)
    with torch.no_grad():
        for parameter in model.parameters():  # far from flat logits, biases not zero
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(dtype).save_pretrained(folder)
    tokenizer.save(os.path.join(folder, "tokenizer.json"))


def run(pare, *arguments):
    done = subprocess.run([pare, *arguments, "--json", "--quiet", "--threads", "1"], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"pare {' '.join(arguments)} ended with {done.returncode}: {done.stderr[-800:]}{done.stdout[-400:]}")
    return json.loads(done.stdout)


def pare_perplexity(pare, folder, text):
    rows = run(pare, "eval", folder, "--text", text, "--ctx", str(CONTEXT))["rows"]
    return next(row["after"] for row in rows if row["metric"] == "perplexity")


def reference_perplexity(model, tokenizer, text):
    """Disjoint windows over the document, each with the tokenizer's prefix (BOS); later tokens are scored."""
    with open(text) as file:
        ids = tokenizer.encode(file.read(), add_special_tokens=False).ids
    prefix = tokenizer.encode("").ids
    begin = max(1, len(prefix))
    loss, count = 0.0, 0
    for first in range(0, len(ids), CONTEXT - len(prefix)):
        window = torch.tensor(prefix + ids[first:first + CONTEXT - len(prefix)])[None]
        if window.shape[1] <= begin:
            continue
        with torch.no_grad():
            logits = model(window).logits[0, begin - 1:-1].double()
        loss -= torch.log_softmax(logits, -1).gather(1, window[0, begin:, None]).sum().item()
        count += window.shape[1] - begin
    return math.exp(loss / count)


def cut_heads(config):
    """Half the heads, in whole groups, and one expert less."""
    kv = getattr(config, "num_key_value_heads", None)
    heads = config.num_attention_heads
    options = ["--heads", str(heads // 2)] if kv in (None, heads) else ["--kv-heads", str(kv // 2)]
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    return options + (["--experts", str(experts - 1)] if experts else [])


def check(pare, original, text, method, dtype, work):
    out = os.path.join(work, "out")
    shutil.rmtree(out, ignore_errors=True)
    stored = transformers.AutoConfig.from_pretrained(original)
    options = METHODS[method] + (cut_heads(stored) if method == "all" else [])
    result = run(pare, "prune", "--model", original, "--out", out, *options, "--text", text, "--samples", "16",
                 "--context", str(CONTEXT))["result"]
    model, info = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    problems = [f"{kind}: {info[kind]}" for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[kind]]
    layers = int(options[options.index("--layers") + 1]) if "--layers" in options else stored.num_hidden_layers
    if model.config.num_hidden_layers != layers:
        problems.append(f"config says {model.config.num_hidden_layers} blocks, not {layers}")
    count = sum(parameter.numel() for parameter in model.parameters())
    if count != result["parameters"]:
        problems.append(f"{count} parameters, pare says {result['parameters']}")
    kept = transformers.AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    if kept.dtype != dtype:
        problems.append(f"stored as {kept.dtype}, not {dtype}")
    theirs = reference_perplexity(model.eval(), Tokenizer.from_file(os.path.join(out, "tokenizer.json")), text)
    ours = pare_perplexity(pare, out, text)
    if not abs(math.log(ours / theirs)) < 1e-5:
        problems.append(f"perplexity {ours} where transformers has {theirs}")
    return problems, ours


def cut_by_hand(pare, original, text, work):
    """The folder that prune writes by weights gives the logits of the original with the same blocks and neurons taken
    out here."""
    out = os.path.join(work, "by_hand")
    keep, ffn = 3, 96
    run(pare, "prune", "--model", original, "--out", out, "--method", "shape", "--layers", str(keep), "--ffn", str(ffn),
        "--rank-by", "weights", "--no-correction", "--text", text, "--samples", "4", "--context", str(CONTEXT))
    load = transformers.AutoModelForCausalLM.from_pretrained
    ours, whole = load(out, dtype=torch.float32).eval(), load(original, dtype=torch.float32).eval()
    blocks = whole.model.layers
    linears = [sum(m.weight.double().square().sum().item() for m in block.modules() if isinstance(m, torch.nn.Linear))
               for block in blocks]
    kept = sorted(sorted(range(len(blocks)), key=lambda i: -linears[i])[:keep])
    for mlp in (blocks[i].mlp for i in kept):
        score = (mlp.gate_proj.weight.double().norm(dim=1) * mlp.up_proj.weight.double().norm(dim=1)
                 * mlp.down_proj.weight.double().norm(dim=0))
        index = score.topk(ffn).indices.sort().values
        for linear in (mlp.gate_proj, mlp.up_proj):
            linear.weight = torch.nn.Parameter(linear.weight[index])
            if linear.bias is not None:
                linear.bias = torch.nn.Parameter(linear.bias[index])
        mlp.down_proj.weight = torch.nn.Parameter(mlp.down_proj.weight[:, index])
    whole.model.layers = torch.nn.ModuleList(blocks[i] for i in kept)
    ids = torch.randint(0, 300, (2, 40))
    with torch.no_grad():
        difference = (ours(ids, use_cache=False).logits - whole(ids, use_cache=False).logits).abs().max().item()
    return difference


def widths_refused(pare, original, text, work):
    """A folder whose blocks differ is no folder that transformers takes for another model."""
    out = os.path.join(work, "own_widths")
    run(pare, "prune", "--model", original, "--out", out, "--method", "shape", "--ffn", "96", "--per-layer",
        "--multiple-of", "16", "--text", text, "--samples", "8", "--context", str(CONTEXT))
    widths = json.load(open(os.path.join(out, "config.json")))["intermediate_size"]
    if not isinstance(widths, list) or sum(widths) > 4 * 96:
        return f"widths {widths}"
    try:
        transformers.AutoModelForCausalLM.from_pretrained(out)
    except Exception as problem:
        return "" if "intermediate_size" in str(problem) else f"refused for {problem}"
    return "loaded in spite of its widths"


def main():
    if len(sys.argv) not in (2, 4):
        sys.exit(__doc__)
    pare, failed = os.path.abspath(sys.argv[1]), 0
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as work:
        cases = []
        if len(sys.argv) == 4:
            config = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype="auto")
            cases.append((os.path.basename(os.path.normpath(sys.argv[2])), sys.argv[2], sys.argv[3], config.dtype))
        else:
            text = os.path.join(work, "text.txt")
            make_text(text)
            for family, dtype in (("llama", torch.float32), ("qwen2", torch.bfloat16), ("mistral", torch.float16)):
                folder = os.path.join(work, family)
                make_model(folder, text, family, dtype)
                cases.append((f"{family} {dtype}", folder, text, dtype))
            for family in ("qwen3", "gemma", "gemma2", "gemma3", "phi3", "smollm3", "mixtral", "qwen3_moe", "gpt2",
                           "gpt_neox"):
                folder = os.path.join(work, family)
                make_model(folder, text, family, torch.float32)
                cases.append((family, folder, text, torch.float32))
        if len(sys.argv) == 2:
            difference = cut_by_hand(pare, os.path.join(work, "llama"), text, work)
            print(f"{'ok' if difference < 1e-4 else 'FAILED':6} llama cut by hand: logits differ by {difference:.1e}")
            failed += not difference < 1e-4
            problem = widths_refused(pare, os.path.join(work, "llama"), text, work)
            print(f"{'FAILED' if problem else 'ok':6} llama with widths of its own is refused {problem}")
            failed += bool(problem)
        for name, folder, text, dtype in cases:
            for method in METHODS if " " in name or len(sys.argv) == 4 else ["all"]:
                try:
                    problems, perplexity = check(pare, folder, text, method, dtype, work)
                except Exception as problem:  # one broken case must not hide the others
                    problems, perplexity = [f"{type(problem).__name__}: {problem}"], float("nan")
                print(f"{'FAILED' if problems else 'ok':6} {name} {method}: perplexity {perplexity:.4f} {'; '.join(problems)}")
                failed += bool(problems)
    print("every pruned folder loads and agrees" if failed == 0 else f"{failed} cases FAILED")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
