"""RefCOCO: phrases read from MiniGPT-4's files, boxes scored by XTuner's rule."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava.errors import DataError
from llava.eval.task import AnswerRow
from llava.eval.tasks.refcoco import REFCOCO, REFCOCO_PLUS, REFCOCOG, hit, overlap, to_grid

FULL = (0.0, 0.0, 100.0, 100.0)


def _folder(root: Path) -> Path:
    rows = [
        {"img_id": "COCO_train2014_000000000007_0.jpg", "sents": "left cup", "bbox": [1.0, 2.0, 50.5, 20], "height": 50,
         "width": 333},
        {"img_id": "COCO_train2014_000000000007_1.jpg", "sents": "dog", "bbox": [0, 0, 100, 50], "height": 50,
         "width": 100},
    ]  # fmt: skip
    (root / "refcoco").mkdir()
    (root / "refcoco/refcoco_val.json").write_text(json.dumps(rows))
    return root


def test_a_phrase_becomes_a_question_on_its_picture(tmp_path: Path) -> None:
    first, second = REFCOCO.read(_folder(tmp_path), split=None)
    assert first.prompt == "[refer] give me the location of left cup"
    assert first.images == (tmp_path / "coco/train2014/COCO_train2014_000000000007.jpg",) == second.images
    assert first.meta["box"] == (0, 4, 15, 44)  # 51.5 / 333 is 15.47: cut, not rounded
    assert first.max_new_tokens == 100


def test_the_pictures_of_2017_are_taken_when_they_are_there(tmp_path: Path) -> None:
    (tmp_path / "coco/train2017").mkdir(parents=True)
    (tmp_path / "coco/train2017/000000000007.jpg").write_bytes(b"")
    assert REFCOCO.read(_folder(tmp_path), split="val")[0].images == (tmp_path / "coco/train2017/000000000007.jpg",)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("{<0><0><100><100>}", True),
        ("[0, 0, 100, 100]", True),
        ("the 1 box is 0 0 100 100", False),
        ("{<0.0><0.0><100.0><100.0>}", False),
        ("{<0><0><100>}", False),
        ("", False),
        ("{<100><100><0><0>}", False),
    ],
)
def test_an_answer_holds_exactly_four_whole_numbers(answer: str, expected: bool) -> None:
    assert hit(answer, FULL) is expected


def test_half_the_union_is_not_enough_and_both_edges_count() -> None:
    box = to_grid([0, 0, 100, 100], width=100, height=100)
    # 50 of 101 columns and 100 of 101 rows; then 51 and 101
    assert not hit("0 0 49 99", box)
    assert overlap((0, 0, 50, 100), box) == pytest.approx(51 / 101, rel=1e-12)
    assert hit("0 0 50 100", box)
    assert overlap((0, 0, 0, 0), (0, 0, 1, 0)) == 0.5
    assert not hit("0 0 0 0", (0, 0, 1, 0))


def test_a_box_of_no_area_is_a_miss_and_not_a_division_by_zero() -> None:
    assert overlap((1, 0, 0, 0), (1, 0, 0, 0)) == 0.0


def test_strict_reads_decimals_and_refuses_an_inverted_box() -> None:
    assert hit("{<0.5><0.5><99.5><99.5>}", FULL, strict=True)
    assert not hit("100 100 0 0", FULL, strict=True)


def test_the_score_counts_every_row_and_says_what_decimals_cost(tmp_path: Path) -> None:
    questions = REFCOCO.read(_folder(tmp_path), split="val")
    answers = [AnswerRow("1", "{<0><0><100><100>}"), AnswerRow("0", "0.0 4.0 15.0 44.0")]
    score = REFCOCO.score(questions, answers)
    assert score.headline == {"accuracy": 0.5}
    assert score.printed == "Acc: 0.5"
    assert score.correct == {"0": 0.0, "1": 1.0}
    assert any(note.startswith("2 questions; the published split has 10,834") for note in score.notes)
    assert any(note.startswith("1 answers of four numbers with decimals are counted wrong") for note in score.notes)
    assert REFCOCO.score(questions, answers, strict=True).headline == {"accuracy": 1.0}


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ([AnswerRow("0", "x")], "1 of 2 questions have no answer, such as 1"),
        ([AnswerRow("0", "x"), AnswerRow("0", "y"), AnswerRow("1", "z")], "two answers to question 0"),
        ([AnswerRow("0", "x"), AnswerRow("1", "y"), AnswerRow("2", "z")], "1 answers to no question, such as 2"),
    ],
)
def test_missing_double_and_foreign_answers_are_refused(tmp_path: Path, answers: list[AnswerRow], said: str) -> None:
    questions = REFCOCO.read(_folder(tmp_path), split="val")
    with pytest.raises(DataError, match=said):
        REFCOCO.score(questions, answers)


def test_a_missing_a_torn_and_a_foreign_file_say_what_they_should_be(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"refcocog_val\.json: not there; it is MiniGPT-4's"):
        REFCOCOG.read(tmp_path, split=None)
    path = _folder(tmp_path) / "refcoco/refcoco_val.json"
    whole = path.read_text()
    path.write_text(whole[:100])
    with pytest.raises(DataError, match=r"refcoco_val\.json:1: no JSON .* fetch it again"):
        REFCOCO.read(tmp_path, split="val")
    path.write_text('[{"img_id": "x"}]')
    with pytest.raises(DataError, match="row 0: no sents, bbox, height, width"):
        REFCOCO.read(tmp_path, split="val")
    with pytest.raises(DataError, match="no split 'testC'"):
        REFCOCO_PLUS.read(tmp_path, split="testC")
