#!/usr/bin/env python3
"""Values and gradients of the distillation losses by their published definitions, with PyTorch's autograd in float64.

  tests/golden/make_distill_losses.py >tests/golden/distill_losses.json

Sources: KL and temperature, Hinton et al. 2015 (arXiv 1503.02531); generalised JSD, Agarwal et al. 2023 (2306.13649),
equation 1; skew KL and skew reverse KL, Ko et al. 2024 (2402.03898), section 3.1; adaptive KL, Wu et al. 2024
(2404.02657), section 4, where the head ends before the sum of the teacher's sorted probabilities passes 0.5 and the
weights take no gradient.
"""
import json
import torch


def kl(a, b):
    return torch.where(a > 0, a * (a.log() - b.log()), torch.zeros_like(a)).sum()


def forward(p, q, _):
    return kl(p, q)


def reverse(p, q, _):
    return kl(q, p)


def jsd(p, q, beta):
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def skew(p, q, alpha):
    return kl(p, alpha * p + (1 - alpha) * q)


def skew_reverse(p, q, alpha):
    return kl(q, (1 - alpha) * p + alpha * q)


def adaptive(p, q, _):
    sorted_p, order = p.sort(descending=True, stable=True)
    head = sorted_p.cumsum(0) <= 0.5
    head[0] = True
    gap = (sorted_p - q[order]).abs().detach()
    total = gap.sum()
    weight = gap[head].sum() / total if total > 0 else torch.tensor(0.5, dtype=p.dtype)
    return weight * kl(p, q) + (1 - weight) * kl(q, p)


LOSSES = [("forward-kl", forward, [0.0]), ("reverse-kl", reverse, [0.0]), ("jsd", jsd, [0.1, 0.5, 0.9]),
          ("skew-kl", skew, [0.0, 0.1, 0.6]), ("skew-reverse-kl", skew_reverse, [0.0, 0.1, 0.6]),
          ("adaptive-kl", adaptive, [0.0])]
VOCAB = 19  # not a multiple of the 16 lanes


def rows():
    generator = torch.Generator().manual_seed(20241)
    normal = lambda: torch.randn(VOCAB, generator=generator, dtype=torch.float64)
    draw = lambda scale: (scale * normal()).mul(256).round().div(256)  # short in JSON
    same = draw(2.0)
    hot = torch.full((VOCAB,), -40.0, dtype=torch.float64)
    hot[5] = 40.0
    return [("near", draw(1.0), draw(1.0)), ("far", draw(4.0), draw(4.0)), ("equal", same, same.clone()),
            ("one-hot teacher", hot, draw(1.0)), ("one-hot student", draw(1.0), hot.clone()),
            ("flat teacher", torch.zeros(VOCAB, dtype=torch.float64), draw(2.0))]


cases = []
for name, function, parameters in LOSSES:
    for parameter in parameters:
        for tau in (1.0, 2.5):
            for row, teacher, student in rows():
                z = student.clone().requires_grad_()
                value = function(torch.softmax(teacher / tau, 0), torch.softmax(z / tau, 0), parameter)
                (tau * tau * value).backward()
                cases.append({"loss": name, "parameter": parameter, "tau": tau, "row": row, "value": value.item(),
                              "gradient": [float(f"{g:.12g}") for g in z.grad.tolist()]})
logits = {name: {"teacher": t.tolist(), "student": s.tolist()} for name, t, s in rows()}
print('{"rows": ' + json.dumps(logits) + ', "cases": [')
print(",\n".join(json.dumps(c) for c in cases))
print("]}")
