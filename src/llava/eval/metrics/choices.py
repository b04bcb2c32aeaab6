"""Which option an answer in free text names, by the rules of VLMEvalKit and of XTuner for MMBench."""

from __future__ import annotations

import re
from collections.abc import Mapping

# VLMEvalKit's refusals; such an answer is wrong, and no judge is asked.
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_STATED = re.compile(r"answer\s+is\s+([A-Z])(?![A-Za-z])")
_CAPITALS = re.compile(r"[A-D]+")
_LONE_LETTER = re.compile(r"(?<![A-Za-z])([A-E])(?![A-Za-z])")
_LAST_WORDS = 5


def find_option(answer: str, options: Mapping[str, str]) -> str | None:
    """VLMEvalKit's exact matching: an option's letter, "Z" for a refusal, None when nothing is certain.

    First the one option letter that stands as a word among the last five; then "answer is X"; then the one option
    whose text is in the answer, if the answer is at most twice as long as all options.
    """
    if any(refusal in answer for refusal in _REFUSALS):
        return "Z"
    words = answer.translate(_MARKS).split()
    named = [letter for letter in options if letter in words]
    if len(named) == 1 and words.index(named[0]) > len(words) - _LAST_WORDS:
        return named[0]
    if not named and "Z" in words:
        return "Z"
    stated: set[str] = {letter for letter in _STATED.findall(answer.translate(_MARKS)) if letter in options}
    if len(stated) == 1:
        return stated.pop()
    lowered = answer.lower()
    if len(lowered) > 2 * sum(len(text) for text in options.values()):
        return None
    contained = [letter for letter, text in options.items() if text.lower() in lowered]
    return contained[0] if len(contained) == 1 else None


def first_capitals(answer: str) -> str:
    """XTuner's: the first run of A to D, so that "Answer: B" is "A" and "AB" is neither A nor B."""
    found = _CAPITALS.search(answer)
    return found[0] if found else ""


def find_option_anywhere(answer: str, options: Mapping[str, str]) -> str | None:
    """The repaired rule: the one option letter that stands alone, next to any mark or script; else `find_option`."""
    named: set[str] = {letter for letter in _LONE_LETTER.findall(answer) if letter in options}
    return named.pop() if len(named) == 1 else find_option(answer, options)
