"""Q-Bench: candidates asked as lines, letters and texts matched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava.errors import DataError
from llava.eval.answers import read_answers
from llava.eval.task import AnswerRow
from llava.eval.tasks.qbench import QBench, choose

ROWS = [
    {"img_path": "a.jpg", "question": "Is it sharp?", "candidates": ["Yes", "No"], "correct_ans": "No", "type": 0},
    {"img_path": "a.jpg", "question": "How is the light?", "candidates": ["Dark", "Bright", "Fair"],
     "correct_ans": "Dark", "type": 1},
]  # fmt: skip


def _folder(root: Path, rows: list[dict[str, object]] = ROWS) -> Path:
    (root / "qbench").mkdir(exist_ok=True)
    (root / "qbench/llvisionqa_dev.json").write_text(json.dumps(rows))
    return root


def test_the_prompt_ends_with_a_lines_end(tmp_path: Path) -> None:
    first, second = QBench().read(_folder(tmp_path), split=None)
    assert first.prompt == "Is it sharp?\nChoose between one of the options as follows:\nA. Yes\nB. No\n"
    assert first.images == second.images == (tmp_path / "qbench/images/a.jpg",)
    assert (first.id, second.id, second.max_new_tokens) == ("0", "1", 1024)


@pytest.mark.parametrize(
    ("answer", "option"),
    [("A", "Dark"), ("B.", "Bright"), ("(C)", "Fair"), ("C. Fair", "Fair"), ("fair.", "Fair"), ("A dark one", None),
     ("D", None), ("", None), ("Dark or bright", None)],
)  # fmt: skip
def test_a_letter_first_or_the_text_alone_names_an_option(answer: str, option: str | None) -> None:
    assert choose(answer, {"A": "Dark", "B": "Bright", "C": "Fair"}) == option


def test_the_score_counts_by_type(tmp_path: Path) -> None:
    questions = QBench().read(_folder(tmp_path), split="dev")
    score = QBench().score(questions, [AnswerRow("0", "B. No"), AnswerRow("1", "It is quite bright")])
    assert score.headline == {"accuracy": 0.5}
    assert [row["accuracy"] for row in score.tables["types"]] == [1.0, 0.0]
    assert score.notes[0].startswith("1 answers name no option")


def test_the_upload_holds_each_row_with_its_response(tmp_path: Path) -> None:
    questions = QBench().read(_folder(tmp_path), split="dev")
    path = QBench().write_upload(questions, [AnswerRow("0", "B"), AnswerRow("1", "A")], tmp_path / "up")
    assert path is not None
    assert json.loads(path.read_text().splitlines()[0]) == {**ROWS[0], "response": "B"}


def test_objects_without_a_break_between_are_read(tmp_path: Path) -> None:
    (tmp_path / "old.jsonl").write_text('{"id": 0, "response": "A"}{"id": 1, "response": "B"}')
    assert [answer.text for answer in read_answers(tmp_path / "old.jsonl")] == ["A", "B"]


def test_a_split_without_answers_is_for_upload_only(tmp_path: Path) -> None:
    rows = [{key: value for key, value in row.items() if key != "correct_ans"} for row in ROWS]
    questions = QBench().read(_folder(tmp_path, rows), split="dev")
    with pytest.raises(DataError, match="holds no answers"):
        QBench().score(questions, [AnswerRow("0", "B"), AnswerRow("1", "A")])
    with pytest.raises(DataError, match="is none of its candidates"):
        QBench().read(_folder(tmp_path, [{**ROWS[0], "correct_ans": "Maybe"}]), split="dev")
