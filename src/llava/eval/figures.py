"""How figures, and what made them, are written in tables and on pages."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from llava.eval.result import Result


def models_of(results: Sequence[Result]) -> str:
    """The model that was measured, or all where the folder has several."""
    names = dict.fromkeys(str(result.provenance.get("model") or "answers of a file") for result in results)
    return ", ".join(names)


def published_models(results: Sequence[Result]) -> list[str]:
    """Every model that has a published figure for one of these benchmarks, in the order of the first that names it."""
    return list(dict.fromkeys(model for result in results for model in result.published))


def provenance_lines(provenance: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What made a figure, a (name, text) line each; what is not known is left out."""
    lines = []
    for name, value in provenance.items():
        if name == "files":
            lines += [(file["path"], _file_text(file)) for file in value if "sha256" in file]
        elif value is not None:
            text = json.dumps(value, ensure_ascii=False) if isinstance(value, Mapping | list) else str(value)
            lines.append((name.replace("_", " "), " ".join(text.split()).replace("`", "'")))
    return lines


def number(value: float | None) -> str:
    """A figure for a table: at most four digits behind the point, none where it has none."""
    if value is None:
        return ""
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if value == int(value) and abs(value) >= 100 else f"{value:,.4f}".rstrip("0").rstrip(".")


def interval_text(result: Result) -> str:
    """ "71.2 to 74.9", with as many digits as the width is worth."""
    if result.interval is None:
        return ""
    low, high = result.interval
    digits = 3 if high <= 1.0 else 1
    return f"{low:.{digits}f} to {high:.{digits}f}"


def _file_text(file: Mapping[str, Any]) -> str:
    known = file.get("as_published")
    said = "" if known is None else " as published" if known else " NOT the published file"
    return f"sha256:{file['sha256']}{said}"
