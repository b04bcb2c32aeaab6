"""Two runs of the same benchmarks side by side: which answers changed, and whether that is more than chance.

Only questions that both were asked in the same words are compared. A difference is called significant below p = .05,
each benchmark for itself: of twenty benchmarks without any difference, one will look like it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llava.errors import DataError
from llava.eval.figures import models_of, number
from llava.eval.intervals import paired_p_value
from llava.eval.report_page import card, escape, frame, spread, table
from llava.eval.result import Result, Row, load_results, load_rows

SIGNIFICANT = 0.05
_SHOWN = 24


@dataclass(frozen=True)
class Comparison:
    """One benchmark of two runs. better, worse: answers whose score rose or fell from the first to the second;
    changed: whose words did. p_value: None where the rule does not judge answers one by one.
    """

    task: str
    title: str
    metric: str
    first: float | None
    second: float | None
    questions: int
    changed: int
    better: int
    worse: int
    p_value: float | None
    notes: tuple[str, ...] = ()

    @property
    def verdict(self) -> str:
        """In words."""
        if self.p_value is None:
            return "no test: answers are not judged one by one"
        if self.p_value >= SIGNIFICANT:
            return f"not significant (p = {self.p_value:.2g})"
        return f"significant (p = {self.p_value:.2g})"


def compare(first: Path, second: Path) -> list[tuple[Comparison, list[tuple[Row, Row]]]]:
    """Every benchmark that both folders hold, with the pairs of rows that changed, those whose score did first.

    Raises DataError when they share none, or where no question is the same.
    """
    ours = {result.task: (result, folder) for result, folder in load_results(first)}
    theirs = {result.task: (result, folder) for result, folder in load_results(second)}
    both = [task for task in ours if task in theirs]
    if not both:
        raise DataError(
            f"{first} has {', '.join(ours)}, {second} has {', '.join(theirs)}: no benchmark is in both; run one on both"
        )
    return [_compare(ours[task], theirs[task]) for task in both]


def write_comparison(first: Path, second: Path, out: Path) -> list[Comparison]:
    """Write comparison.json and comparison.html into `out`; returns what they say."""
    found = compare(first, second)
    names = _names(first, second)
    out.mkdir(parents=True, exist_ok=True)
    comparisons = [comparison for comparison, _ in found]
    record = {"first": str(first), "second": str(second), "tasks": {c.task: asdict(c) for c in comparisons}}
    (out / "comparison.json").write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    parts = [
        f"<h1>{escape(names[0])} against {escape(names[1])}</h1>",
        table([_line(comparison, names) for comparison in comparisons]),
        *(_section(comparison, pairs, names) for comparison, pairs in found),
    ]
    page = frame(f"{names[0]} against {names[1]}", "\n".join(parts))
    (out / "comparison.html").write_text(page, encoding="utf-8")
    return comparisons


def _compare(one: tuple[Result, Path], other: tuple[Result, Path]) -> tuple[Comparison, list[tuple[Row, Row]]]:
    rows = {row.id: row for row in load_rows(one[1])}
    pairs = [
        (rows[row.id], row)
        for row in load_rows(other[1])
        if row.id in rows and rows[row.id].prompt == row.prompt and _names_of(rows[row.id]) == _names_of(row)
    ]
    if not pairs:
        raise DataError(f"{one[1]} and {other[1]}: no question is the same in both; are they of one split?")
    judged = [(a, b, a.correct, b.correct) for a, b in pairs if a.correct is not None and b.correct is not None]
    clusters = [a.images or a.id for a, _, _, _ in judged]
    p_value = paired_p_value([d for *_, d in judged], [c for _, _, c, _ in judged], clusters) if judged else None
    notes = []
    if len(pairs) < max(len(rows), other[0].provenance["rows"]):
        notes.append(f"only {len(pairs):,} questions are the same in both; the figures are of all")
    if one[0].provenance["rule"] != other[0].provenance["rule"]:
        notes.append("one is scored by the strict rule, the other is not")
    changed = [(a, b) for a, b in pairs if a.text != b.text]
    changed.sort(key=lambda pair: -abs((pair[1].correct or 0.0) - (pair[0].correct or 0.0)))
    comparison = Comparison(
        task=one[0].task,
        title=one[0].title,
        metric=one[0].published_metric,
        first=one[0].figure,
        second=other[0].figure,
        questions=len(pairs),
        changed=len(changed),
        better=sum(d > c for _, _, c, d in judged),
        worse=sum(d < c for _, _, c, d in judged),
        p_value=p_value,
        notes=tuple(notes),
    )
    return comparison, changed


def _names_of(row: Row) -> list[str]:
    return [Path(image).name for image in row.images]


def _names(first: Path, second: Path) -> tuple[str, str]:
    """The models' names; the folders' where the models have one name."""
    one, other = (models_of([result for result, _ in load_results(path)]) for path in (first, second))
    return (one, other) if one != other else (str(first), str(second))


def _line(comparison: Comparison, names: tuple[str, str]) -> dict[str, Any]:
    return {
        "benchmark": comparison.title,
        "figure": comparison.metric,
        names[0]: number(comparison.first),
        names[1]: number(comparison.second),
        "questions": comparison.questions,
        "changed": comparison.changed,
        "better": comparison.better,
        "worse": comparison.worse,
        "difference": comparison.verdict,
    }


def _section(comparison: Comparison, pairs: Sequence[tuple[Row, Row]], names: tuple[str, str]) -> str:
    moved = [pair for pair in pairs if pair[0].correct != pair[1].correct] or list(pairs)
    by_id = {pair[1].id: pair for pair in moved}
    cards = []
    for row in spread([pair[1] for pair in moved], _SHOWN):
        before, after = by_id[row.id]
        said = [(_css(before), names[0], before.text), (_css(after), names[1], after.text)]
        cards.append(card(row, [*said, ("", "truth", row.reference)]))
    notes = "".join(f"<li>{escape(note)}</li>" for note in comparison.notes)
    head = f"<h2>{escape(comparison.title)}</h2><ul>{notes}</ul>"
    if not cards:
        return head + "<p>No answer changed.</p>"
    shown = f"<p class=soft>{len(cards)} of {len(pairs):,} changed answers</p>"
    return f"{head}{shown}<div class=gallery>{''.join(cards)}</div>"


def _css(row: Row) -> str:
    if row.correct is None:
        return ""
    return "good" if row.correct >= 1.0 else "bad"
