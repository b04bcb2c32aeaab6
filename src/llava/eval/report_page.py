"""The report's page: one HTML file with everything in it, wrong answers with their pictures among it."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from llava.errors import ImageError
from llava.eval.figures import interval_text, number, provenance_lines, published_models
from llava.eval.radar import radar
from llava.eval.result import Result, Row
from llava.prompt.decoding import decode_image

WRONG_SHOWN = 12
LONG_TABLE, MAX_TABLE = 32, 300
_THUMBNAIL = 240
_LONGEST_TEXT = 600


def page(found: Sequence[tuple[Result, Sequence[Row]]], model: str) -> str:
    """The whole page. found: each benchmark's result and rows."""
    results = [result for result, _ in found]
    parts = [
        f"<h1>{escape(model)}</h1>",
        f"<p class=soft>{len(results)} benchmarks; figures by each one's official rule unless it says strict. "
        "Intervals: 95 %, bootstrap over pictures.</p>",
        _summary(results),
        _radar(results, model),
        *(_section(result, rows) for result, rows in found),
    ]
    return frame(f"{model}: benchmarks", "\n".join(parts))


def frame(title: str, body: str) -> str:
    """A page of the house's look around a body."""
    text = (resources.files("llava") / "eval" / "page.html").read_text(encoding="utf-8")
    return text.replace("{{title}}", html.escape(title)).replace("{{body}}", body)


def escape(value: Any) -> str:
    """Text of the page; long texts are cut."""
    text = str(value)
    return html.escape(text if len(text) <= _LONGEST_TEXT else text[: _LONGEST_TEXT - 3] + "...")


def thumbnail(path: str) -> str:
    """An <img> with the picture in it, or a word that it is not there."""
    try:
        picture = decode_image(Path(path))
    except (ImageError, OSError):
        return f"<p class=soft>{escape(Path(path).name)} cannot be read</p>"
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(Path(path).name)}" src="data:image/jpeg;base64,{data}">'


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows by column; numbers to the right."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join("<tr>" + "".join(_cell(row.get(column)) for column in columns) + "</tr>" for row in rows)
    return f"<div class=wide><table><tr>{head}</tr>{body}</table></div>"


def _cell(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"<td>{'' if value is None else escape(value)}</td>"
    return f"<td class=number>{number(value) if isinstance(value, float) else f'{value:,}'}</td>"


def _summary(results: Sequence[Result]) -> str:
    published = published_models(results)
    head = "".join(f"<th>{escape(name)}</th>" for name in ["benchmark", "figure", "", "95 %", "rows", *published])
    lines = []
    for result in results:
        for name, value in result.headline.items():
            first = name == result.published_metric
            cells = [
                f'<td><a href="#{escape(result.task)}">{escape(result.title)}</a></td><td>{escape(name)}</td>',
                f'<td class="number figure">{number(value)}</td>',
                f"<td>{interval_text(result) if first else ''}</td>",
                f"<td class=number>{result.provenance['rows']:,}</td>",
                *(f"<td class=number>{number(result.published.get(m)) if first else ''}</td>" for m in published),
            ]
            lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<div class=wide><table><tr>{head}</tr>{''.join(lines)}</table></div>"


def _radar(results: Sequence[Result], model: str) -> str:
    axes = [result.task for result in results if result.figure is not None]
    series: dict[str, dict[str, float]] = {model: {r.task: r.figure for r in results if r.figure is not None}}
    for result in results:
        for name, value in result.published.items():
            series.setdefault(name, {})[result.task] = value
    # alone, a model is its own best on every axis: a regular polygon that says nothing
    drawn = radar(axes, series) if len(series) > 1 else ""
    if not drawn:
        return ""
    said = "From the centre, 0, to just over the best figure of each benchmark. Points show figures when pointed at."
    return f"<figure>{drawn}<figcaption>{said}</figcaption></figure>"


def _section(result: Result, rows: Sequence[Row]) -> str:
    notes = "".join(f"<li>{escape(note)}</li>" for note in result.notes)
    made = "".join(f"<dt>{escape(name)}</dt><dd><code>{escape(text)}</code></dd>"
                   for name, text in provenance_lines(result.provenance))  # fmt: skip
    parts = [
        f'<h2 id="{escape(result.task)}">{escape(result.title)}</h2>',
        f"<ul>{notes}</ul>" if notes else "",
        *(_named_table(name, lines) for name, lines in result.tables.items() if lines),
        f"<details><summary>As the official tool prints it</summary><pre>{html.escape(result.printed)}</pre></details>"
        if result.printed
        else "",
        _wrong(rows),
        f"<details><summary>What made these figures</summary><dl>{made}</dl></details>",
    ]
    return "\n".join(part for part in parts if part)


def _named_table(name: str, lines: Sequence[Mapping[str, Any]]) -> str:
    """A short table as it is, a long one folded, a very long one cut."""
    if len(lines) <= LONG_TABLE:
        return f"<h3>{escape(name)}</h3>{table(lines)}"
    cut = "" if len(lines) <= MAX_TABLE else f"; the first {MAX_TABLE}, the rest is in result.json"
    head = f"<summary>{escape(name)}: {len(lines):,} rows{cut}</summary>"
    return f"<details>{head}{table(lines[:MAX_TABLE])}</details>"


def _wrong(rows: Sequence[Row]) -> str:
    judged = [row for row in rows if row.correct is not None]
    wrong = [row for row in judged if row.correct is not None and row.correct < 1.0]
    if not wrong:
        return ""
    shown = spread(sorted(wrong, key=lambda row: row.correct or 0.0)[: max(len(wrong) // 2, WRONG_SHOWN)])
    cards = "".join(card(row, [("bad", "said", row.text), ("good", "truth", row.reference)]) for row in shown)
    head = f"{len(wrong):,} of {len(judged):,} answers are not fully right; {len(shown)} of them"
    return f"<details><summary>{head}</summary><div class=gallery>{cards}</div></details>"


def spread(rows: Sequence[Row], count: int = WRONG_SHOWN) -> list[Row]:
    """`count` rows from the whole length of a list."""
    if len(rows) <= count:
        return list(rows)
    return [rows[place * len(rows) // count] for place in range(count)]


def card(row: Row, said: Sequence[tuple[str, str, str]]) -> str:
    """A picture, its question and what was said of it: (class, name, text) lines."""
    lines = "".join(f'<p><span class=soft>{escape(name)}</span> <b class="{css}">{escape(text) or "(nothing)"}</b></p>'
                    for css, name, text in said)  # fmt: skip
    pictures = "".join(thumbnail(image) for image in row.images[:1])
    return f"<div class=card>{pictures}<p class=question>{escape(row.prompt)}</p>{lines}</div>"
