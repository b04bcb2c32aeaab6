"""The answer normalisers and the soft accuracy of the VQA family, to the letter, oddities included.

Two normalisers are in use and differ: vqaEval's (VQAv2's own scorer) and m4c's, "EvalAI" (TextVQA; LLaVA's uploads for
VQAv2 and VizWiz). Known oddities that are kept, as published figures depend on them:
- only the first 32 dots are removed (the official code passes re.UNICODE, which is 32, where `sub` takes a count);
  `all_dots` repairs that;
- a dot is removed when no digit follows; what comes before it is not looked at (a mistyped look-behind);
- four contractions are written with capitals but looked up in lower case, so they never match.
The table of contractions lies beside this file, with its licence.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from importlib import resources

PUNCTUATION = (";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!")
ARTICLES = frozenset({"a", "an", "the"})
NUMBERS = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}
CONTRACTIONS: dict[str, str] = json.loads(
    resources.files("llava.eval.metrics").joinpath("vqa_contractions.json").read_text(encoding="utf-8")
)
DOTS_REMOVED = 32
_DIGIT_COMMA = re.compile(r"\d,\d")
_DOT = re.compile(r"\.(?!\d)")


def tidy(text: str) -> str:
    """Line ends and tabs as blanks, none at the ends: all that is done to VQAv2 answers when all ten people agree."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalise_vqa(text: str, *, all_dots: bool = False) -> str:
    """As GT-Vision-Lab's vqaEval does. `1,000-dogs` becomes `1000dogs`: one comma in a number and no mark is spaced."""
    return _words(_punctuation(tidy(text), all_dots=all_dots))


def normalise_m4c(text: str, *, all_dots: bool = False) -> str:
    """As m4c's EvalAIAnswerProcessor does: commas and question marks go first, and `'s` becomes a word of its own."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return _words(_punctuation(tidy(text), all_dots=all_dots))


def has_dot_limit(text: str) -> bool:
    """Whether the limit of 32 dots changes what becomes of an answer."""
    return normalise_vqa(text) != normalise_vqa(text, all_dots=True)


def soft_accuracies(truths: Sequence[str]) -> dict[str, float]:
    """Score by answer: of each person's answer left out, min(1, equal ones among the others / 3); the mean of these.

    truths: normalised answers of ten people. With ten: 0, .3, .6, .9, 1 for 0, 1, 2, 3 and more equal ones; an answer
    that is not among the keys has 0. It is not min(1, equal / 3).
    """
    count = len(truths)
    scores = {}
    for answer in set(truths):
        equal = truths.count(answer)
        others = min(1.0, (equal - 1) / 3) * equal + min(1.0, equal / 3) * (count - equal)
        scores[answer] = others / count
    return scores


def vqa_accuracy(text: str, truths: Sequence[str], *, strict: bool = False) -> float:
    """VQAv2's score of an answer, 0 to 1: both sides are normalised only when the ten people do not all agree.

    So "Yes" is wrong where ten said "yes". strict: always normalised, and every dot goes.
    """
    said, meant = tidy(text), [tidy(truth) for truth in truths]
    if strict or len(set(truths)) > 1:
        said = normalise_vqa(said, all_dots=strict)
        meant = [normalise_vqa(truth, all_dots=strict) for truth in meant]
    return soft_accuracies(meant).get(said, 0.0)


def _punctuation(text: str, *, all_dots: bool) -> str:
    number_comma = _DIGIT_COMMA.search(text) is not None
    out = text
    for mark in PUNCTUATION:
        beside_blank = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if beside_blank or number_comma else " ")
    return _DOT.sub("", out, count=0 if all_dots else DOTS_REMOVED)


def _words(text: str) -> str:
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)
