"""The quickstart's report: one HTML file that opens offline, and the same figures as JSON.

Shows what was learnt (accuracy by kind beside the controls), how (loss curves), on what (twelve pictures with
questions and answers, boxes drawn) and how long it took. No script, no request: pictures are inlined.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from PIL import Image

from llava.data.scene_scores import parse_box
from llava.quickstart.measure import Asked, KindAccuracy, Measurement

KIND_TITLES = {
    "existence": "Is there a ...?",
    "colour": "Which colour?",
    "shape": "Which shape?",
    "size": "Large or small?",
    "count": "How many of a kind?",
    "count_all": "How many in all?",
    "region": "Where?",
    "relation": "Left, right, above, below?",
    "multiple_choice": "Multiple choice",
    "box": "Box of ...",
    "refer": "What is in this box?",
    "caption": "Caption",
    "detail": "Detailed caption",
}


@dataclass(frozen=True)
class ReportContents:
    """Everything the page shows. loss_plots: (title, SVG text) of each stage; seconds: by phase, in order."""

    accuracy: Mapping[str, KindAccuracy]
    measurement: Measurement
    loss_plots: Sequence[tuple[str, str]]
    seconds: Mapping[str, float]
    facts: Mapping[str, str]
    next_commands: Sequence[tuple[str, str]]


def report_as_json(contents: ReportContents) -> dict[str, object]:
    """The figures of the page: accuracy by kind with its controls, questions asked, seconds by phase, facts."""
    return {
        "accuracy": {
            kind: {
                "model": round(row.model, 4),
                "wrong_picture": round(row.wrong_picture, 4),
                "no_binding": None if row.no_binding is None else round(row.no_binding, 4),
                "majority": round(row.majority, 4),
            }
            for kind, row in contents.accuracy.items()
        },
        "questions": {kind: row.questions for kind, row in contents.accuracy.items()},
        "seconds": {phase: round(value, 1) for phase, value in contents.seconds.items()},
        "facts": dict(contents.facts),
    }


def write_page(path: Path, contents: ReportContents) -> None:
    """Write the page as one self-contained HTML file."""
    asked = contents.measurement.asked
    right = sum(one.score for one in asked)
    parts = [
        "<h1>A LLaVA that learnt to see</h1>",
        f"<p class=lead>It answers {right / len(asked):.0%} of {len(asked):,} questions about "
        f"{len(contents.measurement.scenes):,} pictures that it never saw in training. "
        "The marks show what a model would score without seeing, or without knowing which colour belongs to which "
        "shape.</p>",
        "<h2>Accuracy by kind of question</h2>",
        _bars(contents.accuracy),
        _table(contents.accuracy),
        "<h2>Twelve held-out pictures</h2>",
        "<p>Solid box: the model's answer. Dashed box: the truth.</p>",
        _gallery(contents.measurement),
        "<h2>Loss</h2>",
        "<div class=plots>"
        + "".join(
            f"<figure>{svg}<figcaption>{html.escape(title)}</figcaption></figure>" for title, svg in contents.loss_plots
        )
        + "</div>",
        "<h2>Time</h2>",
        _times(contents.seconds),
        "<h2>What next</h2>",
        "<dl>"
        + "".join(
            f"<dt>{html.escape(what)}</dt><dd><code>{html.escape(command)}</code></dd>"
            for what, command in contents.next_commands
        )
        + "</dl>",
        "<h2>How it was made</h2>",
        "<dl>"
        + "".join(
            f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in contents.facts.items()
        )
        + "</dl>",
    ]
    frame = (resources.files("llava") / "quickstart" / "page.html").read_text(encoding="utf-8")
    page = frame.replace("{{body}}", "\n".join(parts))
    path.write_text(page, encoding="utf-8")


def _bars(accuracy: Mapping[str, KindAccuracy]) -> str:
    """A horizontal bar a kind, with a mark for each control (SVG, 720 wide)."""
    left, width, row = 190, 440, 26
    height = row * len(accuracy) + 46
    parts = [
        f'<svg viewBox="0 0 720 {height}" role="img" aria-label="accuracy by kind beside three controls">',
        *(
            f'<line class="grid" x1="{left + width * x / 4}" y1="4" x2="{left + width * x / 4}" y2="{height - 40}"/>'
            f'<text class="axis" x="{left + width * x / 4}" y="{height - 26}" text-anchor="middle">{x * 25} %</text>'
            for x in range(5)
        ),
    ]
    for index, (kind, one) in enumerate(accuracy.items()):
        y = 6 + index * row
        marks = [("wrong", one.wrong_picture), ("majority", one.majority)]
        if one.no_binding is not None:
            marks.append(("binding", one.no_binding))
        parts.append(
            f'<text class="label" x="{left - 10}" y="{y + 13}" text-anchor="end">'
            f"{html.escape(KIND_TITLES[kind])}</text>"
            f'<rect class="bar" x="{left}" y="{y + 2}" width="{max(1.0, width * one.model):.1f}" height="15" rx="2">'
            f"<title>{kind}: {one.model:.3f} of {one.questions}</title></rect>"
            f'<text class="value" x="{left + width + 12}" y="{y + 14}">{one.model:.1%}</text>'
            + "".join(_mark(name, left + width * value, y, f"{name}: {value:.3f}") for name, value in marks)
        )
    legend = [("wrong", "wrong picture"), ("majority", "majority answer"), ("binding", "no binding")]
    for index, (name, title) in enumerate(legend):
        x = left + index * 150
        parts.append(
            _mark(name, x + 4, height - 18, title) + f'<text class="axis" x="{x + 14}" y="{height - 5}">{title}</text>'
        )
    return "".join(parts) + "</svg>"


def _mark(name: str, x: float, y: float, title: str) -> str:
    """A control's mark: another form for each, so that the figure reads without colour."""
    if name == "wrong":
        form = f'<circle class="{name}" cx="{x:.1f}" cy="{y + 9.5}" r="4.5">'
        return f"{form}<title>{title}</title></circle>"
    if name == "majority":
        form = f'<rect class="{name}" x="{x - 4:.1f}" y="{y + 5.5}" width="8" height="8">'
        return f"{form}<title>{title}</title></rect>"
    points = f"{x:.1f},{y + 4} {x + 5.5:.1f},{y + 9.5} {x:.1f},{y + 15} {x - 5.5:.1f},{y + 9.5}"
    return f'<polygon class="{name}" points="{points}"><title>{title}</title></polygon>'


