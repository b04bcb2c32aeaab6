from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava.errors import DataError
from llava.eval.compare import compare, write_comparison
from llava.eval.run import Asking, run_task
from tests.eval.made_up import MadeUp, write_benchmark
from tests.eval.models import draw_pictures
from tests.eval.test_report import Page
from tests.eval.test_run import Says

RIGHT = {f"{10 * n + turn}": ("yes", "no")[n % 2] for n in range(12) for turn in range(1)}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_benchmark(tmp_path / "data", draw_pictures(tmp_path, 12), each=1)


def run(root: Path, out: Path, words: dict[str, str], *, name: str = "says", strict: bool = False) -> Path:
    says = Says(words)
    says.model_id = name
    run_task(MadeUp(), says, root=root, out=out, asking=Asking(strict=strict))
    return out


def test_what_changed_is_counted_and_tested(root: Path, tmp_path: Path) -> None:
    worse = RIGHT | dict.fromkeys(list(RIGHT)[:9], "hm")
    first = run(root, tmp_path / "a", RIGHT | {"110": "No"})
    second = run(root, tmp_path / "b", worse)
    (found, pairs) = compare(first, second)[0]
    assert (found.questions, found.changed, found.better, found.worse) == (12, 10, 0, 9)
    assert found.p_value == pytest.approx(2 / 2**9)
    assert found.verdict.startswith("significant")
    assert (found.first, found.second) == (100.0, 25.0)
    assert [pair[1].id for pair in pairs][-1] == "110"


def test_two_of_twelve_are_no_significant_difference(root: Path, tmp_path: Path) -> None:
    second = run(root, tmp_path / "b", RIGHT | {"0": "no", "10": "yes"})
    found, _ = compare(run(root, tmp_path / "a", RIGHT), second)[0]
    assert found.p_value == 0.5
    assert found.verdict.startswith("not significant")


def test_the_page_shows_both_answers_beside_the_picture(root: Path, tmp_path: Path) -> None:
    first = run(root, tmp_path / "a", RIGHT)
    second = run(root, tmp_path / "b", RIGHT | {"0": "<i>perhaps</i>"})
    write_comparison(first, second, tmp_path / "c")
    text = (tmp_path / "c/comparison.html").read_text()
    assert not Page(text).open
    assert "&lt;i&gt;perhaps" in text
    assert text.count("data:image/jpeg") == 1
    assert json.loads((tmp_path / "c/comparison.json").read_text())["tasks"]["made_up"]["worse"] == 1


def test_equal_runs_say_so(root: Path, tmp_path: Path) -> None:
    first, second = run(root, tmp_path / "a", RIGHT), run(root, tmp_path / "b", RIGHT)
    write_comparison(first, second, tmp_path / "c")
    assert "No answer changed." in (tmp_path / "c/comparison.html").read_text()


def test_other_questions_and_another_rule_are_said(root: Path, tmp_path: Path) -> None:
    first = run(root, tmp_path / "a", RIGHT)
    lines = (root / "made_up.jsonl").read_text().splitlines()
    (root / "made_up.jsonl").write_text("\n".join([lines[0].replace("red", "Red"), *lines[1:]]) + "\n")
    found, _ = compare(first, run(root, tmp_path / "b", RIGHT, strict=True))[0]
    assert found.questions == 11
    assert len(found.notes) == 2


def test_runs_of_different_benchmarks_are_not_compared(root: Path, tmp_path: Path) -> None:
    first = run(root, tmp_path / "a", RIGHT)
    second = run(root, tmp_path / "b", RIGHT)
    (second / "made_up").rename(second / "other")
    record = json.loads((second / "other/result.json").read_text())
    (second / "other/result.json").write_text(json.dumps(record | {"task": "other"}))
    with pytest.raises(DataError, match="no benchmark is in both"):
        compare(first, second)
