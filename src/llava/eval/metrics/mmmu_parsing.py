"""MMMU's rules for what an answer in free text says: an option's letter, or a phrase and its numbers."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence

_ENDS = (",", ".", "!", "?", ";", ":", "'")
_INDICATORS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = frozenset([":", ",", ".", "!", "?", ";", "'"])
_SENTENCES = re.compile(r"\.\s(?=[A-Z])|\n")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)
_MIN_WORDS_FOR_TEXT = 5


def parse_choice(text: str, options: Mapping[str, str]) -> str | None:
    """The letter that stands last, as (A), else as a word; else, in more than five words, the option's text that
    stands last. None when nothing does, where the official rule guesses (`guess`)."""
    for mark in _ENDS:
        text = text.strip(mark)
    text = f" {text} "
    for shape in ("({})", " {} "):
        places = {letter: text.rfind(shape.format(letter)) for letter in options}
        if found := {letter: place for letter, place in places.items() if place >= 0}:
            return max(found, key=found.__getitem__)
    if len(text.split()) > _MIN_WORDS_FOR_TEXT:
        lowered = text.lower()
        places = {letter: lowered.rfind(option.lower()) for letter, option in options.items()}
        if found := {letter: place for letter, place in places.items() if place >= 0}:
            return max(found, key=found.__getitem__)
    return None


def guess(letters: Sequence[str], drawn: random.Random) -> str:
    """The official rule for an answer that says nothing: a letter at random, from one seed over the whole run."""
    return drawn.choice(letters)


def parse_open(text: str) -> set[str | float]:
    """The phrases that an open answer gives, and their numbers rounded to two decimals."""
    phrases = _key_phrases(text)
    found: set[str | float] = set()
    for piece in [*phrases, *(number for phrase in phrases for shape in _NUMBERS for number in shape.findall(phrase))]:
        found.update(normalise(piece))
    return found


def normalise(text: str) -> list[str | float]:
    """A number as a float of two decimals; else small letters, a lone one with a space on either side."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        lowered = text.lower()
        return [f" {lowered}", f"{lowered} "] if len(lowered) == 1 else [lowered]


def matches_open(gold: str | Sequence[str], parsed: set[str | float]) -> bool:
    """Whether a phrase holds a reference answer, or a number equals one."""
    references = [gold] if isinstance(gold, str) else gold
    wanted = [value for reference in references for value in normalise(reference)]
    for value in parsed:
        if isinstance(value, str):
            if any(isinstance(reference, str) and reference in value for reference in wanted):
                return True
        elif value in wanted:
            return True
    return False


def _key_phrases(text: str) -> list[str]:
    """The shortest of what follows an indicator, sentence by sentence; the last sentence may be an equation.

    The text is in small letters before it is cut at capitals, so that line ends alone cut it: as official.
    """
    lowered = text.strip().strip(".").lower()
    sentences = _SENTENCES.split(lowered)
    phrases = []
    for index, sentence in enumerate(sentences):
        indicators = (*_INDICATORS, "=") if index == len(sentences) - 1 else _INDICATORS
        shortest = ""
        for indicator in indicators:
            if indicator in sentence:
                tail = sentence.split(indicator)[-1].strip()
                if not shortest or len(tail) < len(shortest):
                    shortest = tail
        if shortest and shortest not in _TRIVIAL:
            phrases.append(shortest)
    return phrases or [lowered]
