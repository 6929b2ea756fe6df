#!/usr/bin/env python3
"""Training and distillation steps of a Llama-style folder in PyTorch, the plain way: transformers' LlamaForCausalLM,
scaled_dot_product_attention, AdamW (fused), clipping by norm. Prints one JSON object with tokens/s and peak memory.

usage: training_torch.py train|distill f32|bf16 MODEL TEXT BATCH CONTEXT MICRO_BATCH STEPS THREADS
TEXT is one file. The first steps, a quarter of them, are not timed."""
import json
import pathlib
import resource
import sys
import time

import tokenizers
import torch
import torch.nn.functional as F
import transformers

task, precision, folder, text, batch, context, micro, steps, threads = sys.argv[1:10]
batch, context, micro, steps = int(batch), int(context), int(micro), int(steps)
torch.set_num_threads(int(threads))
torch.manual_seed(0)

ids = tokenizers.Tokenizer.from_file(f"{folder}/tokenizer.json").encode(
    pathlib.Path(text).read_text()[: 40 * batch * context * 8], add_special_tokens=False).ids
ids = torch.tensor(ids)


def load():
    return transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")


model = load().train()
teacher = load().eval().requires_grad_(False) if task == "distill" else None
decayed = [p for p in model.parameters() if p.dim() == 2]
plain = [p for p in model.parameters() if p.dim() != 2]
optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
                              lr=1e-4, betas=(0.9, 0.95), fused=True)


def step():
    optimizer.zero_grad(set_to_none=True)
    starts = torch.randint(0, len(ids) - context - 1, (batch,))
    rows = torch.stack([ids[s : s + context + 1] for s in starts])
    for first in range(0, batch, micro):
        part = rows[first : first + micro]
        inputs, targets = part[:, :-1], part[:, 1:]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            logits = model(inputs, use_cache=False).logits
            if teacher is not None:
                with torch.no_grad():
                    taught = teacher(inputs, use_cache=False).logits
        logits = logits.float().reshape(-1, logits.shape[-1])
        if teacher is None:
            loss = F.cross_entropy(logits, targets.reshape(-1), reduction="sum")
        else:
            loss = F.kl_div(F.log_softmax(logits, -1), F.log_softmax(taught.float().reshape(logits.shape), -1),
                            log_target=True, reduction="sum")
        (loss / (batch * context)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


warm = max(1, steps // 4)
for _ in range(warm):
    step()
begin = time.perf_counter()
for _ in range(steps - warm):
    step()
seconds = time.perf_counter() - begin
print(json.dumps({"tokens_per_second": (steps - warm) * batch * context / seconds,
                  "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                  "versions": {"torch": torch.__version__, "transformers": transformers.__version__}}))
