#!/usr/bin/env python3
"""The harness's statistics against brute force, its cuts of text and its count of bits. Standard library only."""
import json
import math
import pathlib
import random
import tempfile
import unittest

import corpora
import figures
import harness
import plots
import report


def run_of(kl, document, loss):
    """A scored run as the evaluator reports it, from one KL and loss difference per prediction."""
    ordered = sorted(kl)
    tail_from = type_7(ordered, 0.99)
    units = []
    for d in sorted(set(document)):
        at = [i for i, own in enumerate(document) if own == d]
        units.append({"predictions": len(at), "kl": sum(kl[i] for i in at), "original_loss": 2.0 * len(at),
                      "compressed_loss": 2.0 * len(at) + sum(loss[i] for i in at),
                      "same_top1": sum(kl[i] < 0.5 for i in at),
                      "kl_tail": sorted(kl[i] for i in at if kl[i] >= tail_from)})
    return units


def type_7(ordered, q):
    h = (len(ordered) - 1) * q
    low = math.floor(h)
    return ordered[low] + (h - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])


class Statistics(unittest.TestCase):
    def setUp(self):
        generator = random.Random(7)
        self.document = [d for d in range(40) for _ in range(generator.randint(20, 400))]
        level = [generator.gauss(0, 0.3) for _ in range(40)]
        self.kl = [generator.expovariate(1) * math.exp(level[d]) for d in self.document]
        self.loss = [generator.gauss(0.1, 1) for _ in self.document]
        self.units = figures.Units([run_of(self.kl, self.document, self.loss)])

    def test_metrics_of_resamples_equal_those_of_the_drawn_predictions(self):
        draws = figures.resamples(40, 20, seed=3)
        resampled = figures.Resampled(self.units, draws)
        by_unit = {d: [i for i, own in enumerate(self.document) if own == d] for d in range(40)}
        for times, metrics in zip([[1] * 40] + draws, [resampled.value] + resampled.drawn):
            self.assertEqual(sum(times), 40)
            drawn = [i for d in range(40) for _ in range(times[d]) for i in by_unit[d]]
            kl = sorted(self.kl[i] for i in drawn)
            self.assertAlmostEqual(metrics["kl"], sum(kl) / len(kl), places=12)
            self.assertAlmostEqual(metrics["kl_999"], type_7(kl, 0.999), places=12)
            self.assertAlmostEqual(metrics["loss"], sum(self.loss[i] for i in drawn) / len(drawn), places=12)
            self.assertAlmostEqual(metrics["top1"], sum(self.kl[i] < 0.5 for i in drawn) / len(drawn), places=12)

    def test_tail_that_does_not_reach_is_not_a_quantile(self):
        self.assertIsNone(figures.quantile_from_tail([(3.0, 0), (2.0, 1)], [1, 1], 10_000, 0.999))
        self.assertAlmostEqual(figures.quantile_from_tail([(3.0, 0), (2.0, 1), (1.0, 0)], [1, 1], 3, 0.75), 2.5)
        self.assertAlmostEqual(figures.quantile_from_tail([(3.0, 0), (2.0, 1), (1.0, 0)], [0, 2], 2, 0.5), 2.0)

    def test_standard_error_and_interval_agree(self):
        resampled = figures.Resampled(self.units, figures.resamples(40, 2000, seed=1))
        summary = figures.summary(resampled)["kl"]
        low, high = summary["interval"]
        self.assertLess(low, summary["value"])
        self.assertGreater(high, summary["value"])
        error = summary["standard_error"]
        self.assertAlmostEqual((high - low) / (2 * 1.96), error, delta=0.15 * error)

    def test_standard_error_of_units_of_one_size_is_the_usual_one(self):
        means = [1.0, 2.0, 4.0, 9.0]
        mean = sum(means) / 4
        usual = math.sqrt(sum((m - mean) ** 2 for m in means) / 3 / 4)
        self.assertAlmostEqual(figures.standard_error([5 * m for m in means], [5] * 4), usual, places=12)
        self.assertIsNone(figures.standard_error([1.0], [3]))

    def test_differences_are_paired(self):
        draws = figures.resamples(40, 500, seed=1)
        shifted = figures.Units([run_of([k + 0.01 for k in self.kl], self.document, self.loss)])
        a, b = figures.Resampled(shifted, draws), figures.Resampled(self.units, draws)
        difference = figures.difference(a, b)
        # The same shift everywhere: documents cancel out to the last digits.
        self.assertAlmostEqual(difference["kl"]["value"], 0.01, places=12)
        self.assertLess(difference["kl"]["standard_error"], 1e-12)
        self.assertAlmostEqual(difference["kl"]["interval"][0], 0.01, places=12)
        self.assertAlmostEqual(difference["kl_999"]["interval"][1], 0.01, places=12)
        self.assertEqual(difference["loss"]["value"], 0)
        gap = figures.gap_closed(b, a)["kl"]
        self.assertAlmostEqual(gap["value"], 1 - b.value["kl"] / a.value["kl"], places=12)
        self.assertLess(gap["interval"][0], gap["value"])

    def test_seeds_are_averaged_and_other_text_is_refused(self):
        again = run_of([2 * k for k in self.kl], self.document, self.loss)
        both = figures.Units([run_of(self.kl, self.document, self.loss), again])
        self.assertAlmostEqual(sum(both.kl), 1.5 * sum(self.kl), places=6)
        with self.assertRaises(ValueError):
            figures.Units([again, run_of(self.kl[:-1], self.document[:-1], self.loss[:-1])])


