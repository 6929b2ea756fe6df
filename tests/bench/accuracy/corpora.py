"""Calibration, tuning and test text, disjoint by construction and checked line by line.

Documents are shared out by a checksum of their name (files) or of their text (stories), so that the parts do not depend
on the machine or on the order of a folder. A document longer than EXCERPT characters is cut at ends of paragraphs; the
pieces are the units that figures are resampled over. Novels: excerpts evenly spaced through each held-out book.
"""
import json
import pathlib
import subprocess
import zlib

EXCERPT = 4000        # characters, roughly 1,000 to 1,600 tokens
LINE = 80             # a line of this length in two parts means that they overlap


class Absent(Exception):
    """A text that is not on this machine; the message says what was looked for."""


def checksum(text):
    return zlib.crc32(text.encode())


def excerpts(text, size=EXCERPT):
    """Cuts at blank lines, at line ends where a paragraph is longer than `size`; the pieces join to the text again."""
    pieces, at = [], 0
    while at < len(text):
        end = at + size
        if len(text) - at > size * 3 // 2:
            for mark in ("\n\n", "\n", " "):
                found = text.rfind(mark, at + size // 2, end)
                if found >= 0:
                    end = found + len(mark)
                    break
        else:
            end = len(text)
        pieces.append(text[at:end])
        at = end
    return pieces


def spread(items, budget):
    """Items evenly spaced through the list, whole ones, `budget` characters of them at most (at least one)."""
    total = sum(map(len, items))
    if total <= budget:
        return list(items)
    chosen, credit = [], 0.0
    for item in items:
        credit += len(item) * budget / total
        if credit >= len(item) or (not chosen and item is items[-1]):
            chosen.append(item)
            credit -= len(item)
    return chosen


def read(path):
    return path.read_text(encoding="utf-8", errors="replace")


def files(folder):
    found = sorted(folder.glob("*.txt")) if folder.is_dir() else []
    if not found:
        raise Absent(f"{folder}: no .txt files")
    return found


def pages(paths):
    return [piece for path in paths for piece in excerpts(read(path)) if piece.strip()]


class Sources:
    """Where text comes from: the folder made by examples/teacher/make_text.sh, and the shared texts."""

    def __init__(self, root, teacher_text, work):
        self.root, self.work, self.given = root, work, teacher_text
        self.shared = root / ".." / "shared" / "data" / "text"

    def teacher_text(self):
        if self.given:
            if not (self.given / "manual").is_dir():
                raise Absent(f"{self.given}: no folder manual, which make_text.sh makes")
            return self.given
        out = self.work / "teacher_text"
        if not out.is_dir():
            script = self.root / "examples/teacher/make_text.sh"
            novels = self.shared / "novels"
            done = subprocess.run(["sh", str(script), str(out)] + ([str(novels)] if novels.is_dir() else []),
                                  capture_output=True, text=True)
            if done.returncode != 0:
                raise Absent(f"make_text.sh: {done.stderr.strip()[-200:]}")
        return out

    def stories(self):
        path = self.shared / "tinystories_sample.txt"
        if not path.is_file():
            raise Absent("tinystories_sample.txt: not on this machine")
        return [story.strip() for story in read(path).split("<|endoftext|>") if story.strip()]

    def wikitext(self):
        path = self.shared / "wikitext2_test.raw"
        if not path.is_file():
            raise Absent("wikitext2_test.raw: not on this machine")
        return excerpts(read(path))


def books(paths, budget):
    """The same number of characters of every book."""
    return [piece for path in paths for piece in spread(excerpts(read(path))[1:-1], budget // len(paths))]


def share(items, low, high):
    return [item for item in items if low <= checksum(item if isinstance(item, str) else item.name) % 100 < high]


def test_text(name, sources, budget):
    if name == "manual":
        return spread(pages(files(sources.teacher_text() / "manual_held_out")), budget)
    if name == "novels":
        return books(files(sources.teacher_text() / "novels_held_out"), budget)
    if name == "stories":
        return spread(share(sources.stories(), 75, 100), budget)
    if name == "wikitext":
        return spread(sources.wikitext(), budget)
    raise ValueError(name)


def training_text(corpus, sources, calibration_budget, tuning_budget):
    """(calibration, tuning) documents. Manual and novels: half and half in calibration, a quarter manual in tuning."""
    if corpus == "stories":
        stories = sources.stories()
        return spread(share(stories, 0, 30), calibration_budget), spread(share(stories, 30, 75), tuning_budget)
    if corpus == "manual and novels":
        manual, novels = files(sources.teacher_text() / "manual"), files(sources.teacher_text() / "novels")
        calibration = (spread(pages(share(manual, 0, 30)), calibration_budget // 2)
                       + books(share(novels, 0, 30), calibration_budget // 2))
        tuning = (spread(pages(share(manual, 30, 100)), tuning_budget // 2)
                  + books(share(novels, 30, 100), tuning_budget // 2))
        return calibration, tuning
    raise ValueError(corpus)


def long_lines(documents):
    return {line.strip() for text in documents for line in text.split("\n") if len(line.strip()) >= LINE}


class Corpus:
    """The files of one model: calibration, tuning and tests, each a .jsonl with one document per line.

    `absent` names what is missing and why. `overlap`: for every test the number of its documents that were left out
    because a line of LINE characters or more stands in calibration or tuning text too (boilerplate of the manual).
    """

    def __init__(self, corpus, tests, sources, folder, budgets):
        self.absent, self.tests, self.overlap, self.documents = {}, {}, {}, {}
        self.calibration = self.tuning = None
        folder.mkdir(parents=True, exist_ok=True)
        try:
            calibration, tuning = training_text(corpus, sources, budgets["calibration"], budgets["tuning"])
        except Absent as error:
            self.absent["calibration"] = str(error)
            return
        seen_in_calibration = long_lines(calibration)
        tuning = [text for text in tuning if not long_lines([text]) & seen_in_calibration]
        seen = seen_in_calibration | long_lines(tuning)
        self.calibration = self.write(folder / "calibration.jsonl", calibration)
        self.tuning = self.write(folder / "tuning.jsonl", tuning)
        for name in tests:
            try:
                documents = test_text(name, sources, budgets["test"])
            except Absent as error:
                self.absent[name] = str(error)
                continue
            clean = [text for text in documents if not long_lines([text]) & seen]
            if not clean:
                self.absent[name] = "every document shares a line with calibration or tuning text"
                continue
            self.overlap[name] = len(documents) - len(clean)
            self.tests[name] = self.write(folder / f"test-{name}.jsonl", clean)

    def write(self, path, documents):
        text = "".join(json.dumps({"text": document}) + "\n" for document in documents)
        if not path.is_file() or path.read_text() != text:
            path.write_text(text)
        self.documents[path.stem.removeprefix("test-")] = len(documents)
        return path
