"""HallusionBench: the judge's words, verdicts, and shares of questions, pairs and figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava.errors import DataError
from llava.eval.judge import JUDGED, Judge, ReplyStore, judge_answers
from llava.eval.task import AnswerRow
from llava.eval.tasks.hallusionbench import RIGHT, UNCLEAR, WRONG, HallusionBench, read_verdict
from tests.eval.judges import judging

TASK = HallusionBench()


def _row(category: str, figure: int, question: int, *, visual: int) -> dict[str, Any]:
    row = {"category": category, "subcategory": "chart", "visual_input": str(visual), "set_id": "0"}
    row |= {"figure_id": str(figure), "question_id": str(question), "question": f"Is it {question}?"}
    return row | {"gt_answer": "1", "gt_answer_details": "It is.", "filename": None}


ROWS = [
    _row("VD", 0, 0, visual=1),
    _row("VD", 1, 0, visual=1),
    _row("VD", 1, 1, visual=1),
    _row("VS", 0, 0, visual=0),
    _row("VS", 1, 0, visual=2),
]
VERDICTS = ["correct", "Incorrect", "correct.", "unclear", "“correct”"]


def _folder(root: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    (root / "HallusionBench").mkdir(exist_ok=True)
    (root / "HallusionBench/HallusionBench.json").write_text(json.dumps(rows))
    return root


def test_a_question_without_a_figure_is_asked_without_a_picture(tmp_path: Path) -> None:
    questions = TASK.read(_folder(tmp_path), split=None)
    assert questions[0].images == (tmp_path / "HallusionBench/hallusion_bench/VD/chart/0_0.png",)
    assert questions[3].images == ()
    assert [question.id for question in questions][2:4] == ["VD_chart_0_1_1", "VS_chart_0_0_0"]
    assert questions[0].prompt == "Is it 0?"


def test_the_judge_is_asked_in_the_benchmarks_words(tmp_path: Path) -> None:
    questions = TASK.read(_folder(tmp_path), split=None)
    answers = [AnswerRow(question.id, "Yes.") for question in questions]
    payload = TASK.judge_requests(questions, answers)[0].payload
    assert set(payload) == {"model", "messages"}
    content = payload["messages"][0]["content"]
    assert content.startswith("Imagine you are an intelligent teacher. Thoroughly read the question, reference answer")
    assert content.endswith(
        'please generate "unclear". \n\n Question:Is it 0?\nReference answer: It is.\nPrediction answer:Yes.\nOutput:'
    )
    with judging(lambda body, before: (200, "correct")) as (url, _):
        store = ReplyStore(tmp_path / "replies.jsonl")
        judged = judge_answers(TASK, questions, answers, store=store, judge=Judge(url, key="k"))
    assert TASK.score(questions, judged).headline["aAcc"] == 100.0


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [("correct", RIGHT), ("It is INCORRECT, not correct", WRONG), ("unclear", UNCLEAR), ("", UNCLEAR)],
)
def test_incorrect_is_looked_for_before_correct(reply: str, verdict: int) -> None:
    assert read_verdict(reply) == verdict


def test_pairs_and_figures_count_only_when_all_their_answers_are_right(tmp_path: Path) -> None:
    questions = TASK.read(_folder(tmp_path), split=None)
    answers = [AnswerRow(q.id, "", {JUDGED: (v,)}) for q, v in zip(questions, VERDICTS, strict=True)]
    score = TASK.score(questions, answers)
    # pairs: VD 0 is not (0, wrong at figure 1), VD 1 is, VS 0 is (unclear without a figure is right)
    # figures: VD 0 is, VD 1 is not, VS 1 is; VS 0 is no figure
    assert score.headline == pytest.approx(
        {"qAcc": 200 / 3, "fAcc": 200 / 3, "easy aAcc": 100.0, "hard aAcc": 200 / 3, "aAcc": 80.0}, rel=1e-12
    )
    assert score.printed.splitlines()[0] == "Acc per question pair: 66.6667"
    assert score.tables["diagnosis of wrong answers"] == [
        {"name": "VD", "LH": 0, "VI": 0, "Mix": 1},
        {"name": "VS", "LH": 0, "VI": 0, "Mix": 0},
        {"name": "Overall", "LH": 0, "VI": 0, "Mix": 1},
    ]
    assert score.notes[0] == "1 verdicts are unclear"


def test_a_category_that_is_not_there_and_a_changed_one(tmp_path: Path) -> None:
    questions = TASK.read(_folder(tmp_path, ROWS[:1]), split=None)
    score = TASK.score(questions, [AnswerRow(questions[0].id, "", {JUDGED: ("unclear",)})])
    assert score.headline == {"qAcc": 0.0, "fAcc": 0.0, "easy aAcc": 0.0, "aAcc": 0.0}
    assert score.tables["diagnosis of wrong answers"][2] == {"name": "Overall", "LH": 0, "VI": 1, "Mix": 0}
    with pytest.raises(DataError, match="category 'XX'; it is VD or VS"):
        TASK.read(_folder(tmp_path, [{**ROWS[0], "category": "XX"}]), split=None)
