"""VQAv2 and VizWiz: what goes to EvalAI, and VQAv2's validation set scored by vqaEval's rule."""

import json
from pathlib import Path
from typing import Any

import pytest

from llava.errors import DataError
from llava.eval.answers import read_answers
from llava.eval.task import AnswerRow, Question
from llava.eval.tasks.vizwiz import VizWiz
from llava.eval.tasks.vqav2 import VQAV2, lay_over

GOLDEN = Path(__file__).parents[2] / "golden" / "eval" / "converters"
SUFFIX = "\nAnswer the question using a single word or phrase."
TRUTHS: dict[int, tuple[str, str, list[str]]] = {
    1: ("is the", "yes/no", ["yes"] * 10),
    2: ("how many", "number", ["two"] * 3 + ["2"] * 1 + ["3"] * 6),
    3: ("what color", "other", ["red"] * 2 + ["dark red"] * 8),
}


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_test(root: Path) -> Path:
    """Three questions of test, of which the first and last are test-dev's."""
    folder = root / "vqav2"
    folder.mkdir()
    rows = [
        {"question_id": n, "image": f"COCO_test2015_{n:012}.jpg", "text": f"q{n}?{SUFFIX}", "category": "default"}
        for n in (30, 10, 20)
    ]
    write_lines(folder / "llava_vqav2_mscoco_test2015.jsonl", rows)
    write_lines(folder / "llava_vqav2_mscoco_test-dev2015.jsonl", [rows[0], rows[2]])
    return root


def write_val(root: Path) -> Path:
    folder = root / "vqav2"
    folder.mkdir()
    questions = [{"question_id": n, "image_id": 40 + n, "question": f"q{n}?"} for n in TRUTHS]
    annotations = [
        {
            "question_id": n,
            "image_id": 40 + n,
            "question_type": kind,
            "answer_type": of,
            "multiple_choice_answer": truths[0],
            "answers": [{"answer": text, "answer_confidence": "yes", "answer_id": i} for i, text in enumerate(truths)],
        }
        for n, (kind, of, truths) in TRUTHS.items()
    ]
    (folder / "v2_OpenEnded_mscoco_val2014_questions.json").write_text(json.dumps({"questions": questions}))
    (folder / "v2_mscoco_val2014_annotations.json").write_text(json.dumps({"annotations": annotations}))
    return root


def said(questions: list[Question], *texts: str) -> list[AnswerRow]:
    return [AnswerRow(question.id, text) for question, text in zip(questions, texts, strict=True)]


def test_test_dev_is_asked_and_the_upload_is_laid_over_all_of_test(tmp_path: Path) -> None:
    task = VQAV2()
    questions = task.read(write_test(tmp_path), split=None)
    assert [question.id for question in questions] == ["30", "20"]
    assert questions[0].images == (tmp_path / "vqav2/test2015/COCO_test2015_000000000030.jpg",)
    path = task.write_upload(questions, said(questions, "The Dog.", "two"), tmp_path / "upload.json")
    assert path is not None
    assert json.loads(path.read_text()) == [
        {"question_id": 30, "answer": "dog"},
        {"question_id": 10, "answer": ""},
        {"question_id": 20, "answer": "2"},
    ]


def test_the_upload_is_what_the_originals_converter_writes() -> None:
    lines = (GOLDEN / "llava_vqav2_mscoco_test2015.jsonl").read_text().splitlines()
    texts = {answer.question_id: answer.text for answer in read_answers(GOLDEN / "answers.jsonl")}
    laid = lay_over([json.loads(line)["question_id"] for line in lines], texts)
    assert laid == json.loads((GOLDEN / "vqav2.json").read_text())


def test_what_only_the_server_can_score_is_said(tmp_path: Path) -> None:
    questions = VQAV2().read(write_test(tmp_path), split=None)
    score = VQAV2().score(questions, said(questions, "a", "b"))
    assert score.headline == {} and "eval.ai" in score.notes[-1]


