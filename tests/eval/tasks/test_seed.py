"""SEED-Bench: both files read together, letters compared as they stand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava.errors import DataError
from llava.eval.task import AnswerRow
from llava.eval.tasks.seed import SEED


def _folder(root: Path) -> Path:
    asked = [
        {"question_id": 0, "image": "SEED-Bench-image/0", "text": "Where?\nA. x", "category": 1},
        {"question_id": 1, "image": "SEED-Bench-image/1", "text": "How many?", "category": 2},
        {"question_id": "v2", "image": "SEED-Bench-video-image/v2.png", "text": "Then?", "category": 10},
    ]
    (root / "seed_bench").mkdir()
    (root / "seed_bench/llava-seed-bench.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    annotations = [
        {"question_id": "0", "answer": "A", "data_type": "image", "question_type_id": 1},
        {"question_id": "1", "answer": "B", "data_type": "image", "question_type_id": 2},
        {"question_id": "v2", "answer": "C", "data_type": "video", "question_type_id": 10},
    ]
    types = {"Scene Understanding": 1, "Instance Counting": 2, "Action Recognition": 10}
    (root / "seed_bench/SEED-Bench.json").write_text(json.dumps({"question_type": types, "questions": annotations}))
    return root


def test_the_letter_must_stand_alone_and_a_type_without_a_hit_is_zero(tmp_path: Path) -> None:
    questions = SEED().read(_folder(tmp_path), split=None)
    answers = [AnswerRow("v2", "C"), AnswerRow("0", "A"), AnswerRow("1", "B.")]
    score = SEED().score(questions, answers)
    assert score.printed == (
        "Scene Understanding: 100.00%\nInstance Counting: 0.00%\nAction Recognition: 100.00%\n"
        "Total accuracy: 66.67%\nimage accuracy: 50.00%\nvideo accuracy: 100.00%"
    )
    assert score.headline["total"] == pytest.approx(200 / 3, rel=1e-12)
    assert score.notes[0].startswith("1 answers name the right letter with something beside it")
    assert SEED().score(questions, answers, strict=True).headline["total"] == 100.0


def test_a_half_is_asked_alone(tmp_path: Path) -> None:
    (video,) = SEED().read(_folder(tmp_path), split="video")
    assert video.images == (tmp_path / "seed_bench/SEED-Bench-video-image/v2.png",)
    assert video.max_new_tokens == 128
    assert SEED().score([video], [AnswerRow("v2", "A")]).headline == {"total": 0.0, "video": 0.0}


def test_the_upload_has_the_annotations_own_ids(tmp_path: Path) -> None:
    questions = SEED().read(_folder(tmp_path), split=None)
    answers = [AnswerRow(question.id, "A") for question in questions]
    path = SEED().write_upload(questions, answers, tmp_path / "up")
    assert path is not None
    assert path.read_text().splitlines()[0] == '{"question_id": "0", "prediction": "A"}'
    assert path.read_text().splitlines()[2] == '{"question_id": "v2", "prediction": "A"}'


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    root = _folder(tmp_path)
    lines = (root / "seed_bench/llava-seed-bench.jsonl").read_text().splitlines(keepends=True)
    (root / "seed_bench/llava-seed-bench.jsonl").write_text("".join(lines[:2]))
    with pytest.raises(DataError, match=r"2 of 3 questions; it was cut"):
        SEED().read(root, split=None)
    (root / "seed_bench/llava-seed-bench.jsonl").write_text("".join(lines) + lines[0].replace(": 0", ": 7"))
    with pytest.raises(DataError, match="question 7 is not in"):
        SEED().read(root, split=None)
    with pytest.raises(DataError, match="no split 'test'"):
        SEED().read(root, split="test")