def _table(accuracy: Mapping[str, KindAccuracy]) -> str:
    rows = "".join(
        f"<tr><th>{html.escape(kind)}</th><td><b>{one.model:.3f}</b></td><td>{one.wrong_picture:.3f}</td>"
        f"<td>{'' if one.no_binding is None else f'{one.no_binding:.3f}'}</td><td>{one.majority:.3f}</td>"
        f"<td>{one.questions}</td></tr>"
        for kind, one in accuracy.items()
    )
    return (
        "<details><summary>The same as numbers</summary><table><tr><th>kind</th><th>model</th><th>wrong picture</th>"
        f"<th>no binding</th><th>majority</th><th>questions</th></tr>{rows}</table></details>"
    )


def _gallery(measurement: Measurement, *, pictures: int = 12) -> str:
    """The first pictures, each with every question that was asked about it."""
    cards = []
    for index in range(min(pictures, len(measurement.scenes))):
        asked = [one for one in measurement.asked if one.scene == index]
        drawn = "".join(_drawn_boxes(one) for one in asked if one.turn.kind == "box")
        rows = "".join(_answer_row(one) for one in asked)
        cards.append(
            f'<div class=card><div class=picture><img alt="a drawn scene" '
            f'src="{_data_url(measurement.pictures[index])}"><svg viewBox="0 0 1 1">{drawn}</svg></div>'
            f"<table>{rows}</table></div>"
        )
    return f"<div class=gallery>{''.join(cards)}</div>"


def _answer_row(one: Asked) -> str:
    good = one.score >= 0.999
    sign = "<td class=good>✓</td>" if good else f"<td class=bad>{'✗' if one.score == 0 else f'{one.score:.2f}'}</td>"
    truth = "" if good else f"<br><span class=truth>truth: {html.escape(one.turn.answer)}</span>"
    said = html.escape(one.answer) or "(nothing)"
    return f"<tr>{sign}<td>{html.escape(one.turn.question)}<br><b>{said}</b>{truth}</td></tr>"


def _drawn_boxes(one: Asked) -> str:
    parts = []
    for name, text in (("truth-box", one.turn.answer), ("model-box", one.answer)):
        box = parse_box(text)
        if box is not None:
            x1, y1, x2, y2 = box
            size = f'width="{max(0.0, x2 - x1):.3f}" height="{max(0.0, y2 - y1):.3f}"'
            parts.append(f'<rect class="{name}" x="{x1}" y="{y1}" {size}/>')
    return "".join(parts)


def _times(seconds: Mapping[str, float]) -> str:
    total = sum(seconds.values())
    rows = "".join(
        f"<tr><th>{html.escape(phase)}</th><td>{value:.1f} s</td>"
        f'<td class=wide><div class=share style="width:{100 * value / max(total, 1e-9):.1f}%"></div></td></tr>'
        for phase, value in seconds.items()
    )
    return f"<table class=times>{rows}<tr><th>all</th><td><b>{total:.1f} s</b></td><td></td></tr></table>"


def _data_url(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
