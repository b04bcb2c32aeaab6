"""The README's table of formats says what happens."""

from __future__ import annotations

import pytest

pytest.importorskip("gguf", reason="the table has a GGUF column: pip install 'llava[export]'")

from tests.checkpoint.formats_table import in_readme, measure


def test_the_readmes_table_of_formats_is_what_opening_and_converting_gives() -> None:
    assert in_readme() == measure(), "measure it again: python -m tests.checkpoint.formats_table"
