#!/usr/bin/env python3
"""GPTQ folders both ways, against a reader and a writer made from the format's definition alone (numpy), and, where it
is installed, GPTQModel's own torch kernel.

usage: gptq_folder.py PARE TEACHER CODES...
CODES: folders that `pare quantize` made, in codecs that GPTQ holds.

 written   pare export CODES --to gptq and gptq_v2: every weight of the folder, unpacked here, is that of the folder of
           plain floats that pare makes of the same codes through GGUF's reader (package gguf)
 read      folders packed here, 4 and 8 bits, symmetric or not, inputs in order or not, versions 1 and 2: pare's folder
           of each has exactly the weights that were packed, and `pare eval` scores it as those floats
"""
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile

sys.path.pop(0)  # a file beside this one is called like the package compressed_tensors
import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

try:
    import torch
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
except ImportError:
    TorchLinear = None

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def run(*arguments):
    done = subprocess.run([str(a) for a in arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(map(str, arguments))}: exit {done.returncode}: {done.stderr[-800:]}"
    return done.stdout


def fields(words, bits):
    """[.., words] -> [.., words * 32 / bits], the first field in the lowest bits."""
    unsigned = words.astype(np.int64) & 0xFFFFFFFF
    parts = unsigned[..., None] >> np.arange(0, 32, bits) & (1 << bits) - 1
    return parts.reshape(*words.shape[:-1], -1)


def words(values, bits):
    per_word = 32 // bits
    parts = values.astype(np.int64).reshape(*values.shape[:-1], -1, per_word) << np.arange(0, 32, bits)
    return parts.sum(-1).astype(np.uint32).view(np.int32)


def unpacked(stored, module, scheme):
    """[out, in] in float32: w = scale * (code - zero)."""
    bits = scheme["bits"]
    codes = fields(np.ascontiguousarray(stored[module + ".qweight"].T), bits)
    zeros = fields(stored[module + ".qzeros"], bits) + (scheme["checkpoint_format"] == "gptq")
    order = stored[module + ".g_idx"]
    assert order.dtype == np.int32 and stored[module + ".scales"].dtype == np.float16
    scales = stored[module + ".scales"].astype(np.float32)
    return ((codes - zeros.T[:, order]) * scales.T[:, order]).astype(np.float32)


def packed(module, weight, scheme, rng):
    """Nearest codes of a matrix in this form, and the weights that they stand for."""
    bits, top = scheme["bits"], (1 << scheme["bits"]) - 1
    outputs, inputs = weight.shape
    group = scheme["group_size"] if scheme["group_size"] > 0 else inputs
    order = (np.arange(inputs) // group).astype(np.int32)
    if scheme["desc_act"]:
        order = order[np.random.default_rng(rng).permutation(inputs)]
    groups = order.max() + 1
    scales = np.zeros((groups, outputs), np.float16)
    zeros = np.zeros((groups, outputs), np.int64)
    for g in range(groups):
        part = weight[:, order == g]
        low, high = np.minimum(part.min(1), 0), np.maximum(part.max(1), 0)
        if scheme["sym"]:
            high = np.maximum(-low, high)
            low = -high
        scales[g] = np.maximum((high - low) / top, 1e-4)
        zeros[g] = (top + 1) // 2 if scheme["sym"] else np.clip(np.round(-low / scales[g].astype(np.float32)), 1, top)
    wide, at = scales.astype(np.float32).T[:, order], zeros.T[:, order]
    codes = np.clip(np.round(weight / wide) + at, 0, top).astype(np.int64)
    less = scheme["checkpoint_format"] == "gptq"
    parts = {"qweight": np.ascontiguousarray(words(codes, bits).T), "qzeros": words(zeros - less, bits),
             "scales": scales, "g_idx": order}
    return {f"{module}.{name}": part for name, part in parts.items()}, ((codes - at) * wide).astype(np.float32)


def loaded(folder):
    """The linears' tensors."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="np") as handle:
            names = [n for n in handle.keys() if n.rsplit(".", 1)[1] in ("qweight", "qzeros", "scales", "g_idx")]
            tensors.update({name: handle.get_tensor(name) for name in names})
    return tensors


def f32(folder):
    """The folder's floats; bfloat16 has no numpy type of its own here."""
    import torch as t
    from safetensors.torch import load_file as load
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update({k: v.to(t.float32).numpy() for k, v in load(file).items()})
    return tensors


def library(stored, module, scheme):
    """The matrix that GPTQModel's torch kernel multiplies with, by an identity batch."""
    outputs, inputs = stored[module + ".scales"].shape[1], stored[module + ".g_idx"].shape[0]
    layer = TorchLinear(bits=scheme["bits"], group_size=scheme["group_size"], sym=scheme["sym"],
                        desc_act=scheme["desc_act"], in_features=inputs, out_features=outputs, bias=False,
                        pack_dtype=torch.int32, register_buffers=True)
    for name in ("qweight", "qzeros", "scales", "g_idx"):
        getattr(layer, name).copy_(torch.from_numpy(stored[f"{module}.{name}"]))
    if scheme["checkpoint_format"] == "gptq":
        from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module
        convert_gptq_v1_to_v2_format_module(layer, bits=scheme["bits"], pack_dtype=torch.int32)
    layer.post_init()
    return layer.dequantize_weight().T.float().numpy()


def check_written(pare, codes, work):
    import gguf
    file = work / f"{codes.name}.gguf"
    run(pare, "export", codes, "--to", "gguf", "--out", file, "--quiet")
    truth, heads = {}, json.loads((codes / "config.json").read_text())
    names = dict(attn_q="self_attn.q_proj", attn_k="self_attn.k_proj", attn_v="self_attn.v_proj",
                 attn_output="self_attn.o_proj", ffn_gate="mlp.gate_proj", ffn_up="mlp.up_proj",
                 ffn_down="mlp.down_proj")
    for tensor in gguf.GGUFReader(file).tensors:
        part = tensor.name.split(".")
        if part[0] != "blk" or part[2] not in names:
            continue
        weight = gguf.dequantize(tensor.data, tensor.tensor_type)
        if part[2] in ("attn_q", "attn_k"):  # rows of llama.cpp's rotary embedding, back to Hugging Face's
            n = heads["num_attention_heads" if part[2] == "attn_q" else "num_key_value_heads"]
            weight = weight.reshape(n, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        truth[f"model.layers.{part[1]}.{names[part[2]]}"] = weight
    for form in ("gptq", "gptq_v2"):
        out = work / f"{codes.name}-{form}"
        run(pare, "export", codes, "--to", form, "--out", out, "--quiet")
        scheme = json.loads((out / "config.json").read_text())["quantization_config"]
        assert scheme["checkpoint_format"] == form and scheme == json.loads((out / "quantize_config.json").read_text())
        stored = loaded(out)
        modules = [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]
        assert sorted(modules) == sorted(truth)
        for module in modules:
            weight = unpacked(stored, module, scheme)
            assert np.array_equal(weight, truth[module]), f"{module}: {np.abs(weight - truth[module]).max()} apart"
            if TorchLinear is not None and not (form == "gptq" and not scheme["sym"]):
                theirs = library(stored, module, scheme)
                # Its products are halves.
                assert np.allclose(theirs, weight, rtol=2 ** -10, atol=1e-6), f"{module}: GPTQModel reads it otherwise"
        print(f"ok written {codes.name} {form}: {len(modules)} linears")


def check_read(pare, teacher, work):
    original = f32(teacher)
    text = work / "text.txt"
    text.write_text((pathlib.Path(__file__).resolve().parents[2] / "CONTRIBUTING.md").read_text())
    for bits in (4, 8):
        for sym in (True, False):
            for desc_act in (False, True):
                for group, form in ((32, "gptq"), (128, "gptq_v2"), (-1, "gptq")):
                    scheme = dict(quant_method="gptq", bits=bits, group_size=group, sym=sym, desc_act=desc_act,
                                  lm_head=False, checkpoint_format=form)
                    name = f"{bits}-{'sym' if sym else 'asym'}-{group}-{form}{'-order' if desc_act else ''}"
                    folder, plain = work / name, work / f"{name}-plain"
                    for where in (folder, plain):
                        where.mkdir()
                        for file in ("tokenizer.json", "tokenizer_config.json"):
                            shutil.copy(teacher / file, where / file)
                    tensors, floats = {}, {}
                    for seed, (key, value) in enumerate(sorted(original.items())):
                        module = key.removesuffix(".weight")
                        if not module.endswith(LINEAR):
                            tensors[key] = floats[key] = value
                            continue
                        parts, floats[key] = packed(module, value, scheme, seed)
                        tensors.update(parts)
                    config = json.loads((teacher / "config.json").read_text())
                    config["torch_dtype"] = config["dtype"] = "float32"
                    (plain / "config.json").write_text(json.dumps(config))
                    config["quantization_config"] = scheme
                    (folder / "config.json").write_text(json.dumps(config))
                    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
                    save_file(floats, plain / "model.safetensors", {"format": "pt"})
                    a, b = (json.loads(run(pare, "eval", where, "--text", text, "--ctx", 256, "--json", "--quiet",
                                           "--no-speed")) for where in (folder, plain))
                    mean = [find(x, "perplexity") for x in (a, b)]
                    assert abs(mean[0] / mean[1] - 1) < 1e-6, (name, mean)
                    back = work / f"{name}-f32.gguf"
                    run(pare, "export", folder, "--to", "gguf", "--codec", "f32", "--out", back, "--quiet")
                    again = work / f"{name}-again"
                    run(pare, "export", back, "--to", "folder", "--out", again, "--quiet")
                    print(f"ok read {name}: perplexity {mean[0]:.6f}, as its floats; {weights_of(again, floats)}")
                    for where in (folder, plain, again):
                        shutil.rmtree(where)


def weights_of(folder, floats):
    """Codes are laid out anew on the way, so what comes out is unpacked by the definition of compressed-tensors."""
    import importlib.util
    path = pathlib.Path(__file__).with_name("compressed_tensors.py")
    spec = importlib.util.spec_from_file_location("ours", path)
    ours = importlib.util.module_from_spec(spec)
    sys.path.insert(0, "")  # which that file drops
    spec.loader.exec_module(ours)
    stored = ours.tensors_of(folder)
    checked = 0
    for key, value in floats.items():
        module = key.removesuffix(".weight")
        if module + ".weight_packed" in stored:
            bits = 32 * stored[module + ".weight_packed"].shape[1] // value.shape[1]
            weight = ours.our_weight(stored, module, bits)
        else:
            weight = stored[key].float().numpy()
        assert np.array_equal(weight, value), f"{key}: {np.abs(weight - value).max()} apart"
        checked += 1
    return f"{checked} tensors the same"


def find(result, metric):
    for row in result.get("report", result.get("rows", [])):
        if row.get("metric") == metric:
            return row["after"]
    raise AssertionError(f"no {metric} in {json.dumps(result)[:400]}")


def main():
    pare, teacher = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    with tempfile.TemporaryDirectory() as folder:
        for codes in sys.argv[3:]:
            check_written(pare, pathlib.Path(codes), pathlib.Path(folder))
        check_read(pare, teacher, pathlib.Path(folder))
    print("GPTQModel: " + ("its torch kernel has the same weights" if TorchLinear else "SKIPPED, not installed"))


main()
