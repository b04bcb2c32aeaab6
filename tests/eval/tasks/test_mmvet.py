"""MM-Vet: the grading table letter for letter, numbers read from replies, means over capabilities."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava.errors import DataError
from llava.eval.judge import JUDGED, Judge, ReplyStore, judge_answers
from llava.eval.task import AnswerRow, Question
from llava.eval.tasks.mmvet import MMVet, read_grade, with_grades
from tests.eval.judges import judging

TASK = MMVet()


def _questions(root: Path) -> list[Question]:
    rows = {
        "v1_0": {
            "imagename": "v1_0.png",
            "question": "What is x?",
            "answer": "-1<AND>-5",
            "capability": ["ocr", "math"],
        },
        "v1_1": {"imagename": "v1_0.png", "question": "Who?", "answer": "A<OR>B", "capability": ["rec"]},
        "v1_2": {"imagename": "v1_2.jpg", "question": "Why?", "answer": "so", "capability": ["math", "ocr"]},
    }
    (root / "mm-vet").mkdir(exist_ok=True)
    (root / "mm-vet/mm-vet.json").write_text(json.dumps(rows))
    return TASK.read(root, split=None)


ANSWERS = [AnswerRow("v1_0", "x = -1"), AnswerRow("1", "B"), AnswerRow("v1_2", "no")]


def test_the_question_is_asked_bare_and_graded_in_a_table(tmp_path: Path) -> None:
    questions = _questions(tmp_path)
    assert questions[0].prompt == "What is x?"
    assert questions[1].images == (tmp_path / "mm-vet/images/v1_0.png",)
    payload = TASK.judge_requests(questions, ANSWERS)[0].payload
    content = payload["messages"][0]["content"]
    assert content.startswith("Compare the ground truth and prediction from AI models, to give a correctness score")
    assert "\n\nQuestion | Ground truth | Prediction | Correctness\n--- | --- | --- | ---\nWhat is x in the" in content
    assert content.endswith("characteristics. | 1.0\n\nWhat is x? | -1 <AND> -5 | x = -1 | ")
    assert {key: payload[key] for key in ("model", "max_tokens", "temperature")} == {
        "model": "gpt-4-0613",
        "max_tokens": 3,
        "temperature": 0.0,
    }


def test_a_reply_that_is_no_number_is_asked_again_warmer_and_the_sixth_is_not_read(tmp_path: Path) -> None:
    questions = _questions(tmp_path)
    with judging(lambda body, before: (200, "1.0" if body["temperature"] > 1.9 else "It is")) as (url, asked):
        judge = Judge(url, key="k", concurrency=1)
        store = ReplyStore(tmp_path / "replies.jsonl")
        judged = judge_answers(TASK, questions[:1], ANSWERS[:1], store=store, judge=judge)
    assert [body["temperature"] for body in asked] == [0.0, 0.0, 0.5, 1.0, 1.5, 2.0]
    assert asked[1]["messages"][0]["content"].endswith(" | \nPredict the correctness of the answer (digit): ")
    assert TASK.score(questions[:1], judged).headline["total"] == 0.0
    assert TASK.score(questions[:1], judged, strict=True).headline["total"] == 100.0
    assert TASK.score(questions[:1], judged).notes[0].startswith("1 answers whose judge gave no number")


def test_each_question_counts_for_all_its_capabilities(tmp_path: Path) -> None:
    grades = {"v1_0": "0.5", "1": "1.0", "v1_2": "0.3"}
    judged = [AnswerRow(a.question_id, a.text, {JUDGED: (grades[a.question_id],)}) for a in ANSWERS]
    score = TASK.score(_questions(tmp_path), judged)
    assert score.headline["total"] == pytest.approx(60.0, rel=1e-12)
    assert {row["name"]: round(row["score"], 9) for row in score.tables["capabilities"]} == {
        "ocr": 40.0,
        "math": 40.0,
        "rec": 100.0,
    }
    assert [(row["name"], row["questions"]) for row in score.tables["capability sets"]] == [("math+ocr", 2), ("rec", 1)]
    assert score.printed.splitlines()[1].endswith(',60.0,0.0,"[60.0]"')
    assert score.correct["v1_1"] == 1.0


def test_grades_of_several_runs_give_a_mean_and_a_spread(tmp_path: Path) -> None:
    path = tmp_path / "grades.json"
    path.write_text(json.dumps({f"v1_{n}": {"model": [], "content": [], "score": [0.0, 1.0]} for n in range(3)}))
    score = TASK.score(_questions(tmp_path), with_grades(ANSWERS, path))
    assert score.headline == {"total": 50.0, "std": 50.0}
    assert score.printed.endswith('50.0,50.0,"[0.0, 100.0]"')
    path.write_text(json.dumps({"v1_0": {"score": [1.0]}}))
    with pytest.raises(DataError, match="no grade of question 1"):
        with_grades(ANSWERS, path)


@pytest.mark.parametrize(
    ("reply", "grade"),
    [("0.5", 0.5), ("1.0 |", 1.0), ("0.5\n", 0.5), ("1.1", None), ("-1", None), ("", None), (" 1", None)],
)
def test_a_grade_is_the_number_before_the_first_space(reply: str, grade: float | None) -> None:
    assert read_grade(reply) == grade


def test_the_upload_is_texts_by_id(tmp_path: Path) -> None:
    path = TASK.write_upload(_questions(tmp_path), ANSWERS, tmp_path / "up")
    assert path is not None
    assert json.loads(path.read_text()) == {"v1_0": "x = -1", "v1_1": "B", "v1_2": "no"}


def test_a_row_without_its_capability_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mm-vet").mkdir()
    (tmp_path / "mm-vet/mm-vet.json").write_text('{"v1_0": {"imagename": "a", "question": "b", "answer": "c"}}')
    with pytest.raises(DataError, match=r"mm-vet\.json: v1_0: no capability"):
        TASK.read(tmp_path, split=None)


def test_a_file_that_lost_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mm-vet").mkdir()
    row = {"imagename": "a.png", "question": "b", "answer": "c", "capability": ["rec"]}
    (tmp_path / "mm-vet/mm-vet.json").write_text(json.dumps({f"v1_{number}": row for number in range(217)}))
    with pytest.raises(DataError, match="217 rows, but the published file has 218"):
        TASK.read(tmp_path, split=None)
