"""Which answer belongs to which question where the benchmark's ids are not enough, and which folder is the benchmark's.

MME asks two questions under one id, TextVQA several: those are told apart by their words.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from llava.errors import DataError
from llava.eval.task import AnswerRow, Question

Pair = tuple[Question, AnswerRow]


def benchmark_folder(root: Path, *names: str) -> Path:
    """The first of root/name that is a folder, else root itself: ROOT may hold all benchmarks, or be one of them."""
    return next((root / name for name in names if (root / name).is_dir()), root)


def first_there(*paths: Path) -> Path:
    """The first path that exists, else the first: files lie in more than one place in the copies that go round."""
    return next((path for path in paths if path.exists()), paths[0])


def check_rows(found: int, published: int, *, path: Path, way_out: str = "download it again") -> None:
    """Raise DataError when a file of `published` rows was cut off, or is another version.

    Less than half of the rows is taken for a set made on purpose (a trial, a test), of which the score then has a note.
    """
    if found != published and found * 2 > published:
        raise DataError(f"{path}: {found:,} rows, but the published file has {published:,}; {way_out}")


def unique_ids(official: Sequence[object]) -> list[str]:
    """Ids as text; those after the first with the same id are id#2, id#3 ..."""
    seen: dict[str, int] = {}
    ids = []
    for value in map(str, official):
        seen[value] = seen.get(value, 0) + 1
        ids.append(value if seen[value] == 1 else f"{value}#{seen[value]}")
    return ids


def match_by_words(
    questions: Sequence[Question],
    answers: Sequence[AnswerRow],
    *,
    task: str,
    words: Callable[[str], str] = str,
) -> list[Pair]:
    """Questions with their answers, in the order of the ANSWERS, which some official scorers go by.

    An answer names its question by `metadata.id` (written here), or by the benchmark's id and, where several questions
    share it, its prompt. words: what of a prompt tells questions apart. Raises DataError for answers that are missing,
    given twice or to no question.
    """
    by_id = {question.id: question for question in questions}
    groups: dict[str, list[Question]] = {}
    for question in questions:
        groups.setdefault(str(question.meta.get("question_id", question.id)), []).append(question)
    taken: set[str] = set()
    pairs = []
    for answer in answers:
        question = _find(answer, by_id, groups, taken, words=words, task=task)
        taken.add(question.id)
        pairs.append((question, answer))
    if missing := [question.id for question in questions if question.id not in taken]:
        raise DataError(
            f"{task}: {len(missing):,} of {len(questions):,} questions have no answer, such as {missing[0]}; "
            "run again to go on, or give the whole file"
        )
    return pairs


def in_question_order(pairs: Sequence[Pair], questions: Sequence[Question]) -> list[Pair]:
    """Pairs in the order of the questions."""
    places = {question.id: place for place, question in enumerate(questions)}
    return sorted(pairs, key=lambda pair: places[pair[0].id])


def _find(
    answer: AnswerRow,
    by_id: Mapping[str, Question],
    groups: Mapping[str, list[Question]],
    taken: set[str],
    *,
    words: Callable[[str], str],
    task: str,
) -> Question:
    metadata = answer.meta.get("metadata")
    own = metadata.get("id") if isinstance(metadata, Mapping) else None
    group = [by_id[own]] if isinstance(own, str) and own in by_id else groups.get(answer.question_id, [])
    if not group and answer.question_id in by_id:
        group = [by_id[answer.question_id]]
    prompt = answer.meta.get("prompt")
    if len(group) > 1 and isinstance(prompt, str):
        group = [question for question in group if words(question.prompt) == words(prompt)]
    if not group:
        raise DataError(f"{task}: an answer to no question, {answer.question_id}; is it another split or benchmark?")
    free = [question for question in group if question.id not in taken]
    if not free:
        raise DataError(f"{task}: two answers to question {answer.question_id}; keep one")
    return free[0]
