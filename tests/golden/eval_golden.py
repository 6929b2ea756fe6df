"""Writes eval_golden.json: KL, perplexity and top-1 of small random logits, by torch in float64."""
import json
import pathlib

import torch

torch.manual_seed(20)
VOCAB = 13
lengths, documents = [6, 9, 2, 7], [0, 0, 1, 2]
windows, kl, loss_a, loss_b, same = [], [], [], [], []
for length, document in zip(lengths, documents):
    ids = torch.randint(0, VOCAB, (length,))
    a = (torch.randn(length, VOCAB) * 3).float()
    b = (a + torch.randn(length, VOCAB) * 0.7).float()
    p, q = torch.log_softmax(a.double(), -1)[:-1], torch.log_softmax(b.double(), -1)[:-1]
    kl.append(torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1))
    loss_a.append(torch.nn.functional.nll_loss(p, ids[1:], reduction="none"))
    loss_b.append(torch.nn.functional.nll_loss(q, ids[1:], reduction="none"))
    same.append((p.argmax(-1) == q.argmax(-1)).double())
    windows.append({"ids": ids.tolist(), "document": document, "original": a.tolist(), "compressed": b.tolist()})
kl, loss_a, loss_b, same = map(torch.cat, (kl, loss_a, loss_b, same))
expected = {
    "predictions": len(kl),
    "mean_kl": kl.mean().item(),
    "median_kl": torch.quantile(kl, 0.5).item(),
    "p99_kl": torch.quantile(kl, 0.99).item(),
    "p999_kl": torch.quantile(kl, 0.999).item(),
    "max_kl": kl.max().item(),
    "top1": same.mean().item(),
    "perplexity_original": loss_a.mean().exp().item(),
    "perplexity_compressed": loss_b.mean().exp().item(),
}
out = pathlib.Path(__file__).with_name("eval_golden.json")
out.write_text(json.dumps({"torch": torch.__version__.split("+")[0], "expected": expected, "windows": windows}) + "\n")
