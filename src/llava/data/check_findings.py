"""What a check can find wrong, and the log that keeps every finding on disk.

A data set with a wrong picture folder has one finding a record, so findings are spooled to a temporary file and only
the first few of each kind stay in memory. Every finding names its file, line and record.
"""

from __future__ import annotations

import json
import re
import tempfile
import weakref
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Severity = Literal["error", "warning"]

#: How many findings of each kind are kept in memory, for the terminal and the page.
KEPT = 40


@dataclass(frozen=True)
class Kind:
    """severity: an error is a conversation that a run replaces by one without loss; advice: the way out."""

    severity: Severity
    advice: str


KINDS: dict[str, Kind] = {
    "malformed record": Kind("error", "write it in one of the formats of docs/data.md"),
    "roles": Kind("error", "turns must alternate: human, gpt, human, gpt"),
    "marks and pictures": Kind("error", "one <image> for each picture"),
    "escaping path": Kind("error", "write paths relative to --images, without .. and without links that leave it"),
    "web address": Kind("error", "download the picture, or train with data.allow_urls=true"),
    "missing picture": Kind("error", "fix the path, or give another --images folder"),
    "unreadable picture": Kind("error", "truncated or damaged: fetch it again, or drop the record"),
    "not a picture": Kind("error", "only JPEG, PNG, WebP, GIF and BMP are opened; convert it"),
    "picture too large": Kind("error", "make it smaller: a small file may unpack to gigabytes"),
    "empty answer": Kind("error", "fill the answer, or drop the record"),
    "empty question": Kind("error", "a user turn without words and without a picture: fill it, or drop the record"),
    "nothing to learn": Kind("error", "no supervised token: add an answer, or drop the record"),
    "does not fit the template": Kind("error", "use another template, or mend the record"),
    "too long": Kind("error", "shorten it, raise data.max_tokens, or set data.too_long to drop or truncate"),
    "left out": Kind("warning", "longer than data.max_tokens; a run leaves it out"),
    "cut": Kind("warning", "longer than data.max_tokens; a run keeps its first whole turns"),
    "opens with an answer": Kind("warning", "most templates leave the first answer out"),
    "ends with a question": Kind("warning", "the last turn has no answer, so nothing is learnt from it"),
    "mark in words": Kind(
        "warning", "<image> stands in a text that has no picture for it; it is read as seven characters"
    ),
    "tiny picture": Kind("warning", "fewer than 10 pixels a side; is it a placeholder?"),
    "duplicate": Kind("warning", "the same conversation on the same picture again"),
}

_ORIGIN = re.compile(r"^(?P<file>.*?):(?P<line>\d+)(?: \(record (?P<record>\d+)\))?$", re.DOTALL)

# What the parsers and the picture reader say, to the kind of finding that it is; the first that fits. A test holds it.
_SAID: tuple[tuple[str, str], ...] = (
    (r"picture '(?i:https?)://", "web address"),
    (r"leaves the image folder|outside the image folder", "escaping path"),
    (r"pictures? but \d+ <image>", "marks and pictures"),
    (r"unknown (from|role) |turns must alternate|only the first turn may be", "roles"),
    (r"no such file|does not exist|is not in ", "missing picture"),
    (r"over the limit|longest side may be|pixels are read|pixels; make it smaller|ratio may be", "picture too large"),
    (r"not a JPEG|: empty; convert", "not a picture"),
    (r"damaged|cannot be read|not a regular file|an empty picture|cannot read a", "unreadable picture"),
)


def kind_of(message: str, *, otherwise: str = "malformed record") -> str:
    """The kind of finding that an error's text is about."""
    return next((kind for pattern, kind in _SAID if re.search(pattern, message)), otherwise)


@dataclass(frozen=True)
class Finding:
    """One thing found about one conversation. record: its number in the whole set, counted from 0."""

    kind: str
    record: int
    origin: str
    message: str
    picture: str | None = None

    @property
    def severity(self) -> Severity:
        return KINDS[self.kind].severity

    def as_json(self) -> dict[str, Any]:
        """File, line and record apart, for programs that drop or mend records."""
        place = _ORIGIN.match(self.origin)
        file, line = (place["file"], int(place["line"])) if place else (self.origin, None)
        entry: dict[str, Any] = {
            "severity": self.severity,
            "kind": self.kind,
            "file": file,
            "line": line,
            "record": self.record,
            "origin": self.origin,
            "message": self.message,
        }
        if self.picture is not None:
            entry["picture"] = self.picture
        return entry


class FindingLog:
    """Every finding, on disk; counts and the first few of each kind, in memory."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first: dict[str, list[Finding]] = {}
        self._spool = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the log
        weakref.finalize(self, self._spool.close)
        self._records = array("q")
        self._offsets = array("q")
        self._end = 0

    def __len__(self) -> int:
        return len(self._records)

    def add(self, finding: Finding) -> None:
        self.counts[finding.kind] += 1
        kept = self.first.setdefault(finding.kind, [])
        if len(kept) < KEPT:
            kept.append(finding)
        line = json.dumps(finding.as_json(), ensure_ascii=False).encode(errors="replace") + b"\n"
        self._spool.write(line)
        self._records.append(finding.record)
        self._offsets.append(self._end)
        self._end += len(line)

    @property
    def num_errors(self) -> int:
        return sum(count for kind, count in self.counts.items() if KINDS[kind].severity == "error")

    @property
    def num_warnings(self) -> int:
        return len(self) - self.num_errors

    def by_kind(self) -> list[tuple[str, int]]:
        """(kind, count): errors before warnings, in the order of KINDS."""
        return [(kind, self.counts[kind]) for kind in KINDS if self.counts[kind]]

    def lines(self) -> Iterator[str]:
        """Every finding as one line of JSON, in the order of the records."""
        self._spool.flush()
        order = sorted(range(len(self._records)), key=lambda i: (self._records[i], i))
        for place in order:
            self._spool.seek(self._offsets[place])
            yield self._spool.readline().decode().rstrip("\n")
        self._spool.seek(0, 2)

    def write_json(self, path: Path, summary: Mapping[str, Any]) -> None:
        """One object: the summary's keys, then "findings" with every finding; written beside and moved into place."""
        partial = path.with_name(path.name + ".partial")
        head = json.dumps(dict(summary), indent=1, ensure_ascii=False).removesuffix("\n}")
        with partial.open("w", encoding="utf-8", errors="replace") as file:
            file.write(head + ',\n "findings": [')
            for number, line in enumerate(self.lines()):
                file.write((",\n  " if number else "\n  ") + line)
            file.write("\n ]\n}\n")
        partial.replace(path)
