#!/usr/bin/env python3
"""Writes the tables of README.md from tests/bench/results/*.json (the test Readme.TablesEqualTheCommittedResults checks them)."""
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


readme = root / "README.md"
readme.write_text(re.sub(r"<!-- table: (\S+) -->\n.*?<!-- end -->", table, readme.read_text(), flags=re.S))