def test_the_validation_set_is_scored_by_type(tmp_path: Path) -> None:
    questions = VQAV2().read(write_val(tmp_path), split="val")
    assert questions[0].prompt == "q1?" + SUFFIX
    assert questions[0].images == (tmp_path / "vqav2/val2014/COCO_val2014_000000000041.jpg",)
    score = VQAV2().score(questions, said(questions, "yes\n", "2", "a red!"))
    assert score.correct == pytest.approx({"1": 1.0, "2": 1.0, "3": 0.6}, abs=1e-12)
    assert score.headline == {"overall": 86.67}
    assert score.tables["answer_type"] == [
        {"answer_type": "yes/no", "accuracy": 100.0, "rows": 1},
        {"answer_type": "number", "accuracy": 100.0, "rows": 1},
        {"answer_type": "other", "accuracy": 60.0, "rows": 1},
    ]
    assert score.printed.startswith(
        "Overall Accuracy is: 86.67\n\nPer Question Type Accuracy is the following:\nis the : 1"
    )


@pytest.mark.parametrize(("text", "official"), [("yes", 1.0), ("Yes", 0.0), ("yes.", 0.0), (" yes\t", 1.0)])
def test_where_ten_agree_nothing_is_normalised_unless_strict(tmp_path: Path, text: str, official: float) -> None:
    questions = VQAV2().read(write_val(tmp_path), split="val")
    answers = said(questions, text, "x", "x")
    score = VQAV2().score(questions, answers)
    assert score.correct["1"] == official
    assert f"{int(official == 0.0)} answers are wrong only because ten people agree" in score.notes[1]
    assert VQAV2().score(questions, answers, strict=True).correct["1"] == 1.0


def test_the_validation_set_has_no_upload(tmp_path: Path) -> None:
    questions = VQAV2().read(write_val(tmp_path), split="val")
    assert VQAV2().write_upload(questions, said(questions, "a", "b", "c"), tmp_path / "x.json") is None


def test_questions_and_annotations_that_differ_are_refused(tmp_path: Path) -> None:
    path = write_val(tmp_path) / "vqav2/v2_mscoco_val2014_annotations.json"
    rows = json.loads(path.read_text())["annotations"]
    path.write_text(json.dumps({"annotations": rows[:2]}))
    with pytest.raises(DataError, match=r"1 questions are only in it or in v2_OpenEnded.*such as 3"):
        VQAV2().read(tmp_path, split="val")


def test_a_torn_question_file_names_its_line(tmp_path: Path) -> None:
    path = write_test(tmp_path) / "vqav2/llava_vqav2_mscoco_test-dev2015.jsonl"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(DataError, match=r"test-dev2015.jsonl:2: no JSON"):
        VQAV2().read(tmp_path, split=None)


@pytest.mark.parametrize("split", ["train", "test-std"])
def test_an_unknown_split_names_those_that_there_are(tmp_path: Path, split: str) -> None:
    with pytest.raises(DataError, match="there are test-dev, test, val"):
        VQAV2().read(tmp_path, split=split)


def write_vizwiz(root: Path) -> Path:
    (root / "vizwiz").mkdir()
    (root / "vizwiz/llava_test.jsonl").write_text((GOLDEN / "vizwiz_test.jsonl").read_text())
    return root


def test_vizwiz_writes_what_the_originals_converter_writes(tmp_path: Path) -> None:
    questions = VizWiz().read(write_vizwiz(tmp_path), split=None)
    assert questions[1].images == (tmp_path / "vizwiz/test/im1.jpg",)
    answers = read_answers(GOLDEN / "answers.jsonl")
    path = VizWiz().write_upload(questions, answers[::-1], tmp_path / "upload.json")
    assert path is not None
    assert json.loads(path.read_text()) == json.loads((GOLDEN / "vizwiz.json").read_text())


def test_vizwiz_says_where_it_is_scored_and_counts_the_unanswerable(tmp_path: Path) -> None:
    questions = VizWiz().read(write_vizwiz(tmp_path), split="test")
    score = VizWiz().score(questions, said(questions, "Unanswerable.", "a", "b", "unanswerable", "c"))
    assert score.tables["answers"] == [{"answer": "unanswerable", "rows": 2}, {"answer": "other", "rows": 3}]
    assert score.headline == {} and "2185" in score.notes[-1]


def test_vizwiz_needs_every_answer(tmp_path: Path) -> None:
    questions = VizWiz().read(write_vizwiz(tmp_path), split=None)
    with pytest.raises(DataError, match="vizwiz: 1 of 5 questions have no answer, such as 4"):
        VizWiz().write_upload(questions, said(questions[:4], "a", "b", "c", "d"), tmp_path / "upload.json")
