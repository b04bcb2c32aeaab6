"""What holds for every benchmark that ships."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from llava.errors import DataError, UsageError
from llava.eval.runner import read_decoding
from llava.eval.task import Task
from llava.eval.tasks import TASKS, open_task


@pytest.mark.parametrize("name", TASKS)
def test_a_benchmark_says_what_it_needs_and_how_it_asks(name: str, tmp_path: Path) -> None:
    task = open_task(name)
    facts = task.describe()
    assert task.name == name
    assert facts.files
    assert facts.title and facts.prompt and facts.published_metric
    assert read_decoding(facts.decoding).temperature == 0.0
    assert facts.decoding["max_new_tokens"] > 0
    with pytest.raises(DataError, match=str(tmp_path)):
        task.read(tmp_path, split=None)


def test_no_benchmark_imports_torch() -> None:
    code = (
        "import sys; from llava.eval.tasks import TASKS, open_task; [open_task(t).describe() for t in TASKS]; "
        "print([m for m in ('torch', 'transformers', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_benchmark_from_outside_is_named_by_its_module() -> None:
    assert isinstance(open_task("tests.eval.made_up:MadeUp"), Task)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("popes", "did you mean 'pope'"),
        ("nowhere.at_all:X", "No module named"),
        ("tests.eval.made_up:Missing", "Missing"),
        ("tests.eval.made_up:TARGET", "has not the methods"),
    ],
)
def test_a_benchmark_that_is_none_says_so(name: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        open_task(name)
