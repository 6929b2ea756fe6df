"""Tables and plots from scored runs: one raw JSON, one table per model and text, differences, SVG files."""
import collections
import json
import math

import figures
import plots
import rows

COLUMNS = ["format", "method", "bits/weight", "bits, block linears", "mean KL", "95 % interval", "99.9 % KL", "top-1",
           "ln ppl - original's", "95 % interval", "gap closed, KL", "gap closed, ln ppl", "KL over seeds"]
PAIR_COLUMNS = ["text", "format", "A", "B", "mean KL, A - B", "standard error", "95 % interval", "99.9 % KL, A - B",
                "95 % interval", "ln ppl, A - B", "95 % interval", "top-1, A - B"]


def short(value):
    return "-" if value is None else f"{value:.3g}"


def between(ends):
    return "-" if ends is None else f"{ends[0]:.4g} .. {ends[1]:.4g}"


def percent(entry):
    if entry is None or entry["value"] is None:
        return "-"
    ends = entry["interval"]
    return f"{100 * entry['value']:.1f} %" + (f" ({100 * ends[0]:.1f} .. {100 * ends[1]:.1f})" if ends else "")


def finite(run, text):
    """The runs' JSON says infinities as texts."""
    return all(isinstance(run["tests"][text][k], (int, float)) and math.isfinite(run["tests"][text][k])
               for k in ("p999_kl", "max_kl"))


def estimates(runs, model, text, baseline, count):
    """[{format, method, ..., metrics}] in the order of the runs, and all pairs of one format."""
    groups = {}
    for run in runs:
        if run["model"] == model and text in run["tests"]:
            groups.setdefault((run["format"], run["method"]), []).append(run)
    broken = [key for key, members in groups.items() if not all(finite(run, text) for run in members)]
    for key in broken:
        raise SystemExit(f"{model}, {text}, {' '.join(key)}: infinite KL; remove the row or look at the model")
    resampled, entries, draws = {}, [], None
    for key, members in groups.items():
        units = figures.Units([run["tests"][text]["units"] for run in members])
        draws = draws or figures.resamples(len(units.n), count, seed=1)
        resampled[key] = figures.Resampled(units, draws)
    base = resampled.get(baseline)
    for key, members in groups.items():
        mean = lambda value: sum(map(value, members)) / len(members)
        kl = [run["tests"][text]["mean_kl"]["value"] for run in members]
        scores = [run["tests"][text] for run in members]
        if not math.isclose(sum(kl) / len(kl), resampled[key].value["kl"], rel_tol=1e-9):
            raise SystemExit(f"{model}, {text}, {' '.join(key)}: units do not add up to the evaluator's mean KL")
        entries.append({
            "format": key[0], "method": key[1], "runs": len(members), "units": len(resampled[key].units.n),
            "predictions": scores[0]["predictions"],
            "bits_per_weight": mean(lambda run: run["bits_per_weight"]),
            "bits_per_block_linear_weight": mean(lambda run: run["bits_per_block_linear_weight"]),
            "perplexity": mean(lambda run: run["tests"][text]["perplexity"]["value"]),
            "perplexity_original": scores[0]["perplexity_original"]["value"],
            "metrics": figures.summary(resampled[key]),
            "gap_closed": figures.gap_closed(resampled[key], base) if base else None,
            "kl_of_seeds": kl})
    pairs = [{"format": a[0], "a": a[1], "b": b[1]} | figures.difference(resampled[a], resampled[b])
             for a in resampled for b in resampled if a != b and b[1] in rows.REFERENCES
             # A layout that is not one of ours is compared with the baseline's.
             and b[0] == (a[0] if a[0] in rows.FORMATS else baseline[0])]
    return entries, pairs


def table(entries):
    lines = []
    for e in entries:
        m, gap = e["metrics"], e["gap_closed"] or {}
        seeds = e["kl_of_seeds"]
        lines.append([e["format"], e["method"], f"{e['bits_per_weight']:.3f}",
                      f"{e['bits_per_block_linear_weight']:.3f}", m["kl"]["value"], between(m["kl"]["interval"]),
                      m["kl_999"]["value"] if m["kl_999"]["value"] is not None else "-", m["top1"]["value"],
                      m["loss"]["value"], between(m["loss"]["interval"]), percent(gap.get("kl")),
                      percent(gap.get("loss")), f"{min(seeds):.4g} .. {max(seeds):.4g}" if len(seeds) > 1 else "-"])
    return lines


