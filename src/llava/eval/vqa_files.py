"""Questions and annotations in VQA's own form: two JSON objects with a list each, met by question_id."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.errors import DataError
from llava.eval.matching import check_rows
from llava.eval.question_files import SHORT_ANSWER
from llava.eval.reading import check_keys, read_json
from llava.eval.task import Question


def read_vqa_questions(
    questions: Path, annotations: Path, *, images: Path, picture: str, meta: Mapping[str, Any], published: int
) -> list[Question]:
    """Questions in their file's order, with the people's answers, question_type and answer_type in their meta.

    picture: the name of a picture in `images`, with {:012} where its number goes. meta: more of it, the same for all.
    published: rows of both published files. Raises DataError, also when the files are not of the same questions.
    """
    rows = _list(questions, "questions", ("question_id", "image_id", "question"), published)
    notes = _list(annotations, "annotations", ("question_id", "question_type", "answer_type", "answers"), published)
    by_id = {str(row["question_id"]): row for row in notes}
    if differing := {str(row["question_id"]) for row in rows} ^ set(by_id):
        raise DataError(
            f"{annotations}: {len(differing):,} questions are only in it or in {questions.name}, "
            f"such as {min(differing)}; download both again"
        )
    found = []
    for row in rows:
        note = by_id[str(row["question_id"])]
        about = {
            "question_id": row["question_id"],
            "answers": [answer["answer"] for answer in note["answers"]],
            "question_type": note["question_type"],
            "answer_type": note["answer_type"],
            **meta,
        }
        image = images / picture.format(row["image_id"])
        found.append(Question(str(row["question_id"]), f"{row['question']}\n{SHORT_ANSWER}", (image,), about, 128))
    return found


def _list(path: Path, key: str, needs: Sequence[str], published: int) -> list[dict[str, Any]]:
    what = f"VQA's {key}, an object with a list {key!r}"
    value = read_json(path, what=what)
    check_keys(value, (key,), origin=str(path), what=what)
    rows: list[dict[str, Any]] = value[key]
    for number, row in enumerate(rows):
        check_keys(row, needs, origin=f"{path}: row {number}", what=what)
    check_rows(len(rows), published, path=path)
    return rows
