"""docs/evaluate.md: it names every benchmark, its links lead somewhere, and its commands have the options they use."""

from __future__ import annotations

import re
from pathlib import Path

import typer

from llava.cli.eval import app
from llava.eval.tasks import TASKS

ROOT = Path(__file__).parent.parent.parent
TEXT = (ROOT / "docs" / "evaluate.md").read_text(encoding="utf-8")


def test_every_benchmark_is_named() -> None:
    assert [name for name in TASKS if f"| `{name}` |" not in TEXT] == []


def test_every_link_leads_to_a_file() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", TEXT) if not link.startswith("http")]
    assert len(links) > 10
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []


def test_every_option_named_is_there() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    known = {name for command in commands.values() for option in command.params for name in option.opts}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", TEXT)) - known == set()


def test_every_command_named_is_there() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    named = set(re.findall(r"^llava eval ([a-z]+)", TEXT, flags=re.MULTILINE))
    assert named == set(commands) - {"run"}
