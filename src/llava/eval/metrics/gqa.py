"""GQA's rules: how an answer is compared, what a question is counted under, and how far answers are spread."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

_NO_STEPS = ("exist", "query: name", "choose name")


def prediction(text: str, *, strict: bool = False) -> str:
    """An answer as it is compared."""
    return (text.strip().rstrip(".").strip() if strict else text.rstrip(".")).lower()


def distribution(gold: Mapping[str, Counter[str]], told: Mapping[str, Counter[str]]) -> float:
    """Chi-square of the answers told against the right ones, the mean over groups by their size, over 100."""
    total = weight = 0.0
    for group, counts in gold.items():
        size = counts.total()
        total += size * sum((told[group][answer] - count) ** 2 / count for answer, count in counts.items())
        weight += size
    return total / weight / 100 if weight else 0.0


def count_steps(row: Mapping[str, Any]) -> int:
    """Operations of a question's program, without those that only name or ask for being there."""
    operations = [f"{step['operation']}: {step['argument']}" for step in row.get("semantic", ())]
    return sum(not any(word in operation for word in _NO_STEPS) for operation in operations)


def tables_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a question counts under: table's name -> row of it."""
    return {
        "all": "",
        "kind": "open" if row["types"]["structural"] == "query" else "binary",
        "structural": row["types"]["structural"],
        "semantic": row["types"]["semantic"],
        "steps": count_steps(row),
        "words": len(row["question"].split()),
    }
