"""Benchmark files and answers, read so that a missing, torn or foreign one is an error that names the way out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.errors import DataError
from llava.eval.task import AnswerRow, Question


def read_text(path: Path, *, what: str) -> str:
    """The text of a benchmark's file. Raises DataError saying what the file is and where `--describe` says more."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path}: not there; it is {what} (llava eval --describe says where from)") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error}); it is {what}; fetch it again") from None


def read_json(path: Path, *, what: str) -> Any:
    """A JSON file. A torn one is a DataError with the line."""
    text = read_text(path, what=what)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: no JSON ({error.msg}); it is {what}; fetch it again") from None


def read_lines(path: Path, *, what: str, needs: Sequence[str] = ()) -> list[dict[str, Any]]:
    """A JSONL file of objects, each with the keys of `needs`. Empty lines are passed over."""
    rows = []
    for number, line in enumerate(read_text(path, what=what).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: no JSON ({error.msg}); it is {what}; fetch it again") from None
        check_keys(row, needs, origin=f"{path}:{number}", what=what)
        rows.append(row)
    if not rows:
        raise DataError(f"{path}: no rows; it is {what}; fetch it again")
    return rows


def check_keys(row: Any, needs: Sequence[str], *, origin: str, what: str) -> None:
    """Raise DataError for a row that is no object or lacks a key."""
    if not isinstance(row, Mapping):
        raise DataError(f"{origin}: no object but {type(row).__name__}; it should be {what}")
    missing = [key for key in needs if key not in row]
    if missing:
        raise DataError(f"{origin}: no {', '.join(missing)}; it should be {what}")


def row_notes(count: int, published: int | None) -> list[str]:
    """A sentence when there are not as many questions as the published split has; figures then do not compare."""
    if published is None or count == published:
        return []
    return [f"{count:,} questions; the published split has {published:,}, so the figures do not compare"]


def match_answers(
    questions: Sequence[Question], answers: Sequence[AnswerRow], *, task: str
) -> list[tuple[Question, AnswerRow]]:
    """Each question with its answer, in the questions' order.

    Raises DataError for missing, duplicate and unknown answers: most official scorers go wrong on them in silence.
    """
    by_id: dict[str, AnswerRow] = {}
    for answer in answers:
        if answer.question_id in by_id:
            raise DataError(f"{task}: two answers to question {answer.question_id}; keep one")
        by_id[answer.question_id] = answer
    asked = {question.id for question in questions}
    if len(asked) != len(questions):
        raise DataError(f"{task}: {len(questions) - len(asked)} questions share an id; the questions file is damaged")
    if unknown := sorted(by_id.keys() - asked):
        raise DataError(f"{task}: {len(unknown):,} answers to no question, such as {unknown[0]}; is it another split?")
    if missing := [question.id for question in questions if question.id not in by_id]:
        raise DataError(
            f"{task}: {len(missing):,} of {len(questions):,} questions have no answer, such as {missing[0]}; "
            "run again to go on, or give the whole file"
        )
    return [(question, by_id[question.id]) for question in questions]