def absent_table(formats):
    names = [(form, method) for form in formats for method in rows.METHODS
             if form in rows.METHODS[method].get("formats", rows.FORMATS)]
    return [[form, method] + ["absent"] * (len(COLUMNS) - 2) for form, method in names]


def pair_table(text, pairs):
    return [[text, p["format"], p["a"], p["b"], p["kl"]["value"], short(p["kl"]["standard_error"]),
             between(p["kl"]["interval"]), p["kl_999"]["value"] if p["kl_999"]["value"] is not None else "-",
             between(p["kl_999"]["interval"]), p["loss"]["value"], between(p["loss"]["interval"]), p["top1"]["value"]]
            for p in pairs]


def summary(texts):
    """One line per row: mean KL and gap closed on each text."""
    entries = {text: {(e["format"], e["method"]): e for e in found} for text, found in texts.items()}
    first = next(iter(entries.values()))
    lines = []
    for key, entry in first.items():
        of = [entries[text][key] for text in entries]
        gaps = [(e["gap_closed"] or {}).get("kl") for e in of]
        lines.append([*key, f"{entry['bits_per_block_linear_weight']:.3f}", entry["runs"]] + [e["metrics"]["kl"]["value"] for e in of]
                     + ["-" if g is None or g["value"] is None else f"{100 * g['value']:.1f} %" for g in gaps]
                     + [e["metrics"]["top1"]["value"] for e in of[:1]])
    return {"columns": ["format", "method", "bits", "seeds"] + [f"KL, {text}" for text in entries]
            + [f"gap closed, {text}" for text in entries] + [f"top-1, {next(iter(entries))}"], "table": lines}


