#!/usr/bin/env python3
"""Quantizes a model with another project's tool and writes the result as a plain float32 folder, dequantized.

usage: peer_worker.py PEER MODEL CALIBRATION.jsonl OUT [--samples N] [--context N] [--seed S] [--iters N]
Runs in the tool's own virtual environment (peers.py starts it); tokens: N windows of `context` ids drawn at random from
the joined calibration documents, as many as pare itself is given. 4 bits, groups of 32, symmetric, block linears only;
everything else as the tool has it by default, and in float32. Last line of stdout: a JSON object with versions, the
seconds of the tool's own call (models read and written, and the imports, not counted) and the peak memory of the process.
CALIBRATION "random": uniform random ids, for measurements of cost on random weights. OUT "none": nothing is kept.
"""
import argparse
import json
import pathlib
import random
import resource
import shutil
import sys
import tempfile
import time

CLOCK = {}


def timed(work):
    began = time.time()
    result = work()
    CLOCK["seconds"] = time.time() - began
    return result


def windows(model, calibration, samples, context, seed):
    draw = random.Random(seed)
    if calibration == "random":
        vocabulary = json.loads(pathlib.Path(model, "config.json").read_text())["vocab_size"]
        return [[draw.randrange(vocabulary) for _ in range(context)] for _ in range(samples)]
    from tokenizers import Tokenizer
    tokenizer = Tokenizer.from_file(str(pathlib.Path(model, "tokenizer.json")))
    if tokenizer.encode("a").ids != tokenizer.encode("a", add_special_tokens=False).ids:
        raise SystemExit("expected a tokenizer without a BOS, found one: its place in the windows is not written")
    ids = []
    for line in open(calibration):
        ids += tokenizer.encode(json.loads(line)["text"], add_special_tokens=False).ids
    starts = [draw.randrange(len(ids) - context + 1) for _ in range(samples)]
    return [ids[s:s + context] for s in starts]


def original_tensors(model):
    import torch
    from safetensors.torch import load_file
    found = {}
    for file in sorted(pathlib.Path(model).glob("*.safetensors")):
        found.update(load_file(file))
    return {name: tensor.to(torch.float32) for name, tensor in found.items()}


def is_block_linear(name, tensor):
    return ".layers." in name and tensor.dim() == 2


