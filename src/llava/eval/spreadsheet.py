"""An xlsx file of one sheet, for servers that take nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from llava.errors import MissingExtraError


def write_sheet(path: Path, columns: Sequence[str], rows: Sequence[Sequence[str | int | None]]) -> Path:
    """Write a header and rows; None is an empty cell. Raises MissingExtraError without openpyxl.

    Text stays text where it begins with "=", and loses control characters, which the format cannot hold.
    """
    if find_spec("openpyxl") is None:
        raise MissingExtraError("xlsx files", "xlsx")
    from openpyxl import Workbook
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

    book = Workbook()
    sheet = book.active
    for at_row, row in enumerate([list(columns), *rows], start=1):
        for at_column, value in enumerate(row, start=1):
            if value is None:
                continue
            cell = sheet.cell(at_row, at_column)
            cell.value = ILLEGAL_CHARACTERS_RE.sub("", value) if isinstance(value, str) else value
            if isinstance(value, str):
                cell.data_type = "s"
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    book.save(draft)
    draft.replace(path)
    return path
