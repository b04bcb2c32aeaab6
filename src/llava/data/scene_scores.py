"""How an answer about a drawn scene is marked: exact match, a box's overlap, or F1 over the objects named."""

from __future__ import annotations

import re
from collections import Counter

from llava.data.scenes import COLOURS, REGIONS, SHAPES, SIZES, Box

_NUMBER = r"(\d*\.?\d+)"
_BOX = re.compile(r"\[\s*" + r"\s*,\s*".join([_NUMBER] * 4) + r"\s*\]")
_COLOUR, _SHAPE, _SIZE = "|".join(COLOURS), "|".join(SHAPES), "|".join(SIZES)
_REGION = "|".join(sorted(REGIONS, key=len, reverse=True))
_NAMED = re.compile(rf"\b({_COLOUR}) ({_SHAPE})\b")
_DETAILED = re.compile(rf"\b({_SIZE}) ({_COLOUR}) ({_SHAPE}) (?:at|in|on) (?:the )?({_REGION})\b")


def score_answer(kind: str, expected: str, text: str) -> float:
    """0 to 1. Box: 1 where IoU with the expected box is over .5; caption and detail: F1; others: equal but for case,
    outer spaces and a final full stop."""
    if kind == "box":
        return float(overlap(parse_box(expected), parse_box(text)) > 0.5)
    if kind == "caption":
        return f1(Counter(_NAMED.findall(expected.lower())), Counter(_NAMED.findall(text.lower())))
    if kind == "detail":
        return f1(Counter(_DETAILED.findall(expected.lower())), Counter(_DETAILED.findall(text.lower())))
    return float(_plain(expected) == _plain(text))


def parse_box(text: str) -> Box | None:
    """The first `[x1, y1, x2, y2]` in a text, or None."""
    match = _BOX.search(text)
    if match is None:
        return None
    x1, y1, x2, y2 = (float(value) for value in match.groups())
    return x1, y1, x2, y2


def overlap(first: Box | None, second: Box | None) -> float:
    """Intersection over union; 0 where a box is missing or empty."""
    if first is None or second is None:
        return 0.0
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    if width <= 0 or height <= 0:
        return 0.0
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (first, second))
    return width * height / (areas - width * height)


def f1(expected: Counter[tuple[str, ...]], found: Counter[tuple[str, ...]]) -> float:
    """Harmonic mean of precision and recall over two bags; 0 where either is empty.

    >>> f1(Counter({("red", "star"): 1}), Counter({("red", "star"): 1, ("blue", "star"): 1}))
    0.6666666666666666
    """
    shared = (expected & found).total()
    return 2 * shared / (expected.total() + found.total()) if shared else 0.0


def _plain(text: str) -> str:
    return text.strip().rstrip(".").strip().lower()
