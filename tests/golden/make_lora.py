#!/usr/bin/env python3
"""LoRA by PEFT on a tiny model of tests/golden/families: masked loss, gradients, one AdamW step, merged logits.

  tests/golden/make_lora.py >tests/golden/lora.json      (torch, transformers, peft)

Weights and ids come from make_families.py's formula; A from the same formula by the adapter's name, over 8; B over 16. The
loss is transformers' own, with labels -100 where nothing is learned, over two rows of unequal length, in float64.
"""
import json
import pathlib
import sys
import tempfile

import numpy as np
import peft
import torch
import transformers

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import make_families as families

FAMILY, RANK, ALPHA, RATE = "llama_gqa", 3, 5.0, 0.01


def formula(name, shape, divisor):
    count = int(np.prod(shape))
    seed = np.uint64(families.fnv1a64(name))
    with np.errstate(over="ignore"):
        z = families.splitmix64(np.arange(count, dtype=np.uint64) + seed)
    x = (z >> np.uint64(52)).astype(np.float64) - 2048.0
    return torch.tensor(x / 8192.0 / divisor).reshape(shape)


def short(values):
    return [float(f"{v:.10g}") for v in values]


def main():
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as work:
        families.make_folder(families.CASES[FAMILY](), pathlib.Path(work))
        model = transformers.AutoModelForCausalLM.from_pretrained(work, attn_implementation="eager", dtype=torch.float64)
    model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear",
                                                       task_type="CAUSAL_LM", lora_dropout=0.0)).double()
    adapters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    for name, parameter in adapters.items():
        with torch.no_grad():
            parameter.copy_(formula(name, parameter.shape, 8 if "lora_A" in name else 16))
    rows = [[int(x) for x in formula(f"ids {r}", (n,), 1).mul(8192).add(2048).remainder(64)] for r, n in ((0, 19), (1, 11))]
    learned = [[0] * 7 + [1] * 12, [0] * 3 + [1] * 5 + [0] * 2 + [1]]
    width = max(map(len, rows))
    ids = torch.tensor([r + [0] * (width - len(r)) for r in rows])
    labels = torch.tensor([[i if s else -100 for i, s in zip(r, m)] + [-100] * (width - len(r))
                           for r, m in zip(rows, learned)])
    mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])
    optimizer = torch.optim.AdamW(adapters.values(), lr=RATE, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
    loss.backward()
    gradients = {n: {"sum": float(p.grad.sum()), "squares": float(p.grad.square().sum()),
                     "first": short(p.grad.flatten()[:4].tolist())} for n, p in adapters.items()}
    optimizer.step()
    after = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
    merged = model.merge_and_unload().eval()
    with torch.no_grad():
        logits = merged(ids[:1], use_cache=False).logits[0, -1]
    print(json.dumps({"versions": [torch.__version__, transformers.__version__, peft.__version__], "family": FAMILY,
                      "rank": RANK, "alpha": ALPHA, "rate": RATE, "ids": rows, "learned": learned,
                      "loss": loss.item(), "loss_after": after.item(), "gradients": gradients,
                      "merged_logits": short(logits.tolist())}))


main()