class Text(unittest.TestCase):
    def test_excerpts_join_to_the_text_and_end_at_paragraphs(self):
        text = "\n\n".join("word " * n for n in (10, 900, 300, 2500, 40)) + "x" * 9000
        pieces = corpora.excerpts(text)
        self.assertEqual("".join(pieces), text)
        self.assertLessEqual(max(map(len, pieces)), corpora.EXCERPT * 3 // 2)
        self.assertGreater(len(pieces), 5)

    def test_spread_keeps_to_the_budget_and_reaches_the_end(self):
        items = [f"{i:03d}" + "x" * 97 for i in range(100)]
        kept = corpora.spread(items, 1000)
        self.assertEqual(len(kept), 10)
        self.assertGreater(int(kept[-1][:3]), 89)
        self.assertEqual(corpora.spread(items[:3], 1000), items[:3])

    def test_parts_of_the_stories_are_disjoint(self):
        stories = [f"story {i}" for i in range(2000)]
        parts = [corpora.share(stories, *ends) for ends in ((0, 30), (30, 75), (75, 100))]
        self.assertEqual(sum(map(len, parts)), 2000)
        self.assertEqual(len(set().union(*map(set, parts))), 2000)
        self.assertTrue(all(len(part) > 400 for part in parts))


class Bits(unittest.TestCase):
    def test_bits_count_scales_and_zeros(self):
        tensors = {"model.embed_tokens.weight": {"codec": "q8", "shape": [64, 32]},
                   "model.layers.0.self_attn.q_proj.weight": {"codec": "q4g32", "shape": [16, 64]},
                   "model.layers.0.mlp.up_proj.weight": {"codec": "q4ag32", "shape": [16, 64]},
                   "model.layers.0.mlp.gate_proj.weight": {"codec": "q4mg32", "shape": [16, 64]},
                   "model.layers.0.mlp.down_proj.weight": {"codec": "q8c", "shape": [64, 172]},
                   "model.norm.weight": {"codec": "f32", "shape": [64]}}
        linear = 1024 * 4.5 + 1024 * (4 + 20 / 32) + 1024 * 5 + 64 * (172 * 8 + 16)
        everything, linears = harness.bits_per_weight(tensors)
        self.assertAlmostEqual(linears, linear / (1024 * 3 + 64 * 172))
        self.assertAlmostEqual(everything, (linear + 2048 * 8.5 + 64 * 16) / (2048 + 1024 * 3 + 64 * 172 + 64))


class Merged(unittest.TestCase):
    BASE = ("q4g32", "rtn-q4_0")

    def run_of(self, method, seed=0, commit="new"):
        return {"model": "teacher", "format": "q4g32", "method": method, "seed": seed, "commit": commit}

    def entry(self, method, kl):
        return {"format": "q4g32", "method": method, "predictions": 10, "units": 2, "metrics": {"kl": {"value": kl}}}

    def published(self):
        pair = lambda a, b: {"format": "q4g32", "a": a, "b": b}
        return {"runs": [self.run_of(method, seed, "old") for method in ("gptq", "best") for seed in range(3)]
                + [self.run_of("rtn-q4_0", commit="old"), self.run_of("AutoRound", commit="old")],
                "estimates": {"teacher": {"manual": [self.entry("rtn-q4_0", 0.03), self.entry("gptq", 0.015),
                                                     self.entry("best", 0.005), self.entry("AutoRound", 0.016)]}},
                "differences": {"teacher": {"manual": [pair("best", "gptq"), pair("best", "rtn-q4_0"),
                                                       pair("AutoRound", "best")]}}}

    def test_rows_that_were_not_measured_stay(self):
        runs = [self.run_of("gptq", seed) for seed in range(3)] + [self.run_of("best"), self.run_of("rtn-q4_0")]
        kept = report.Kept(self.published(), runs, self.BASE)
        # Of best only one seed of three is new: the published row stays.
        self.assertEqual([run["method"] for run in kept.new], ["gptq"] * 3 + ["rtn-q4_0"])
        self.assertEqual([run["method"] for run in kept.runs], ["best"] * 3 + ["AutoRound"])
        self.assertEqual({run["commit"] for run in kept.runs}, {"old"})
        entries = kept.entries("teacher", "manual", [self.entry("gptq", 0.014), self.entry("rtn-q4_0", 0.03)])
        self.assertEqual([(e["method"], e["metrics"]["kl"]["value"]) for e in entries],
                         [("rtn-q4_0", 0.03), ("gptq", 0.014), ("best", 0.005), ("AutoRound", 0.016)])
        # Only differences between two kept rows are as they were.
        self.assertEqual([(p["a"], p["b"]) for p in kept.pairs("teacher", "manual")], [("AutoRound", "best")])

    def test_rows_of_another_baseline_or_text_are_not_mixed(self):
        kept = report.Kept(self.published(), [self.run_of("rtn-q4_0")], self.BASE)
        kept.entries("teacher", "manual", [self.entry("rtn-q4_0", 0.0301)])
        for entry in (self.entry("rtn-q4_0", 0.031), self.entry("rtn-q4_0", 0.03) | {"predictions": 11}):
            with self.assertRaisesRegex(SystemExit, "rows cannot be kept"):
                kept.entries("teacher", "manual", [entry])

    def scored(self, method, scale, commit):
        document = [d for d in range(12) for _ in range(30)]
        kl = [scale * (1 + (i * 7919 % 101) / 100) for i in range(len(document))]
        units = run_of(kl, document, [0.1 * k for k in kl])
        scores = {"mean_kl": {"value": sum(kl) / len(kl)}, "p999_kl": max(kl), "max_kl": max(kl), "units": units,
                  "perplexity": {"value": 9.0}, "perplexity_original": {"value": 8.0}, "predictions": len(kl)}
        return self.run_of(method, commit=commit) | {"bits_per_weight": 5.7, "bits_per_block_linear_weight": 4.5,
                                                     "machine": "M", "tests": {"manual": scores}}

    def test_results_are_written_with_what_is_kept(self):
        meta = {"command": "C", "commit": "c", "machine": "M", "resamples": 20, "samples": 64, "act": "float", "not run": []}
        there = {"folder": "F", "domain": ["manual"], "absent": {text: "?" for text in ("novels", "stories", "wikitext")}}
        gone = {"folder": "F", "domain": ["manual"], "absent": {"model": "?"}}
        with tempfile.TemporaryDirectory() as folder:
            out = pathlib.Path(folder)
            read = lambda name: json.loads((out / name).read_text())
            write = lambda runs, model, old: report.write(out, runs, {"teacher": model}, [], self.BASE, meta, old)
            write([self.scored(*row, "old") for row in (("rtn-q4_0", 0.3), ("gptq", 0.2), ("best", 0.1))], there, None)
            old, old_table = read("accuracy.json"), read("accuracy_teacher_manual.json")
            # The model is absent on a machine that adds to the results: nothing changes.
            write([], gone, old)
            self.assertEqual(read("accuracy.json"), old)
            self.assertEqual(read("accuracy_teacher_manual.json"), old_table)
            write([self.scored("rtn-q4_0", 0.3, "new"), self.scored("gptq", 0.15, "new")], there, old)
            raw, table = read("accuracy.json"), read("accuracy_teacher_manual.json")
            self.assertEqual(table["table"][0][1:], old_table["table"][0][1:])
            self.assertEqual(table["table"][2], old_table["table"][2])
            self.assertNotEqual(table["table"][1], old_table["table"][1])
            self.assertEqual(table["commit"], "new, old")
            self.assertEqual({(p["a"], p["b"]) for p in raw["differences"]["teacher"]["manual"]},
                             {("gptq", "rtn-q4_0"), ("rtn-q4_0", "gptq")})
            self.assertEqual({run["method"]: run["commit"] for run in raw["runs"]},
                             {"rtn-q4_0": "new", "gptq": "new", "best": "old"})
            with self.assertRaisesRegex(SystemExit, "rows cannot be kept"):  # nothing to count gaps from
                write([self.scored("gptq", 0.15, "new")], there, old)
        self.assertEqual(report.settings_differ(old, meta | {"samples": 32}), ["samples 64 there, 32 here"])
        self.assertEqual(report.settings_differ(old, meta), [])

    def test_nothing_published_is_nothing_kept(self):
        kept = report.Kept({}, [self.run_of("gptq")], self.BASE)
        self.assertEqual((len(kept.new), kept.runs, kept.pairs("teacher", "manual")), (1, [], []))


class Plots(unittest.TestCase):
    def test_ticks_are_round_and_inside(self):
        for low, high in ((0, 0.041), (4.1, 6.3), (0, 900.0)):
            found = plots.ticks(low, high)
            self.assertTrue(3 <= len(found) <= 8, found)
            self.assertTrue(low <= found[0] and found[-1] <= high * (1 + 1e-9))


if __name__ == "__main__":
    unittest.main()