def save(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n")


def provenance(meta, runs):
    """Of a table: the command and machine of this call, the commit of the runs (each its own where they differ)."""
    commits = sorted({run["commit"] for run in runs})
    machines = sorted({run["machine"] for run in runs})
    return {"command": meta["command"], "machine": "; ".join(machines) or meta["machine"],
            "commit": commits[0] if len(commits) == 1 else ", ".join(commits) or meta["commit"]}


def row_of(run):
    return run["model"], run["format"], run["method"]


class Kept:
    """What is published already of rows that this call did not measure, or with fewer seeds: they stay as they are, each
    with the commit and machine of its runs. Their units are not published, so that a difference between a kept row and a
    new one is left out."""

    SETTINGS = ("samples", "resamples", "act")

    def __init__(self, published, runs, baseline):
        self.published, self.baseline = published, baseline
        seeds, old = collections.Counter(map(row_of, runs)), collections.Counter(map(row_of, published.get("runs", [])))
        self.measured = {row for row in seeds if seeds[row] >= old[row]}
        self.new = [run for run in runs if row_of(run) in self.measured]
        self.runs = [run for run in published.get("runs", []) if self.stays(run["model"], run)]

    def stays(self, model, row):
        return model in rows.MODELS and (model, row["format"], row["method"]) not in self.measured

    def entries(self, model, text, new):
        """`new` and what is kept, in the order of the tables."""
        old = self.published.get("estimates", {}).get(model, {}).get(text, [])
        kept = [entry for entry in old if self.stays(model, entry)]
        # The same text, and the same row that gaps are counted from, or the two do not belong into one table.
        values = lambda entries: next(((e["predictions"], e["units"], e["metrics"]["kl"]["value"]) for e in entries
                                       if (e["format"], e["method"]) == self.baseline), None)
        before, now = values(old), values(new)
        if kept and new and not (before and now and before[:2] == now[:2]
                                 and math.isclose(before[2], now[2], rel_tol=0.005)):
            raise SystemExit(f"{model}, {text}: {' '.join(self.baseline)} has (predictions, units, KL) {now}, the published "
                             f"{before}: rows cannot be kept; measure it on the same text, or all rows without --merge")
        keys = [(form, method) for form in rows.FORMATS for method in rows.METHODS]
        place = {key: number for number, key in enumerate(keys)}
        return sorted(kept + new, key=lambda e: place.get((e["format"], e["method"]), len(place)))

    def pairs(self, model, text):
        old = self.published.get("differences", {}).get(model, {}).get(text, [])
        is_kept = lambda form, method: self.stays(model, {"format": form, "method": method})
        return [p for p in old if is_kept(p["format"], p["a"]) and
                is_kept(p["format"] if p["format"] in rows.FORMATS else self.baseline[0], p["b"])]


def settings_differ(published, meta):
    """What of the settings of published rows is not this call's: such rows cannot be kept beside its own."""
    return [f"{name} {published[name]} there, {meta[name]} here" for name in Kept.SETTINGS if published[name] != meta[name]]


def write(out, runs, models, absent_peers, baseline, meta, published=None):
    """`published`: the raw results whose rows stay where `runs` has none of them, be it that something is absent here."""
    kept = Kept(published or {}, runs, baseline)
    new, runs = kept.new, kept.new + kept.runs
    there = {f"{run['model']} {run['format']} {run['method']} seed {run['seed']}" for run in runs}
    raw = meta | {"not run": [name for name in meta["not run"] if name not in there]}
    raw["note"] = ("intervals: 95 % percentile bootstrap over units (documents, long ones cut into excerpts), "
                   f"{meta['resamples']} resamples, the same for all methods; standard errors over the same units; "
                   "gap closed: share of the distance of " + " ".join(baseline) + " from the original that is gone")
    measured = {run["model"] for run in new}
    old_models = kept.published.get("models", {})
    raw["models"] = old_models | {name: m for name, m in models.items() if name in measured or name not in old_models}
    raw["absent peers"] = absent_peers or kept.published.get("absent peers", [])
    for part in ("estimates", "differences"):
        raw[part] = {name: dict(of) for name, of in kept.published.get(part, {}).items()}
    formats = list(dict.fromkeys(run["format"] for run in runs)) or rows.DEFAULT_FORMATS
    for name, model in models.items():
        own = [run for run in runs if run["model"] == name]
        all_pairs = []
        for text in rows.MODELS[name]["tests"]:
            file = out / f"accuracy_{name}_{text}.json"
            head = {"name": f"{name}, {text}" + (" (in domain)" if text in model["domain"] else " (another domain)")}
            head |= provenance(meta, own) | {"columns": COLUMNS}
            why = model["absent"].get("model") or model["absent"].get("calibration") or model["absent"].get(text)
            if text in raw["estimates"].get(name, {}) and not any(text in run["tests"] for run in new
                                                                  if run["model"] == name):
                entries, pairs = raw["estimates"][name][text], raw["differences"][name][text]
            elif why:
                save(file, head | {"absent": why, "table": absent_table(formats)})
                continue
            elif not own:
                continue
            else:
                entries, pairs = estimates(new, name, text, baseline, meta["resamples"])
                entries, pairs = kept.entries(name, text, entries), pairs + kept.pairs(name, text)
            raw["estimates"].setdefault(name, {})[text], raw["differences"].setdefault(name, {})[text] = entries, pairs
            missing = [[p["format"], p["method"]] + ["absent"] * (len(COLUMNS) - 2)
                       for p in absent_peers if p["model"] == name
                       and (p["format"], p["method"]) not in {(e["format"], e["method"]) for e in entries}]
            save(file, head | {"table": table(entries) + missing})
            all_pairs += pair_table(text, pairs)
            title = head["name"]
            (out / f"accuracy_{name}_{text}_kl.svg").write_text(plots.methods(entries, title))
            (out / f"accuracy_{name}_{text}_bits.svg").write_text(plots.bits(entries, title))
        measured = raw["estimates"].get(name)
        if measured:
            save(out / f"accuracy_{name}_summary.json",
                 {"name": f"{name}: all texts"} | provenance(meta, own) | summary(measured))
        if all_pairs:
            head = {"name": f"{name}: differences"} | provenance(meta, own)
            save(out / f"accuracy_{name}_differences.json", head | {"columns": PAIR_COLUMNS, "table": all_pairs})
    without_units = lambda scores: {key: value for key, value in scores.items() if key != "units"}
    raw["runs"] = [run | {"tests": {t: without_units(s) for t, s in run["tests"].items()}} for run in runs]
    save(out / "accuracy.json", raw)
