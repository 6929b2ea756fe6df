"""transformers with compressed-tensors loads a quantized folder in float32: every weight must be exactly ours.

usage: compressed_tensors.py QUANTIZED_FOLDER
Our weights are recomputed here from the packed integers with one float32 multiplication, independently of
compressed-tensors, and from the side file codes.pare.
"""
import json
import sys
from pathlib import Path

sys.path.pop(0)  # this file is called like the package that it tests
try:
    import compressed_tensors  # noqa: F401
    import numpy as np
    import torch
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM
except ImportError as missing:
    print(f"SKIPPED: {missing}")
    sys.exit(77)


def tensors_of(folder):
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            found.update({name: handle.get_tensor(name) for name in handle.keys()})
    return found


def unpack_bits(words, bits, count):
    """A dense bit stream along the last axis, little end first, offset 2^(b-1) removed."""
    unsigned = words.numpy().astype(np.int64) & 0xFFFFFFFF
    stream = ((unsigned[..., None] >> np.arange(32)) & 1).reshape(*words.shape[:-1], -1)[..., : count * bits]
    return (stream.reshape(*words.shape[:-1], count, bits) << np.arange(bits)).sum(-1) - 2 ** (bits - 1)


def our_weight(stored, module, bits):
    if module + ".weight_packed" in stored:
        rows, cols = stored[module + ".weight_shape"].tolist()
        codes = unpack_bits(stored[module + ".weight_packed"], bits, cols)
    else:
        codes = stored[module + ".weight"].numpy().astype(np.int64)
        rows, cols = codes.shape
    scale = stored[module + ".weight_scale"].numpy()
    assert scale.dtype == np.float32
    assert (scale == scale.astype(np.float16).astype(np.float32)).all(), f"{module}: a scale that float16 does not hold"
    groups = scale.shape[1]
    zero = np.zeros_like(scale, dtype=np.int64)
    if module + ".weight_zero_point" in stored:
        zero = unpack_bits(stored[module + ".weight_zero_point"].T.contiguous(), bits, rows).T
    wide = np.repeat(scale, cols // groups, axis=1)
    return (codes - np.repeat(zero, cols // groups, axis=1)).astype(np.float32) * wide


def rounded(x, steps, lowest):
    """What a linear with int8 inputs multiplies with, one scale per token. x: [..., features]."""
    peak = x.abs().amax(-1, keepdim=True)
    scale = torch.where(peak > 0, peak / steps, torch.ones_like(peak))
    return torch.round(x / scale).clamp(lowest, 127) * scale


def divergence(p, q):
    p, q = torch.log_softmax(p.double(), -1), torch.log_softmax(q.double(), -1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


def check_rounding(plain, modules, ids, theirs):
    """transformers rounds the inputs of these modules as compressed-tensors says, and ours is the same to a hair."""

    def logits(steps, lowest):
        named = dict(plain.named_modules())
        hooks = [named[m].register_forward_pre_hook(lambda _, x: (rounded(x[0], steps, lowest),)) for m in modules]
        with torch.no_grad():
            out = plain(ids).logits
        for hook in hooks:
            hook.remove()
        return out

    with torch.no_grad():
        exact = plain(ids).logits
    same, ours = logits(127.5, -128), logits(127.0, -127)
    difference = (same - theirs).abs().max().item()
    assert (theirs - exact).abs().max().item() > 1e-3, "transformers did not round the inputs"
    assert difference < 1e-3, f"logits differ by {difference} from rounding as compressed-tensors says"
    to_ours, to_exact = divergence(theirs, ours), divergence(theirs, exact)
    assert to_ours < 2 * to_exact, (to_ours, to_exact)
    return f"inputs of {len(modules)} linears rounded; KL {to_ours:.1e} to our rounding, {to_exact:.1e} to none"


def main():
    folder = Path(sys.argv[1])
    stored = tensors_of(folder)
    config = json.loads((folder / "config.json").read_text())
    quantization = config["quantization_config"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.arange(1, 17)[None]).logits
    assert torch.isfinite(logits).all()

    bits_of, rounding = {}, []
    for group in quantization["config_groups"].values():
        for target in group["targets"]:
            bits_of[target] = group["weights"]["num_bits"]
            if group["input_activations"]:
                assert group["format"] == "int-quantized"
                rounding.append(target)
    loaded = dict(model.named_modules())
    packed = [name.removesuffix(".weight_packed") for name in stored if name.endswith(".weight_packed")]
    packed += [name.removesuffix(".weight") for name in stored if stored[name].dtype == torch.int8]
    assert packed and sorted(packed) == sorted(bits_of), "the codes in the folder are not those of its config"
    for module in packed:
        ours = our_weight(stored, module, bits_of[module])
        layer = loaded[module]
        # An identity batch reads the weight that the layer really multiplies with, whatever form it keeps it in.
        layer.quantization_enabled = False  # the inputs as they are
        with torch.no_grad():
            bias = layer.bias if getattr(layer, "bias", None) is not None else 0
            theirs = (layer(torch.eye(ours.shape[1])) - bias).T.numpy()
        assert theirs.dtype == np.float32
        assert np.array_equal(theirs, ours), f"{module}: {np.abs(theirs - ours).max()} apart"

    side = folder / "codes.pare"
    checked = 0
    if side.exists():
        with safe_open(side, framework="np") as handle:
            codecs = json.loads(handle.metadata()["pare.codecs"])
            for name in codecs:
                codes = handle.get_tensor(name + ".codes").astype(np.int64)
                scales = handle.get_tensor(name + ".scales").astype(np.float32)
                zeros = handle.get_tensor(name + ".zeros").astype(np.int64) if name + ".zeros" in handle.keys() else 0 * scales
                repeat = codes.shape[1] // scales.shape[1]
                ours = (codes - np.repeat(zeros, repeat, axis=1)).astype(np.float32) * np.repeat(scales, repeat, axis=1)
                if name + ".minima" in handle.keys():
                    ours += np.repeat(handle.get_tensor(name + ".minima").astype(np.float32), repeat, axis=1)
                assert np.array_equal(model.state_dict()[name].numpy(), ours), name
                checked += 1

    # The same network with plain float weights gives the same logits, so nothing else differs either.
    plain_config = {key: value for key, value in config.items() if key != "quantization_config"}
    plain = AutoModelForCausalLM.from_config(type(model.config).from_dict(plain_config), dtype=torch.float32)
    weights = {name: value.float() for name, value in stored.items()
               if ".weight_" not in name and value.dtype != torch.int8}
    for module in packed:
        weights[module + ".weight"] = torch.from_numpy(our_weight(stored, module, bits_of[module]))
    missing, unexpected = plain.load_state_dict(weights, strict=False)
    assert not unexpected and all(name == "lm_head.weight" for name in missing), (missing, unexpected)
    plain.tie_weights()
    ids = torch.arange(1, 17)[None]
    if rounding:
        said = check_rounding(plain.eval(), rounding, ids, logits)
    else:
        with torch.no_grad():
            difference = (plain.eval()(ids).logits - logits).abs().max().item()
        assert difference == 0.0, f"logits differ by {difference}"
        said = "logits equal"
    print(f"ok: {len(packed)} packed linears and {checked} tensors of codes.pare are exactly ours; {said}")


if __name__ == "__main__":
    main()
