"""LLaVA-Bench: the judge's payload letter for letter, reviews read and averaged as the original does."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from llava.errors import DataError
from llava.eval.judge import Judge, ReplyStore, judge_answers
from llava.eval.task import AnswerRow, Question
from llava.eval.tasks.llava_bench import LLAVA_BENCH, LLAVA_BENCH_COCO, read_review, read_review_strictly, with_reviews
from tests.eval.judges import judging


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _wild(root: Path) -> Path:
    folder = root / "llava-bench-in-the-wild"
    folder.mkdir(exist_ok=True)
    kinds = ("conv", "detail", "complex")
    asked = [{"question_id": n, "image": f"00{n % 2}.jpg", "text": f"Q{n}?", "category": kinds[n]} for n in range(3)]
    _write(folder / "questions.jsonl", asked)
    contexts = [{"image": "000.jpg", "caption": ["First.", "Second."]}, {"image": "001.jpg", "caption": "One caption."}]
    _write(folder / "context.jsonl", contexts)
    _write(
        folder / "answers_gpt4.jsonl", [{"question_id": n, "text": f"ref {n}", "answer_id": f"r{n}"} for n in range(3)]
    )
    return root


ANSWERS = [AnswerRow(str(number), f"out {number}", {"answer_id": f"m{number}"}) for number in range(3)]


def test_the_judge_is_asked_in_the_originals_words(tmp_path: Path) -> None:
    questions = LLAVA_BENCH.read(_wild(tmp_path), split=None)
    assert questions[0].prompt == "Q0?"
    assert questions[0].images == (tmp_path / "llava-bench-in-the-wild/images/000.jpg",)
    first, second, _ = (request.payload for request in LLAVA_BENCH.judge_requests(questions, ANSWERS))
    assert {key: value for key, value in first.items() if key != "messages"} == {
        "model": "gpt-4-0314",
        "temperature": 0.2,
        "max_tokens": 1024,
    }
    system, user = first["messages"]
    assert system["content"] == "You are a helpful and precise assistant for checking the quality of the answer."
    assert user["content"].startswith(
        "[Context]\nFirst.\nSecond.\n\n[Question]\nQ0?\n\n[Assistant 1]\nref 0\n\n[End of Assistant 1]\n\n"
        "[Assistant 2]\nout 0\n\n[End of Assistant 2]\n\n[System]\nWe would like to request your feedback"
    )
    assert "is represented with a few sentences describing the image. \nPlease rate" in user["content"]
    assert user["content"].endswith("does not affect your judgment.\n\n")
    assert second["messages"][1]["content"].startswith("[Context]\nOne caption.\n\n[Question]")


def test_the_coco_set_tells_the_boxes_too(tmp_path: Path) -> None:
    (tmp_path / "llava_bench_coco").mkdir()
    row = {"question_id": 0, "image": "a.jpg", "text": "Q?", "category": "conv"}
    _write(tmp_path / "llava_bench_coco/qa90_questions.jsonl", [row])
    box = {"category": "cup", "bbox": [0.1, 0.25, 0.5, 1.0]}
    _write(
        tmp_path / "llava_bench_coco/caps_boxes_coco2014_val_80.jsonl",
        [{"image": "a.jpg", "captions": ["C."], "instances": [box]}],
    )
    _write(tmp_path / "llava_bench_coco/qa90_gpt4_answer.jsonl", [{"question_id": 0, "text": "ref"}])
    questions = LLAVA_BENCH_COCO.read(tmp_path, split=None)
    (request,) = LLAVA_BENCH_COCO.judge_requests(questions, ANSWERS[:1])
    content = request.payload["messages"][1]["content"]
    assert content.startswith("[Context]\nC.\n\ncup: [0.1, 0.25, 0.5, 1.0]\n\n[Question]\nQ?\n\n")
    assert "five descriptive sentences" in content
    assert questions[0].meta["category"] == "conv"


@pytest.mark.parametrize(
    ("review", "grades", "strictly"),
    [
        ("8 9\nBoth fine.", (8.0, 9.0), (8.0, 9.0)),
        ("8,9", (8.0, 9.0), (8.0, 9.0)),
        ("8, 9", (-1.0, -1.0), (8.0, 9.0)),
        ("8 9 ", (-1.0, -1.0), (8.0, 9.0)),
        ("8  9", (-1.0, -1.0), (8.0, 9.0)),
        ("8\t9", (-1.0, -1.0), (8.0, 9.0)),
        ("8/10 9/10", (-1.0, -1.0), (-1.0, -1.0)),
        ("8 9.", (8.0, 9.0), (8.0, 9.0)),
        ("1e1 2", (10.0, 2.0), (-1.0, -1.0)),
        ("", (-1.0, -1.0), (-1.0, -1.0)),
        ("8\n9", (-1.0, -1.0), (-1.0, -1.0)),
    ],
)
def test_the_first_line_is_two_numbers_or_the_review_failed(
    review: str, grades: tuple[float, float], strictly: tuple[float, float]
) -> None:
    assert read_review(review) == grades
    assert read_review_strictly(review) == strictly


def test_a_word_that_python_takes_for_a_number_passes() -> None:
    assert math.isnan(read_review("nan 3")[0])


def _judged(questions: list[Question], tmp_path: Path) -> list[AnswerRow]:
    replies = {"Q0?": "8 9\nfine", "Q1?": "7, 6.5", "Q2?": "9,8"}

    def answer(body: dict[str, Any], before: int) -> tuple[int, str]:
        content = body["messages"][1]["content"]
        return 200, next(reply for asked, reply in replies.items() if asked in content)

    with judging(answer) as (url, _):
        store = ReplyStore(tmp_path / "replies.jsonl")
        return judge_answers(LLAVA_BENCH, questions, ANSWERS, store=store, judge=Judge(url, key="k"))


def test_failed_reviews_are_averaged_in_unless_strict(tmp_path: Path) -> None:
    questions = LLAVA_BENCH.read(_wild(tmp_path), split=None)
    judged = _judged(questions, tmp_path)
    score = LLAVA_BENCH.score(questions, judged)
    # means (8 - 1 + 9) / 3 = 5.333 and (9 - 1 + 8) / 3 = 5.333
    assert score.printed.splitlines() == [
        "all 100.0 53.3 53.3",
        "llava_bench_complex 88.9 90.0 80.0",
        "llava_bench_conv 112.5 80.0 90.0",
        "llava_bench_detail 100.0 -10.0 -10.0",
    ]
    assert score.notes[0].startswith("1 reviews do not begin with two numbers and are averaged in")
    strict = LLAVA_BENCH.score(questions, judged, strict=True)
    assert strict.printed.splitlines()[0] == "all 97.9 80.0 78.3"


def test_reviews_are_written_and_read_in_the_originals_format(tmp_path: Path) -> None:
    questions = LLAVA_BENCH.read(_wild(tmp_path), split=None)
    path = LLAVA_BENCH.write_reviews(questions, _judged(questions, tmp_path), tmp_path / "reviews.jsonl")
    row = json.loads(path.read_text().splitlines()[1])
    assert list(row) == ["id", "question_id", "answer1_id", "answer2_id", "category", "content", "tuple"]
    assert (row["id"], row["answer1_id"], row["answer2_id"], row["tuple"]) == (2, "r1", "m1", [-1.0, -1.0])
    again = LLAVA_BENCH.score(questions, with_reviews(ANSWERS, path))
    assert again.printed.startswith("all 100.0 53.3 53.3")
    with pytest.raises(DataError, match="no review of question 9"):
        with_reviews([AnswerRow("9", "")], path)


def test_references_of_other_questions_are_refused(tmp_path: Path) -> None:
    root = _wild(tmp_path)
    lines = (root / "llava-bench-in-the-wild/answers_gpt4.jsonl").read_text().splitlines(keepends=True)
    (root / "llava-bench-in-the-wild/answers_gpt4.jsonl").write_text("".join(lines[::-1]))
    with pytest.raises(DataError, match=r"not the questions of .* in their order"):
        LLAVA_BENCH.read(root, split=None)


def test_an_answer_that_was_not_judged_is_not_scored(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="was not judged"):
        LLAVA_BENCH.score(LLAVA_BENCH.read(_wild(tmp_path), split=None), ANSWERS)
