"""The original's question files: JSONL with question_id, image, text (the instruction is part of it), category."""

from __future__ import annotations

from pathlib import Path

from llava.errors import DataError
from llava.eval.matching import check_rows, unique_ids
from llava.eval.reading import read_lines
from llava.eval.task import Question

SHORT_ANSWER = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
GREEDY_128 = {"temperature": 0.0, "max_new_tokens": 128}


def read_original_questions(
    path: Path, *, images: Path, what: str, published: int | None = None, way_out: str = "download it again"
) -> list[Question]:
    """The questions of a file, in its order. meta: question_id (as it is there), image, category.

    images: the folder that `image` is in. published: the rows of the published file; a file that is shorter or longer
    is refused as `check_rows` says. Raises DataError.
    """
    rows = read_lines(path, what=what, needs=("question_id", "image", "text"))
    if published is not None:
        check_rows(len(rows), published, path=path, way_out=way_out)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row["image"], str) or not isinstance(row["text"], str):
            raise DataError(f"{path}: row {number}: image and text are texts; it should be {what}")
    ids = unique_ids([row["question_id"] for row in rows])
    return [
        Question(
            id=key,
            prompt=row["text"],
            images=(images / row["image"],),
            meta={
                "question_id": row["question_id"],
                "image": row["image"],
                "category": row.get("category", "default"),
                "origin": f"{path.name}:{number}",
            },
            max_new_tokens=128,
        )
        for number, (key, row) in enumerate(zip(ids, rows, strict=True), start=1)
    ]


def first_line(prompt: str) -> str:
    """The question itself: what stands before the instruction."""
    return prompt.split("\n", 1)[0]