def save(model, out, changed):
    """The original with its block linears replaced by `changed`, all in float32."""
    import torch
    from safetensors.torch import save_file
    tensors = original_tensors(model)
    expected = {name for name, tensor in tensors.items() if is_block_linear(name, tensor)}
    if set(changed) != expected:
        raise SystemExit(f"expected {len(expected)} quantized linears, found {len(changed)}: "
                         f"{sorted(expected ^ set(changed))[:4]}")
    groups = 0
    for name, weight in changed.items():
        weight = weight.detach().to(torch.float32).cpu().contiguous()
        if weight.shape != tensors[name].shape or not torch.isfinite(weight).all():
            raise SystemExit(f"{name}: expected finite weights {list(tensors[name].shape)}, found {list(weight.shape)}")
        # Proof that these are 4-bit values: at most 16 in every group of 32.
        for row in weight.reshape(-1, 32)[::97]:
            groups += 1
            if len(torch.unique(row)) > 16:
                raise SystemExit(f"{name}: more than 16 values in a group of 32")
        tensors[name] = weight
    out.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / "model.safetensors",
              metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if pathlib.Path(model, name).is_file():
            shutil.copy(pathlib.Path(model, name), out / name)
    config = json.loads(pathlib.Path(model, "config.json").read_text())
    config["torch_dtype"] = config["dtype"] = "float32"
    (out / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def float_model(model):
    import torch
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


def llmcompressor(given, scratch, gptq):
    import compressed_tensors
    import datasets
    import llmcompressor as package
    import torch
    from llmcompressor import oneshot
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    if gptq:
        from llmcompressor.modifiers.gptq import GPTQModifier as Modifier
    else:
        from llmcompressor.modifiers.quantization import QuantizationModifier as Modifier
    model = float_model(given.model)
    ids = windows(given.model, given.calibration, given.samples, given.context, given.seed)
    data = datasets.Dataset.from_list([{"input_ids": w, "attention_mask": [1] * len(w)} for w in ids])
    words = {"dataset": data, "max_seq_length": given.context, "num_calibration_samples": given.samples} if gptq else {}
    timed(lambda: oneshot(model=model, recipe=Modifier(config_groups=groups, ignore=["lm_head"]), **words))
    model.save_pretrained(scratch, save_compressed=True)
    from safetensors.torch import load_file
    stored = {}
    for file in sorted(scratch.glob("*.safetensors")):
        stored.update(load_file(file))
    changed = {}
    for name in stored:
        if not name.endswith(".weight_packed"):
            continue
        stem = name.removesuffix("_packed")
        rows, cols = stored[stem + "_shape"].tolist()
        # Eight codes in a 32-bit word, the first lowest; stored plus 8.
        words = stored[name].to(torch.int64)
        codes = torch.stack([(words >> (4 * k)) & 15 for k in range(8)], dim=-1).reshape(rows, -1)[:, :cols] - 8
        scale = stored[stem + "_scale"].to(torch.float32)
        changed[stem] = codes.to(torch.float32) * scale.repeat_interleave(cols // scale.shape[1], dim=1)
    return changed, {"llmcompressor": package.__version__, "compressed-tensors": compressed_tensors.__version__}


def gptq_tensors(scratch):
    """Weights of the GPTQ file layout: codes along the inputs, zeros one less in files of its first version."""
    import torch
    from safetensors.torch import load_file
    stored = {}
    for file in sorted(scratch.glob("*.safetensors")):
        stored.update(load_file(file))
    config = json.loads((scratch / "config.json").read_text())["quantization_config"]
    first_version = config.get("checkpoint_format", "gptq") == "gptq" and "v2" not in str(config.get("packing_format"))
    changed = {}
    for name in stored:
        if not name.endswith(".qweight"):
            continue
        stem = name.removesuffix(".qweight")
        words = stored[name].to(torch.int64)                       # [inputs / 8, outputs]
        codes = torch.stack([(words >> (4 * k)) & 15 for k in range(8)], dim=1).reshape(-1, words.shape[1])
        zero_words = stored[stem + ".qzeros"].to(torch.int64)      # [groups, outputs / 8]
        zeros = torch.stack([(zero_words >> (4 * k)) & 15 for k in range(8)], dim=2).reshape(zero_words.shape[0], -1)
        zeros = zeros + 1 if first_version else zeros
        scales = stored[stem + ".scales"].to(torch.float32)        # [groups, outputs]
        inputs = codes.shape[0]
        group = stored[stem + ".g_idx"].to(torch.int64) if stem + ".g_idx" in stored else \
            torch.arange(inputs) // (inputs // scales.shape[0])
        weight = (codes - zeros[group]).to(torch.float32) * scales[group]
        changed[stem + ".weight"] = weight.t().contiguous()
    return changed


def gptqmodel(given, scratch):
    import gptqmodel as package
    from gptqmodel import GPTQModel, QuantizeConfig
    config = QuantizeConfig(bits=4, group_size=32, sym=True)
    model = GPTQModel.load(given.model, config, device="cpu")
    ids = windows(given.model, given.calibration, given.samples, given.context, given.seed)
    timed(lambda: model.quantize([{"input_ids": w, "attention_mask": [1] * len(w)} for w in ids], batch_size=1))
    model.save(str(scratch))
    return gptq_tensors(scratch), {"gptqmodel": package.__version__}


def autoround(given, scratch):
    import auto_round as package
    import torch
    from auto_round import AutoRound
    from transformers import AutoTokenizer
    ids = windows(given.model, given.calibration, given.samples, given.context, given.seed)
    ones = torch.ones(given.context, dtype=torch.long)
    data = torch.utils.data.DataLoader([{"input_ids": torch.tensor(w), "attention_mask": ones} for w in ids],
                                       batch_size=8)
    rounder = AutoRound(float_model(given.model), AutoTokenizer.from_pretrained(given.model), bits=4, group_size=32,
                        sym=True, dataset=data, nsamples=given.samples, seqlen=given.context, iters=given.iters,
                        seed=given.seed, amp=False, enable_torch_compile=False, device_map="cpu")
    timed(lambda: rounder.quantize_and_save(str(scratch), format="auto_gptq"))
    found = scratch if list(scratch.glob("*.safetensors")) else next(scratch.rglob("*.safetensors")).parent
    return gptq_tensors(found), {"auto-round": package.__version__, "iters": given.iters}


PEERS = {"llmcompressor-rtn": lambda given, scratch: llmcompressor(given, scratch, False),
         "llmcompressor-gptq": lambda given, scratch: llmcompressor(given, scratch, True),
         "gptqmodel-gptq": gptqmodel, "autoround": autoround}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("peer", choices=list(PEERS))
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--iters", type=int, default=200)
    given = parser.parse_args()
    import torch
    import transformers
    torch.manual_seed(given.seed)
    if str(given.out) == "none":
        with tempfile.TemporaryDirectory() as place:
            _, versions = PEERS[given.peer](given, pathlib.Path(place, "native"))
    else:
        changed, versions = PEERS[given.peer](given, given.out.with_name(given.out.name + ".native"))
        save(given.model, given.out, changed)
    versions |= CLOCK | {"peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    versions |= {"torch": torch.__version__, "transformers": transformers.__version__, "python": sys.version.split()[0]}
    print("\n" + json.dumps(versions))


if __name__ == "__main__":
    main()
