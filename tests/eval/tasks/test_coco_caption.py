"""COCO Caption: Karpathy's files read, captions scored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava.errors import DataError
from llava.eval.metrics import caption_tokens
from llava.eval.task import AnswerRow
from llava.eval.tasks.coco_caption import COCOCaption


def _folder(root: Path) -> Path:
    pictures = [{"image": f"val2014/COCO_val2014_{number:012d}.jpg", "caption": ["not read"]} for number in (9, 42)]
    annotations = [
        {"image_id": 9, "id": 0, "caption": "A dog sleeps on a sofa."},
        {"image_id": 42, "id": 1, "caption": "Two kids play with a ball."},
        {"image_id": 9, "id": 2, "caption": "The dog is asleep."},
        {"image_id": 77, "id": 3, "caption": "Of no question."},
    ]
    (root / "coco_caption").mkdir(exist_ok=True)
    (root / "coco_caption/coco_karpathy_val.json").write_text(json.dumps(pictures))
    content = {"images": [{"id": 9}, {"id": 42}, {"id": 77}], "annotations": annotations}
    (root / "coco_caption/coco_karpathy_val_gt.json").write_text(json.dumps(content))
    return root


def test_a_picture_is_asked_once_and_has_all_its_captions(tmp_path: Path) -> None:
    first, second = COCOCaption().read(_folder(tmp_path), split=None)
    assert (first.id, second.id) == ("9", "42")
    assert first.prompt == "Describe the image in detail."
    assert first.images == (tmp_path / "coco/val2014/COCO_val2014_000000000009.jpg",)
    assert first.meta["captions"] == ("A dog sleeps on a sofa.", "The dog is asleep.")


def test_captions_alike_score_highest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caption_tokens, "java_is_there", lambda: False)
    questions = COCOCaption().read(_folder(tmp_path), split="val")
    same = [AnswerRow("42", "Two kids play with a ball."), AnswerRow("9", "A dog sleeps on a sofa!")]
    score = COCOCaption().score(questions, same)
    assert set(score.headline) == {"Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr"}
    assert score.headline["Bleu_4"] == pytest.approx(1.0, abs=1e-8)
    assert score.headline["ROUGE_L"] == 1.0
    assert any("llava[caption]" in note for note in score.notes)
    assert any(note.startswith("2 questions; the published split has 5,000") for note in score.notes)
    other = [AnswerRow("42", "..."), AnswerRow("9", "a bus")]
    worse = COCOCaption().score(questions, other)
    assert worse.headline["CIDEr"] < score.headline["CIDEr"]
    assert any(note.startswith("1 answers hold no word") for note in worse.notes)


def test_a_picture_without_captions_is_refused(tmp_path: Path) -> None:
    root = _folder(tmp_path)
    (root / "coco_caption/coco_karpathy_val_gt.json").write_text('{"annotations": [{"image_id": 9, "caption": "x"}]}')
    with pytest.raises(DataError, match="picture 42 has no captions"):
        COCOCaption().read(root, split="val")
    (root / "coco_caption/coco_karpathy_val_gt.json").write_text('[{"image_id": 9}]')
    with pytest.raises(DataError, match="no object but list"):
        COCOCaption().read(root, split="val")
