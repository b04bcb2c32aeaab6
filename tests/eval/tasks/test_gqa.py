"""GQA: exact answers, by type, steps and length, and how they are spread."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from llava.errors import DataError
from llava.eval.answers import read_answers
from llava.eval.metrics.gqa import count_steps, distribution, prediction
from llava.eval.task import AnswerRow, Question
from llava.eval.tasks.gqa import GQA

GOLDEN = Path(__file__).parents[2] / "golden" / "eval"


def step(operation: str, argument: str) -> dict[str, Any]:
    return {"operation": operation, "argument": argument, "dependencies": []}


def row(question: str, answer: str, structural: str, group: str | None, *steps: dict[str, Any]) -> dict[str, Any]:
    return {
        "question": question,
        "answer": answer,
        "isBalanced": True,
        "imageId": "n1",
        "types": {"structural": structural, "semantic": "attr", "detailed": "x"},
        "groups": {"global": group, "local": "l"},
        "semantic": list(steps),
    }


ROWS = {
    "201": row("Is it red?", "yes", "verify", None, step("select", "car (1)"), step("verify color", "red (0)")),
    "202": row("What color is the car?", "red", "query", "color", step("select", "car (1)"), step("query", "color")),
    "203": row("What is this?", "car", "query", "thing", step("select", "this (1)"), step("query", "name")),
    "204": row("Which color is it?", "blue", "query", "color", step("select", "it (1)"), step("exist", "?")),
}


def write_folder(root: Path, rows: dict[str, dict[str, Any]] = ROWS, *, asked: int | None = None) -> Path:
    (root / "gqa" / "data").mkdir(parents=True)
    suffix = "\nAnswer the question using a single word or phrase."
    questions = [
        {"question_id": key, "image": "n1.jpg", "text": value["question"] + suffix, "category": "default"}
        for key, value in list(rows.items())[:asked]
    ]
    (root / "gqa/llava_gqa_testdev_balanced.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (root / "gqa/data/testdev_balanced_questions.json").write_text(json.dumps(rows))
    return root


def said(questions: list[Question], *texts: str) -> list[AnswerRow]:
    return [AnswerRow(question.id, text) for question, text in zip(questions, texts, strict=True)]


@pytest.mark.parametrize(
    "case", json.loads((GOLDEN / "gqa_predictions.json").read_text()), ids=lambda case: repr(case["raw"])
)
def test_an_answer_is_changed_as_the_originals_converter_does(case: dict[str, str]) -> None:
    assert prediction(case["raw"]) == case["prediction"]


def test_accuracy_is_that_of_equal_answers_and_is_split_by_type(tmp_path: Path) -> None:
    questions = GQA().read(write_folder(tmp_path), split=None)
    score = GQA().score(questions, said(questions, "Yes.", "Red", "Truck", "red"))
    assert score.headline["accuracy"] == 50.0
    assert (score.headline["binary"], score.headline["open"]) == (100.0, pytest.approx(100 / 3))
    assert score.tables["structural"] == [
        {"structural": "query", "accuracy": pytest.approx(100 / 3), "rows": 3},
        {"structural": "verify", "accuracy": 100.0, "rows": 1},
    ]
    assert [line["words"] for line in score.tables["words"]] == [3, 4, 5]
    assert score.correct == {"201": 1.0, "202": 1.0, "203": 0.0, "204": 0.0}


def test_the_spread_is_chi_square_by_group_weighted_by_its_size(tmp_path: Path) -> None:
    questions = GQA().read(write_folder(tmp_path), split=None)
    score = GQA().score(questions, said(questions, "yes", "red", "truck", "red"))
    # colours: red 2 for 1, blue 0 for 1 -> 2, times 2 rows; things: car 0 for 1 -> 1, times 1 row
    assert score.headline["distribution"] == pytest.approx((2 * 2 + 1 * 1) / 3 / 100, abs=1e-12)
    assert distribution({}, {}) == 0.0
    assert distribution({"a": Counter(x=2)}, {"a": Counter(x=2)}) == 0.0


def test_steps_that_only_name_or_ask_for_being_there_do_not_count() -> None:
    steps = [step("select", "car"), step("exist", "?"), step("query", "name"), step("choose name", "a|b")]
    assert count_steps({"semantic": steps}) == 1
    assert count_steps({"semantic": [step("query", "color"), step("select", "nonexistent thing")]}) == 1


def test_it_prints_as_the_official_script_does(tmp_path: Path) -> None:
    questions = GQA().read(write_folder(tmp_path), split=None)
    lines = GQA().score(questions, said(questions, "yes", "red", "car", "no")).printed.splitlines()
    assert lines[1:7] == [
        "Binary: 100.00%",
        "Open: 66.67%",
        "Accuracy: 75.00%",
        "Validity: 0.00%",
        "Plausibility: 0.00%",
        "Distribution: 0.01% (lower is better)".replace("%", ""),
    ]
    assert lines[7:11] == [
        "",
        "Accuracy / structural type:",
        "  query: 66.67% (3 questions)",
        "  verify: 100.00% (1 questions)",
    ]


def test_blanks_round_an_answer_make_it_wrong_unless_strict(tmp_path: Path) -> None:
    questions = GQA().read(write_folder(tmp_path), split=None)
    answers = said(questions, " Yes. ", "red", "car", "blue")
    official = GQA().score(questions, answers)
    assert official.headline["accuracy"] == 75.0
    assert official.notes[-1].startswith("1 answers have blanks")
    assert GQA().score(questions, answers, strict=True).headline["accuracy"] == 100.0


def test_the_upload_is_what_the_originals_converter_writes(tmp_path: Path) -> None:
    answers = read_answers(GOLDEN / "converters" / "answers.jsonl")
    questions = [Question(str(n), "p", (), {"question_id": n}, 128) for n in range(5)]
    path = GQA().write_upload(questions, answers, tmp_path / "predictions.json")
    assert path is not None
    assert json.loads(path.read_text()) == json.loads((GOLDEN / "converters" / "gqa.json").read_text())


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    write_folder(tmp_path, asked=3)
    with pytest.raises(DataError, match=r"1 questions of testdev_balanced_questions\.json are not asked, such as 204"):
        GQA().read(tmp_path, split=None)
    (tmp_path / "gqa/data/testdev_balanced_questions.json").write_text(json.dumps({"201": ROWS["201"]}))
    with pytest.raises(DataError, match=r"no question 202 \(llava_gqa_testdev_balanced.jsonl:2\)"):
        GQA().read(tmp_path, split=None)


def test_a_missing_prediction_is_an_error(tmp_path: Path) -> None:
    questions = GQA().read(write_folder(tmp_path), split=None)
    with pytest.raises(DataError, match="1 of 4 questions have no answer, such as 204"):
        GQA().score(questions, said(questions[:3], "a", "b", "c"))
