from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from llava.cli.main import main
from llava.eval.demo import demo_tasks, write_demo
from llava.eval.report import write_report
from llava.eval.run import Asking, run_task
from llava.eval.runner import OnAnswer
from llava.eval.task import Question
from tests.eval.test_report import Page


def digest(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256(b"".join(str(f.relative_to(folder)).encode() + f.read_bytes() for f in files)).hexdigest()


class Knows:
    """Answers with what the question's own reference is, in the quickstart's words."""

    model_id = "knows"

    def describe(self) -> dict[str, Any]:
        return {"model": "knows"}

    def answer(self, questions: Sequence[Question], decoding: Mapping[str, Any], on_answer: OnAnswer) -> None:
        for question in questions:
            meta = question.meta
            if "box" in meta:
                text = "[" + ", ".join(f"{(value + 0.5) / 100:.3f}" for value in meta["box"]) + "]"
            elif "captions" in meta:
                text = meta["captions"][0]
            else:
                text = meta["answers"][0]
            on_answer(question, text, None)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo(tmp_path_factory.mktemp("demo"), num_scenes=12)


def test_the_same_seed_writes_the_same_files(data: Path, tmp_path: Path) -> None:
    assert digest(write_demo(tmp_path / "again", num_scenes=12)) == digest(data)
    assert digest(write_demo(tmp_path / "other", num_scenes=12, seed=1)) != digest(data)


def test_who_knows_every_answer_has_every_point(data: Path, tmp_path: Path) -> None:
    found = {}
    for task in demo_tasks():
        result = run_task(task, Knows(), root=data, out=tmp_path, asking=Asking())
        assert result is not None
        found[task.name] = result.headline
    assert found["pope"] == {"F1": 100.0}
    assert found["vqav2"] == {"overall": 100.0}
    assert found["scienceqa"] == {"accuracy": 100.0, "IMG accuracy": 100.0}
    assert found["refcoco"] == {"accuracy": 1.0}
    assert found["coco_caption"]["Bleu_4"] == pytest.approx(1.0)
    write_report(tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert not Page(text).open
    assert "<svg" not in text  # nothing published beside them: a radar of one model says nothing


def test_no_question_gives_its_answer_away(data: Path) -> None:
    pope = demo_tasks()[0].read(data, split=None)
    assert sum(question.meta["label"] == "yes" for question in pope) == len(pope) / 2
    assert len({question.meta["category"] for question in pope}) == 3
    letters = [question.meta["answers"][0] for question in demo_tasks()[2].read(data, split=None)]
    assert len(set(letters)) > 1


def test_the_demo_runs_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    from tests.cli.tiny_model import write_model

    model = write_model(tmp_path_factory.mktemp("model"))
    command = ["eval", "demo", str(model), "--out", str(tmp_path), "--scenes", "3", "--dtype", "float32"]
    assert main([*command, "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    for name in ("pope", "vqav2", "scienceqa", "refcoco", "coco_caption"):
        assert name in said
    assert (tmp_path / "report.html").exists()
