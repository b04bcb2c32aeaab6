"""`llava model list`: published models by name, and those found here: the newest quickstart's and runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from llava.errors import LlavaError

RUNS = Path("runs")


def list_models(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Name models that open here: those in this folder (llava-quickstart, runs/*) and published ones.

    Published ones are opened by their hub id, with the options under "needs"; nothing is downloaded by this.
    """
    from llava.checkpoint.known_models import KNOWN_MODELS, SOURCES

    found = find_local()
    if as_json:
        print(json.dumps({"here": found, "known": [asdict(model) for model in KNOWN_MODELS], "sources": SOURCES}))
        return
    from rich.console import Console

    # Wide enough for every row: a name that is broken over two lines cannot be copied.
    console = Console(width=None if Console().is_terminal else 200, highlight=False)
    rows = [(one["path"], one["size"], one["template"], one["image_mode"], one["layout"], "") for one in found]
    if rows:
        console.print(_table("here", rows))
    else:
        console.print("here: none; `llava quickstart` makes one in minutes\n")
    for source, page in SOURCES.items():
        rows = [
            (model.name, model.size, model.template, model.image_mode, model.language_model, model.needs)
            for model in KNOWN_MODELS
            if model.source == source
        ]
        note = "" if all(m.hub for m in KNOWN_MODELS if m.source == source) else "; fetched there, opened as a folder"
        console.print(_table(f"{source}: {page}{note}", rows))


def find_local() -> list[dict[str, Any]]:
    """Models in this folder, newest first; folders that cannot be understood are left out."""
    from llava.quickstart.latest import find_latest

    latest = find_latest()
    folders = [] if latest is None else [latest]
    if RUNS.is_dir():
        runs = [path for path in RUNS.iterdir() if path.is_dir()]
        folders += sorted(runs, key=lambda path: path.stat().st_mtime, reverse=True)
    return [about for folder in folders if (about := _describe(folder)) is not None]


def _describe(folder: Path) -> dict[str, Any] | None:
    from llava.checkpoint.load import open_checkpoint

    try:
        opened = open_checkpoint(folder)
    except LlavaError:
        return None  # a run without a model yet, or one whose base is elsewhere
    count = sum(_product(source.shape) for source in opened.tensors.values())
    return {
        "path": str(folder),
        "layout": opened.format,
        "size": f"{count / 1e9:.1f}B" if count >= 1e8 else f"{count / 1e6:.1f}M",
        "template": opened.config.template,
        "image_mode": opened.config.image_mode,
    }


def _product(shape: tuple[int, ...]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count


def _table(title: str, rows: Sequence[tuple[str, ...]]) -> Any:
    from rich.table import Table

    table = Table("model", "size", "template", "pictures", "of", "needs", title=title, title_justify="left", box=None)
    table.columns[0].no_wrap = True
    table.columns[0].overflow = "fold"
    for row in rows:
        table.add_row(*row)
    return table
