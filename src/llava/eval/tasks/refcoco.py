"""RefCOCO, RefCOCO+ and RefCOCOg, `refer`: name the box that a phrase means. After XTuner's eval_refcoco."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from llava.errors import DataError, name_nearest
from llava.eval.matching import check_rows, first_there
from llava.eval.reading import check_keys, match_answers, read_json, row_notes
from llava.eval.task import AnswerRow, Question, Score, TaskFacts, TaskFile

Box = tuple[float, float, float, float]

PROMPT = "[refer] give me the location of {phrase}"
GRID = 100
_WHOLE = re.compile(r"\d+")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_PICTURE_NUMBER = re.compile(r"\d{12}")


@dataclass(frozen=True)
class RefCOCO:
    """One of the three sets. rows: how many phrases each published split has."""

    name: str
    rows: dict[str, int]
    published: ClassVar[dict[str, float]] = {}

    def describe(self) -> TaskFacts:
        files = [
            TaskFile(f"{self.name}/{self.name}_{split}.json", "phrases and boxes", "MiniGPT-4's eval_data", rows=count)
            for split, count in self.rows.items()
        ]
        files.append(TaskFile("coco/train2014", "COCO's train pictures (or coco/train2017)", "https://cocodataset.org"))
        return TaskFacts(
            title={"refcoco": "RefCOCO", "refcoco+": "RefCOCO+", "refcocog": "RefCOCOg"}[self.name],
            files=files,
            prompt=PROMPT,
            decoding={"temperature": 0.0, "max_new_tokens": 100},
            published_metric="accuracy",
            published=self.published,
            splits=tuple(self.rows),
            traps=(
                "XTuner puts the picture after the text (meta `picture_last`); its models answer {<x1><y1><x2><y2>}.",
                "Corners are whole numbers, cut and not rounded: int(100 * x / width).",
                "The intersection over union counts both edges (+ 1), and must be over .5, not .5 itself.",
                "An answer with decimals holds eight whole numbers and is wrong; so is one with any other number.",
                "MiniGPT-4 scores in pixels and lmms-eval in shares of 1 without + 1: their figures differ.",
            ),
        )

    def read(self, root: Path, *, split: str | None) -> list[Question]:
        split = split or next(iter(self.rows))
        if split not in self.rows:
            raise DataError(f"{self.name}: no split {split!r}; {name_nearest(split, self.rows)}")
        path = root / self.name / f"{self.name}_{split}.json"
        what = f"MiniGPT-4's {path.name}, a list of img_id, sents, bbox, height, width"
        questions = []
        for index, row in enumerate(read_json(path, what=what)):
            check_keys(row, ("img_id", "sents", "bbox", "height", "width"), origin=f"{path}: row {index}", what=what)
            picture = _picture(root, str(row["img_id"]), origin=f"{path}: row {index}")
            meta = {
                "box": to_grid(row["bbox"], width=row["width"], height=row["height"]),
                "split": split,
                "picture_last": True,
            }
            questions.append(Question(str(index), PROMPT.format(phrase=row["sents"]), (picture,), meta, 100))
        if not questions:
            raise DataError(f"{path}: no rows; it is {what}; fetch it again")
        check_rows(len(questions), self.rows[split], path=path)
        return questions

    def score(self, questions: Sequence[Question], answers: Sequence[AnswerRow], *, strict: bool = False) -> Score:
        pairs = match_answers(questions, answers, task=self.name)
        hits = {question.id: hit(answer.text, question.meta["box"], strict=strict) for question, answer in pairs}
        accuracy = sum(hits.values()) / len(hits)
        split = questions[0].meta["split"]
        decimals = sum(not _has_four_whole(answer.text) and _four(answer.text) is not None for _, answer in pairs)
        inverted = sum(_is_inverted(answer.text) for _, answer in pairs)
        treated = "read" if strict else "counted wrong"
        notes = row_notes(len(pairs), self.rows[split])
        notes.append(f"{decimals:,} answers of four numbers with decimals are {treated} ({inverted:,} boxes inverted)")
        return Score(
            headline={"accuracy": accuracy},
            tables={"splits": [{"split": split, "rows": len(pairs), "hits": sum(hits.values()), "accuracy": accuracy}]},
            notes=notes,
            printed=f"Acc: {accuracy}",
            correct={key: float(value) for key, value in hits.items()},
        )

    def write_upload(self, questions: Sequence[Question], answers: Sequence[AnswerRow], path: Path) -> Path | None:
        return None


def _picture(root: Path, image_id: str, *, origin: str) -> Path:
    """COCO_train2014_000000581857_16.jpg is phrase 16 on train2014's picture 581857, which train2017 holds as well."""
    found = _PICTURE_NUMBER.search(image_id)
    if found is None:
        raise DataError(f"{origin}: img_id {image_id!r} holds no COCO picture's twelve digits")
    older = f"COCO_train2014_{found[0]}.jpg"
    return first_there(
        root / "coco/train2014" / older,
        root / "coco/train2017" / f"{found[0]}.jpg",
        root / "train2014" / older,
        root / "train2017" / f"{found[0]}.jpg",
    )


def to_grid(bbox: Sequence[float], *, width: float, height: float) -> tuple[int, int, int, int]:
    """Pixels [x, y, width, height] as corners on the 0 to 100 grid, cut to whole numbers."""
    x, y, w, h = bbox
    return (
        int(x / width * GRID),
        int(y / height * GRID),
        int((x + w) / width * GRID),
        int((y + h) / height * GRID),
    )


def overlap(one: Box, two: Box) -> float:
    """Intersection over union, both edges counted. A union of nothing (an inverted box) is 0."""
    wide = max(0, min(one[2], two[2]) - max(one[0], two[0]) + 1)
    high = max(0, min(one[3], two[3]) - max(one[1], two[1]) + 1)
    areas = [(box[2] - box[0] + 1) * (box[3] - box[1] + 1) for box in (one, two)]
    union = sum(areas) - wide * high
    return wide * high / union if union else 0.0


def hit(text: str, box: Box, *, strict: bool = False) -> bool:
    """Whether an answer names the box. strict: decimals are read as such, and an inverted box is no box."""
    if strict:
        found = _four(text)
        return found is not None and not _is_inverted(text) and overlap(found, box) > 0.5
    if not _has_four_whole(text):
        return False
    x1, y1, x2, y2 = (int(number) for number in _WHOLE.findall(text))
    return overlap((x1, y1, x2, y2), box) > 0.5


def _has_four_whole(text: str) -> bool:
    return len(_WHOLE.findall(text)) == 4


def _four(text: str) -> Box | None:
    numbers = [float(number) for number in _NUMBER.findall(text)]
    return (numbers[0], numbers[1], numbers[2], numbers[3]) if len(numbers) == 4 else None


def _is_inverted(text: str) -> bool:
    box = _four(text)
    return box is not None and (box[0] > box[2] or box[1] > box[3])


REFCOCO = RefCOCO("refcoco", {"val": 10834, "testA": 5657, "testB": 5095})
REFCOCO_PLUS = RefCOCO("refcoco+", {"val": 10758, "testA": 5726, "testB": 4889})
REFCOCOG = RefCOCO("refcocog", {"val": 4896, "test": 9602})
