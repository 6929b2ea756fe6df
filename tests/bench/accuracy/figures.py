"""Statistics over units (documents or excerpts): ratio means, paired standard errors, bootstrap intervals.

Every method is scored on the same predictions, so unit u has the same number of predictions n_u for all of them. With
seeds, a unit's sums are the mean over the seeds; intervals then are over units alone, and the spread over seeds stands
beside them.
"""
import math
import operator
import random

LEVEL = 0.95


class Units:
    """Sums of one scored run or the mean of several: `n`, `kl`, `loss` (compressed - original), `top1` per unit, and
    `tails`, per run a list of (KL, unit) in falling order, all at or above that run's 99 % quantile."""

    def __init__(self, runs):
        count = len(runs)
        self.n = [unit["predictions"] for unit in runs[0]]
        for run in runs:
            if [unit["predictions"] for unit in run] != self.n:
                raise ValueError("runs over different text cannot be paired")
        mean = lambda value: [sum(value(run[u]) for run in runs) / count for u in range(len(self.n))]
        self.kl = mean(lambda unit: unit["kl"])
        self.loss = mean(lambda unit: unit["compressed_loss"] - unit["original_loss"])
        self.top1 = mean(lambda unit: unit["same_top1"])
        self.tails = [sorted(((kl, u) for u, unit in enumerate(run) for kl in unit["kl_tail"]), reverse=True)
                      for run in runs]


def ratio(sums, n):
    return sum(sums) / sum(n)


def standard_error(sums, n):
    """Of the ratio mean, units as clusters: sqrt(G / (G - 1) sum (s_u - m n_u)^2) / N. None with fewer than two."""
    units = len(n)
    if units < 2:
        return None
    mean = ratio(sums, n)
    return math.sqrt(units / (units - 1) * sum((s - mean * k) ** 2 for s, k in zip(sums, n))) / sum(n)


def quantile_from_tail(tail, weights, total, q):
    """Type-7 quantile of `total` values of which `tail` has the largest in falling order; unit u counts weights[u]
    times. None where the tail does not reach that far down."""
    h = (total - 1) * q
    low = math.floor(h)
    # Counted from the top: rank 1 is the largest.
    wanted_low, wanted_high = total - low, total - min(low + 1, total - 1)
    seen, high_value = 0, None
    for value, unit in tail:
        seen += weights[unit]
        if high_value is None and seen >= wanted_high:
            high_value = value
        if seen >= wanted_low:
            return value + (h - low) * (high_value - value)
    return None


def resamples(units, count, seed):
    """count lists of multiplicities: how often each unit is drawn when as many are drawn with replacement."""
    generator, drawn = random.Random(seed), []
    for _ in range(count):
        times = [0] * units
        for u in generator.choices(range(units), k=units):
            times[u] += 1
        drawn.append(times)
    return drawn


def interval(values, level=LEVEL):
    """Percentile interval (type-7 quantiles)."""
    ordered = sorted(values)
    def at(q):
        h = (len(ordered) - 1) * q
        low = math.floor(h)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (h - low) * (ordered[high] - ordered[low])
    return [at((1 - level) / 2), at((1 + level) / 2)]


class Resampled:
    """The metrics of one method in the text itself (`value`) and in every resample (`drawn`); the same draws for all
    methods of a text, so differences are paired."""

    METRICS = ("kl", "kl_999", "loss", "top1")

    def __init__(self, units, draws):
        self.units = units
        ones = [1] * len(units.n)
        self.value = self.metrics(ones)
        self.drawn = [self.metrics(times) for times in draws]

    def metrics(self, times):
        units = self.units
        dot = lambda sums: sum(map(operator.mul, times, sums))
        total = dot(units.n)
        tails = [quantile_from_tail(tail, times, total, 0.999) for tail in units.tails]
        kl_999 = sum(tails) / len(tails) if all(t is not None for t in tails) else None
        return {"kl": dot(units.kl) / total, "kl_999": kl_999, "loss": dot(units.loss) / total,
                "top1": dot(units.top1) / total}

    def series(self, metric):
        return [m[metric] for m in self.drawn]


def spread_of(values):
    present = [v for v in values if v is not None and math.isfinite(v)]
    # A resample whose tail was not recorded deep enough says nothing; many of them would bias the interval.
    return interval(present) if len(present) >= 0.99 * len(values) else None


def summary(a):
    """{metric: {value, standard_error, interval}} of one method."""
    sums = {"kl": a.units.kl, "loss": a.units.loss, "top1": a.units.top1}
    return {metric: {"value": a.value[metric],
                     "standard_error": standard_error(sums[metric], a.units.n) if metric in sums else None,
                     "interval": spread_of(a.series(metric))} for metric in Resampled.METRICS}


def difference(a, b):
    """{metric: {value, standard_error, interval}} of a - b on the same units."""
    result = {}
    for metric in Resampled.METRICS:
        pairs = [None if x is None or y is None else x - y for x, y in zip(a.series(metric), b.series(metric))]
        entry = {"value": None, "standard_error": None, "interval": spread_of(pairs)}
        if a.value[metric] is not None and b.value[metric] is not None:
            entry["value"] = a.value[metric] - b.value[metric]
        if metric != "kl_999":
            sums = lambda r: getattr(r.units, {"kl": "kl", "loss": "loss", "top1": "top1"}[metric])
            entry["standard_error"] = standard_error([x - y for x, y in zip(sums(a), sums(b))], a.units.n)
        result[metric] = entry
    return result


def gap_closed(a, baseline):
    """{kl, loss}: 1 - a / baseline, the share of the baseline's distance from the original that `a` does not have."""
    result = {}
    for metric in ("kl", "loss"):
        share = lambda x, y: None if not y else 1 - x / y
        drawn = map(share, a.series(metric), baseline.series(metric))
        result[metric] = {"value": share(a.value[metric], baseline.value[metric]), "interval": spread_of(list(drawn))}
    return result
