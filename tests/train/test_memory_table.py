"""The memory table of docs/train.md is what the estimate says."""

from pathlib import Path

import pytest
from benchmarks.memory_table import HEAD, ROWS, Row, format_row

PAGE = (Path(__file__).parent.parent.parent / "docs" / "train.md").read_text(encoding="utf-8")


def test_the_page_has_the_table() -> None:
    lines = PAGE.splitlines()
    start = lines.index(format_row(HEAD))
    shown = [
        [cell.strip() for cell in line.strip("| ").split("|")] for line in lines[start + 2 : start + 2 + len(ROWS)]
    ]
    assert [(cells[0], cells[1]) for cells in shown] == [(row.learns, f"`{row.recipe}`") for row in ROWS]
    assert not lines[start + 2 + len(ROWS)].startswith("|")


@pytest.mark.slow  # three traces of a 7B or 13B model a row, some ten seconds each
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.recipe}-{row.devices}")
def test_a_line_is_what_the_estimate_says(row: Row) -> None:
    assert format_row(row.cells()) in PAGE.splitlines()
