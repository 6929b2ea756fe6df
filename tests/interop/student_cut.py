#!/usr/bin/env python3
"""Cuts a student with `pare distill` and loads it in transformers: its logits are those of the teacher with the same
layers and neurons taken out by hand. Skips when transformers is not installed.

usage: student_cut.py PARE
"""
import json
import os
import subprocess
import sys
import tempfile

try:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
except ImportError as missing:
    print(f"SKIPPED student_cut.py: {missing}")
    sys.exit(77)


def main():
    pare = sys.argv[1]
    keep, ffn = [0, 2], 40
    with tempfile.TemporaryDirectory() as folder:
        text = os.path.join(folder, "text.txt")
        with open(text, "w", encoding="utf-8") as file:
            file.write("one small model reads this folder and writes another.\n" * 200)
        teacher_at, student_at = os.path.join(folder, "teacher"), os.path.join(folder, "student")
        subprocess.run([pare, "train-tokenizer", "--text", text, "--vocab-size", "280", "--out", teacher_at], check=True)
        vocab = len(json.load(open(os.path.join(teacher_at, "tokenizer.json"), encoding="utf-8"))["model"]["vocab"])
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=vocab + 4, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
                             tie_word_embeddings=True, eos_token_id=0, bos_token_id=0)
        teacher = LlamaForCausalLM(config).eval()
        with torch.no_grad():
            for parameter in teacher.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(5)
        teacher.save_pretrained(teacher_at)
        # A learning rate of zero: what is written is the cut itself.
        subprocess.run([pare, "distill", "--teacher", teacher_at, "--keep-layers", ",".join(map(str, keep)), "--ffn",
                        str(ffn), "--text", text, "--context", "32", "--batch", "2", "--steps", "1", "--lr", "0",
                        "--out", student_at, "--quiet"], check=True)
        student = AutoModelForCausalLM.from_pretrained(student_at, dtype=torch.float32).eval()
        layers = torch.nn.ModuleList()
        for layer in keep:
            block = teacher.model.layers[layer]
            mlp = block.mlp
            score = (mlp.gate_proj.weight.double().norm(dim=1) * mlp.up_proj.weight.double().norm(dim=1)
                     * mlp.down_proj.weight.double().norm(dim=0))
            index = score.topk(ffn).indices.sort().values
            mlp.gate_proj.weight = torch.nn.Parameter(mlp.gate_proj.weight[index])
            mlp.up_proj.weight = torch.nn.Parameter(mlp.up_proj.weight[index])
            mlp.down_proj.weight = torch.nn.Parameter(mlp.down_proj.weight[:, index])
            layers.append(block)
        teacher.model.layers = layers
        ids = torch.randint(0, vocab, (2, 40))
        with torch.no_grad():
            difference = (student(ids, use_cache=False).logits - teacher(ids, use_cache=False).logits).abs().max().item()
        print(f"largest difference of logits: {difference:.2e}")
        assert difference < 1e-4, difference
        print("student_cut.py: ok")


main()
