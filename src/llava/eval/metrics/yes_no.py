"""Yes and no in an answer, as POPE and MME read it, and what the counts come to."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_NO_WORDS = frozenset({"no", "not", "none", "nope", "nothing"})


def read_pope(text: str) -> str:
    """The official reading: "no" when No, not or no is a word before the first full stop; everything else is "yes"."""
    words = text.split(".", 1)[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def read_strictly(text: str) -> str:
    """The first sentence with a word in it: no, not, none, nope, nothing or n't is "no", no word at all is ""."""
    sentences = (re.findall(r"[^\W\d_]+(?:['’]t)?", part.lower()) for part in text.split("."))
    words: list[str] = next((found for found in sentences if found), [])
    if any(word in _NO_WORDS or word.endswith(("n't", "n’t")) for word in words):
        return "no"
    return "yes" if words else ""


def read_mme(text: str) -> str:
    """MME's reading, of lower-cased text: yes or no itself, else whichever stands in the first four characters."""
    text = text.lower()
    if text in ("yes", "no"):
        return text
    return next((word for word in ("yes", "no") if word in text[:4]), "other")


def binary_figures(found: Sequence[str], labels: Sequence[str]) -> tuple[dict[str, Any], list[bool]]:
    """Counts and ratios with yes as the positive, and which are right. found: "yes", "no", or "" for neither.

    Neither is wrong, whichever it should have been. A ratio without a denominator is 0 (POPE's own tool stops there).
    """
    hits = [one == label for one, label in zip(found, labels, strict=True)]
    said = [one or ("no" if label == "yes" else "yes") for one, label in zip(found, labels, strict=True)]
    true_yes = sum(one == label == "yes" for one, label in zip(said, labels, strict=True))
    true_no = sum(one == label == "no" for one, label in zip(said, labels, strict=True))
    false_yes, false_no = said.count("yes") - true_yes, said.count("no") - true_no
    precision, recall = ratio(true_yes, true_yes + false_yes), ratio(true_yes, true_yes + false_no)
    figures = {
        "rows": len(hits),
        "TP": true_yes,
        "FP": false_yes,
        "TN": true_no,
        "FN": false_no,
        "accuracy": ratio(sum(hits), len(hits)),
        "precision": precision,
        "recall": recall,
        "F1": ratio(2 * precision * recall, precision + recall),
        "yes ratio": ratio(said.count("yes"), len(said)),
    }
    return figures, hits


def ratio(part: float, whole: float) -> float:
    """part / whole, 0 of nothing."""
    return part / whole if whole else 0.0
