from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava.errors import ImageError, UsageError
from llava.inference.answers_file import AnswersFile
from llava.inference.questions import Question

QUESTIONS = [Question(f"{n}.png", f"/pictures/{n}.png", "What?", n) for n in range(4)]
RUN = {"model_id": "a", "metadata": {"seed": None, "beams": 1}}


def write(path: Path, numbers: list[int], *, run: dict[str, object] = RUN, force: bool = False) -> None:
    with AnswersFile(path, QUESTIONS, run=run, force=force) as file:
        for number in numbers:
            file.write(number, f"answer {number}")


def test_lines_stand_in_the_order_of_the_questions(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.jsonl"
    write(path, [2, 0, 3, 1])
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["text"] for record in records] == [f"answer {n}" for n in range(4)]
    assert records[1] == {"question_id": 1, "image": "1.png", "prompt": "What?", "text": "answer 1", **RUN}


@pytest.mark.parametrize("cut", range(0, 120, 7))
def test_a_file_cut_anywhere_goes_on_to_the_same_bytes(tmp_path: Path, cut: int) -> None:
    whole, path = tmp_path / "whole.jsonl", tmp_path / "a.jsonl"
    write(whole, [0, 1, 2, 3])
    data = whole.read_bytes()
    path.write_bytes(data[: len(data) - cut])
    with AnswersFile(path, QUESTIONS, run=RUN) as file:
        assert file.done == data[: len(data) - cut].count(b"\n")
        for number in range(file.done, 4):
            file.write(number, f"answer {number}")
    assert path.read_bytes() == data


def test_an_answer_that_waits_for_another_is_not_written_yet(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with AnswersFile(path, QUESTIONS, run=RUN) as file:
        file.write(1, "early")
        assert path.read_bytes() == b""
        file.write(0, None, ImageError("0.png: no\n picture"))
        assert (file.done, file.failed) == (2, 1)
        assert [record.get("error") for record in file.read()] == ["0.png: no picture", None]
    with AnswersFile(path, QUESTIONS, run=RUN) as again:
        assert (again.done, again.failed) == (2, 1)


@pytest.mark.parametrize(
    ("run", "says"),
    [
        ({**RUN, "model_id": "b"}, r"a\.jsonl:1: .*model_id 'a' there, 'b' now"),
        ({**RUN, "metadata": {"seed": None, "beams": 3}}, "beams 1 there, 3 now"),
    ],
)
def test_answers_of_another_run_are_refused_until_forced(tmp_path: Path, run: dict[str, object], says: str) -> None:
    path = tmp_path / "a.jsonl"
    write(path, [0, 1])
    before = path.read_bytes()
    with pytest.raises(UsageError, match=says):
        write(path, [2], run=run)
    assert path.read_bytes() == before
    write(path, [0], run=run, force=True)
    assert path.read_bytes().count(b"\n") == 1


def test_answers_to_other_questions_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write(path, [0, 1])
    other = [QUESTIONS[0], Question("1.png", "/pictures/1.png", "Why?", 1)]
    with pytest.raises(UsageError, match=r"a\.jsonl:2: .*'What\?' there, 'Why\?' now"):
        AnswersFile(path, other, run=RUN)
    with pytest.raises(UsageError, match="more answers than the 1"):
        AnswersFile(path, QUESTIONS[:1], run=RUN)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("my notes\nof today\n")
    with pytest.raises(UsageError, match=r"a\.jsonl:1: not an answer.*--force"):
        AnswersFile(path, QUESTIONS, run=RUN)
    assert path.read_text() == "my notes\nof today\n"
