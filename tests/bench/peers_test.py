#!/usr/bin/env python3
"""runtime_peers.py --pool: all rounds of the runs, medians of what was side by side, and no runs that do not belong
together. Standard library only."""
import copy
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import unittest

HERE = pathlib.Path(__file__).resolve().parent
COMMITTED = HERE / "results" / "runtime_peers_amx.json"


class Pool(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.TemporaryDirectory()
        self.addCleanup(self.folder.cleanup)
        self.whole = json.loads(COMMITTED.read_text())
        self.parts = []
        for own in (slice(0, 2), slice(2, None)):
            part = copy.deepcopy(self.whole)
            for case in part["cases"]:
                for samples in case["samples"].values():
                    for what in samples:
                        samples[what] = samples[what][own]
                for group in (case["stolen"], case["shares"]):
                    for what in group:
                        group[what] = group[what][own]
            self.parts.append(part)

    def path(self, name):
        return pathlib.Path(self.folder.name, name)

    def pool(self):
        for number, part in enumerate(self.parts):
            self.path(f"{number}.json").write_text(json.dumps(part))
        return subprocess.run([sys.executable, "-B", HERE / "runtime_peers.py", "--pool", self.path("0.json"),
                               self.path("1.json"), "--out", self.path("out.json")], capture_output=True, text=True)

    def refused(self, *words):
        told = self.pool()
        self.assertNotEqual(told.returncode, 0)
        for word in ("1.json", *words):
            self.assertIn(word, told.stderr)
        self.assertFalse(self.path("out.json").exists())

    def test_halves_of_a_run_are_the_run(self):
        told = self.pool()
        self.assertEqual(told.returncode, 0, told.stderr)
        out = json.loads(self.path("out.json").read_text())
        self.assertEqual(out["columns"], self.whole["columns"])
        self.assertEqual(out["table"], self.whole["table"])
        self.assertEqual(out["rounds"], max(len(c["samples"]["pare"]["decode"]) for c in self.whole["cases"]))
        for got, want in zip(out["cases"], self.whole["cases"], strict=True):
            self.assertEqual(got["samples"], want["samples"])
            self.assertEqual(got["stolen"], want["stolen"])
            for name in ("llama", "ik"):
                side_by_side = [a / b for a, b in zip(got["samples"]["pare"]["decode"], got["samples"][name]["decode"])]
                self.assertEqual(got[name]["ratio"]["decode"], statistics.median(side_by_side))

    def test_a_case_of_one_run_alone_stays(self):
        del self.parts[1]["cases"][1:]
        self.assertEqual(self.pool().returncode, 0)
        out = json.loads(self.path("out.json").read_text())
        self.assertEqual(len(out["cases"]), len(self.whole["cases"]))
        self.assertEqual(out["cases"][1]["samples"], self.parts[0]["cases"][1]["samples"])

    def test_other_settings_are_refused(self):
        self.parts[1]["prompt"] += 1
        self.refused("prompt")

    def test_other_programs_are_refused(self):
        del self.parts[1]["cases"][0]["samples"]["ik"]
        self.refused("programs")

    def test_other_kernels_are_refused(self):
        self.parts[1]["cases"][0]["kernels"] = "avx2"
        self.refused("kernels")


if __name__ == "__main__":
    unittest.main()
