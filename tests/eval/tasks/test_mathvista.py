"""MathVista: queries, what needs no judge, the judge's prompt, and the forms that answers are brought into."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava.errors import DataError
from llava.eval.judge import JUDGED, Judge, ReplyStore, judge_answers
from llava.eval.task import AnswerRow
from llava.eval.tasks.mathvista import MathVista, edit_distance, extract_alone, normalise
from tests.eval.judges import judging

TASK = MathVista()


def _row(**changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"question": "How long?", "image": "images/1.jpg", "choices": None, "unit": None}
    row |= {"precision": 1.0, "answer": "1.2", "question_type": "free_form", "answer_type": "float"}
    details = {"language": "english", "source": "s", "category": "c", "task": "t", "context": "x", "grade": "g"}
    return row | {"metadata": details | {"skills": ["algebra", "logic"]}} | changes


CHOICE = {"question_type": "multi_choice", "answer_type": "text", "choices": ["135°", "145°"], "answer": "145°"}


def _folder(root: Path, *, examples: bool = True) -> Path:
    rows = {"1": _row(unit="cm"), "2": _row(**CHOICE), "3": _row(answer_type="integer", answer="4", precision=None)}
    (root / "MathVista/data").mkdir(parents=True)
    (root / "MathVista/data/testmini.json").write_text(json.dumps(rows))
    if examples:
        (root / "MathVista/evaluation/prompts").mkdir(parents=True)
        (root / "MathVista/evaluation/prompts/ext_ans.py").write_text(
            '\n\ndemo_prompt = """\nPlease read.\n\nExamples.\n"""\n'
        )
    return root


def test_queries_carry_unit_choices_and_the_hint_of_their_kind(tmp_path: Path) -> None:
    first, second, third = TASK.read(_folder(tmp_path), split=None)
    assert first.prompt == (
        "Question: How long? (Unit: cm)\nHint: Please answer the question requiring a floating-point number with one "
        "decimal place and provide the final value, e.g., 1.2, 1.3, 1.4, at the end.\nSolution:"
    )
    assert second.prompt == (
        "Question: How long?\nChoices:\n(A) 135°\n(B) 145°\nHint: Please answer the question and provide the correct "
        "option letter, e.g., A, B, C, D, at the end.\nSolution:"
    )
    assert "requiring an integer answer" in third.prompt
    assert first.images == (tmp_path / "MathVista/data/images/1.jpg",)


def test_the_judge_sees_only_what_is_not_plain(tmp_path: Path) -> None:
    questions = TASK.read(_folder(tmp_path), split="testmini")
    answers = [AnswerRow("1", "It is 1.2 cm"), AnswerRow("2", "145°"), AnswerRow("3", "4")]
    (request,) = TASK.judge_requests(questions, answers)
    assert request.payload["messages"][0]["content"] == (
        "Please read.\n\nExamples.\n\nHow long?\n\nIt is 1.2 cm\n\nExtracted answer: "
    )
    with judging(lambda body, before: (200, "1.2")) as (url, _):
        store = ReplyStore(tmp_path / "replies.jsonl")
        judged = judge_answers(TASK, questions, answers, store=store, judge=Judge(url, key="k"))
    score = TASK.score(questions, judged)
    assert score.printed == "Correct: 3/3 - Accuracy: 100.00%"
    assert {row["name"]: row["total"] for row in score.tables["skills"]} == {"algebra": 3, "logic": 3}
    assert {row["name"] for row in score.tables["question_type"]} == {"free_form", "multi_choice"}


@pytest.mark.parametrize(
    ("changes", "extraction", "expected"),
    [
        (CHOICE, "B", "145°"),
        (CHOICE, "(b) 135°", "145°"),
        (CHOICE, "b", "135°"),  # no letter in capitals: the nearest text, and the first of two as near
        (CHOICE, "about 145 degrees", "145°"),
        (CHOICE, "", "135°"),
        ({"answer_type": "integer"}, "4.9", "4"),
        ({"answer_type": "integer"}, "four", None),
        ({"answer_type": "integer"}, "inf", None),
        ({"answer_type": "float"}, "1.25", "1.2"),
        ({"answer_type": "float", "precision": 2}, "1", "1.0"),
        ({"answer_type": "list"}, "[1, 2]", "[1, 2]"),
    ],
)
def test_extractions_are_brought_into_the_references_form(
    changes: dict[str, Any], extraction: str, expected: str | None
) -> None:
    assert normalise(extraction, _row(**changes)) == expected


def test_a_number_of_the_wrong_kind_goes_to_the_judge() -> None:
    assert extract_alone("4.5", _row(answer_type="integer")) is None
    assert extract_alone("4", _row()) == "4.0"
    assert extract_alone("", _row()) == ""


def test_edit_distance_counts_letters() -> None:
    assert [edit_distance(*pair) for pair in (("kitten", "sitting"), ("", "abc"), ("a", "a"))] == [3, 3, 0]


def test_strict_takes_an_empty_extraction_for_wrong(tmp_path: Path) -> None:
    questions = TASK.read(_folder(tmp_path), split=None)[1:2]
    answers = [AnswerRow("2", "x", {JUDGED: ("",)})]
    wrong = [type(questions[0])("2", "", (), {**questions[0].meta, "answer": "135°"}, 8)]
    assert TASK.score(wrong, answers).headline == {"accuracy": 100.0}
    assert TASK.score(wrong, answers).notes[0].startswith("1 extractions are empty")
    assert TASK.score(wrong, answers, strict=True).headline == {"accuracy": 0.0}


def test_without_a_judge_the_quick_rule_serves_and_nothing_else(tmp_path: Path) -> None:
    questions = TASK.read(_folder(tmp_path, examples=False), split=None)
    answers = [AnswerRow("1", 'The answer is "1.2".'), AnswerRow("2", "145°"), AnswerRow("3", "", {"extraction": "4"})]
    assert TASK.score(questions, answers).headline == {"accuracy": 100.0}
    with pytest.raises(DataError, match="question 1 was not judged"):
        TASK.score(questions, [AnswerRow("1", "no idea"), *answers[1:]])
    with pytest.raises(DataError, match=r"ext_ans\.py: not there"):
        TASK.judge_requests(questions, answers)


def test_a_problem_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    root = _folder(tmp_path)
    (root / "MathVista/data/testmini.json").write_text(json.dumps({"9": _row(precision=5.0)}))
    with pytest.raises(DataError, match=r"9: answer_type 'float', precision 5\.0 are not known"):
        TASK.read(root, split=None)
