"""The report of all benchmarks in a folder: report.json, report.md and report.html, from what `result.py` kept.

Running one more benchmark into the folder adds it to the report. The page opens offline: no script, no request.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from llava.eval.figures import interval_text, models_of, number, provenance_lines, published_models
from llava.eval.report_page import MAX_TABLE, page
from llava.eval.result import Result, load_results, load_rows

_JSON, _MARKDOWN, _PAGE = "report.json", "report.md", "report.html"


def write_report(out: Path) -> list[Path]:
    """Write the three files from the results under `out`; returns where they are. Raises DataError without results."""
    found = load_results(out)
    results = [result for result, _ in found]
    record = {"model": models_of(results), "tasks": {result.task: asdict(result) for result in results}}
    texts = {
        _JSON: json.dumps(record, ensure_ascii=False, indent=1) + "\n",
        _MARKDOWN: markdown(results),
        _PAGE: page([(result, load_rows(folder)) for result, folder in found], models_of(results)),
    }
    written = []
    for name, text in texts.items():
        draft = out / (name + ".part")
        draft.write_text(text, encoding="utf-8")
        written.append(draft.replace(out / name))
    return written


def markdown(results: Sequence[Result]) -> str:
    """Figures beside the published ones, tables and notes, and what made each figure."""
    published = published_models(results)
    head = ["benchmark", "figure", "", "95 %", "rows", *published]
    rows = []
    for result in results:
        for name, value in result.headline.items():
            first = name == result.published_metric
            beside = [number(result.published.get(model)) if first else "" for model in published]
            rows.append(
                [result.title, name, number(value), interval_text(result) if first else "",
                 f"{result.provenance['rows']:,}", *beside]
            )  # fmt: skip
    parts = [f"# {models_of(results)}", "", *_table(head, rows)]
    for result in results:
        parts += ["", f"## {result.title}", ""]
        parts += [f"- {note}" for note in result.notes]
        if result.printed:
            parts += ["", "```", result.printed, "```"]
        for name, table in result.tables.items():
            if 0 < len(table) <= MAX_TABLE:
                columns = list(dict.fromkeys(key for row in table for key in row))
                cells = [[_cell(row.get(column)) for column in columns] for row in table]
                parts += ["", f"### {name}", "", *_table(columns, cells)]
        parts += ["", "Made by:", "", *(f"- {name}: `{text}`" for name, text in provenance_lines(result.provenance))]
    return "\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [_line(head), _line(["---"] * len(head)), *(_line(row) for row in rows)]


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(" ".join(str(cell).split()).replace("|", "\\|") for cell in cells) + " |"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return number(value)
    return "" if value is None else str(value)
