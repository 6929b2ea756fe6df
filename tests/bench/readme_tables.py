#!/usr/bin/env python3
"""Writes the tables of README.md and tests/bench/accuracy/README.md from tests/bench/results/*.json.

The test Readme.TablesEqualTheCommittedResults compares them.
"""
import json
import pathlib
import re

root = pathlib.Path(__file__).resolve().parents[2]


def cell(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def table(match):
    result = json.loads((root / match.group(1)).read_text())
    lines = [result["columns"], ["---"] * len(result["columns"])] + [[cell(v) for v in row] for row in result["table"]]
    text = "".join(("| " + " | ".join(line) + " |\n") if line[0] != "---" else "|" + "---|" * len(line) + "\n" for line in lines)
    return f"<!-- table: {match.group(1)} -->\n{text}<!-- end -->"


for name in ("README.md", "tests/bench/accuracy/README.md"):
    readme = root / name
    readme.write_text(re.sub(r"<!-- table: (\S+) -->\n.*?<!-- end -->", table, readme.read_text(), flags=re.S))
