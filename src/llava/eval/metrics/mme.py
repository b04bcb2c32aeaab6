"""MME's rules: answers read by their first characters, and by picture in pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llava.errors import DataError
from llava.eval.matching import Pair
from llava.eval.metrics.yes_no import ratio, read_mme, read_strictly
from llava.eval.task import AnswerRow, Question


def read_answer(text: str, *, strict: bool) -> str:
    """yes, no or other; a tab or line end is a blank, where the official tool stops. strict: of the whole text."""
    if not strict:
        return read_mme(text.replace("\t", " ").replace("\n", " "))
    words = set(text.lower().replace(".", " ").replace(",", " ").split())
    meant = read_strictly(text)
    return "no" if meant == "no" else "yes" if "yes" in words else "other"


def is_right(question: Question, answer: AnswerRow, *, strict: bool) -> bool:
    """Whether an answer is the release's."""
    return bool(read_answer(answer.text, strict=strict) == question.meta["answers"][0])


def figures_of(
    asked: Sequence[Pair], twos: Sequence[Sequence[Pair]], hits: Mapping[str, bool], *, strict: bool
) -> dict[str, Any]:
    """A task's row: of all questions, and of `twos`, the pairs. score: both shares in percent, at most 200."""
    both = sum(all(hits[question.id] for question, _ in two) for two in twos)
    accuracy, accuracy_plus = ratio(sum(hits.values()), len(asked)), ratio(both, len(twos))
    others = sum(read_answer(answer.text, strict=strict) == "other" for _, answer in asked)
    return {
        "rows": len(asked),
        "accuracy": accuracy,
        "accuracy+": accuracy_plus,
        "other": others,
        "score": accuracy * 100 + accuracy_plus * 100,
    }


def by_picture(asked: Sequence[Pair]) -> list[list[Pair]]:
    """Answers on one picture together, in the order of the first of them."""
    pictures: dict[str, list[Pair]] = {}
    for pair in asked:
        pictures.setdefault(pair[0].meta["picture"], []).append(pair)
    if wrong := [name for name, two in pictures.items() if len(two) > 2]:
        raise DataError(f"mme: {len(pictures[wrong[0]])} questions on picture {wrong[0]}; MME has two a picture")
    return list(pictures.values())
