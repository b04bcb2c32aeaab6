"""ScienceQA's rules: the choice that an answer names, accuracy by subject, context, grade and topic, and with GPT-4.

The reading is that of LLaVA's eval_science_qa, oddities included: "A." and "The answer is A" at a text's end name
nothing, and a letter beyond the choices is wrong. No guesses are drawn for answers that name nothing; the original's
script for GPT-4 does draw, so its counts differ a little from run to run, and ours is what it has without luck.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LETTERS = ("A", "B", "C", "D", "E")
FAILED = "FAILED"
_SENTENCE = re.compile(r"The answer is ([A-Z]).")  # the dot stands for any character, as in the original
TOPICS = ("punctuation", "literacy-in-science", "verbs", "pronouns", "civics", "culture", "word-study", "economics",
          "physics", "units-and-measurement", "science-and-engineering-practices", "reading-comprehension",
          "global-studies", "grammar", "figurative-language", "us-history", "writing-strategies", "world-history",
          "reference-skills", "biology", "earth-science", "phonological-awareness", "capitalization", "chemistry",
          "vocabulary", "geography")  # fmt: skip
_GRADES = {"G1-6": range(1, 7), "G7-12": range(7, 13)}


def read_letter(text: str) -> str:
    """The letter that an answer names, or "FAILED"."""
    if text in LETTERS:
        return text
    if len(text) >= 3 and text[0] in LETTERS and text[1:3] == ". ":
        return text[0]
    return read_sentence(text)


def read_sentence(text: str) -> str:
    """X of the only "The answer is X." in a text, or "FAILED"."""
    found = _SENTENCE.findall(text)
    return found[0] if len(found) == 1 else FAILED


def read_letter_strictly(text: str) -> str:
    """As `read_letter`, and "(B)", "B.", " B", "b" and "the answer is B", however often, as well."""
    official = read_letter(text)
    if official != FAILED:
        return official
    stripped = text.strip().strip("().:").strip()
    if stripped.upper() in LETTERS:
        return stripped.upper()
    found = re.findall(r"(?i:answer is|answer:)\s*\(?([A-E])\b", text)
    head = re.match(r"\(?([A-E])[).:]", text.strip())
    if found:
        return found[0] if len(set(found)) == 1 else FAILED
    return head[1] if head else FAILED


def index_of(letter: str, choices: int) -> int:
    """0 for A and so on; -1 for no letter and for one beyond the choices."""
    return LETTERS.index(letter) if letter in LETTERS[:choices] else -1


def breakdown(problems: Sequence[Mapping[str, Any]], results: Sequence[int]) -> list[dict[str, Any]]:
    """Accuracy by subject, context, grade, in all, and by topic, as ScienceQA's evaluate_acc.

    problems: of the data's problems.json. Each row: group, accuracy in percent (-1 of none), rows, and printed, which
    is the official text with two decimals.
    """
    hits = [problem["answer"] == result for problem, result in zip(problems, results, strict=True)]
    rows = []
    for group, belongs in _groups().items():
        inside = [hit for problem, hit in zip(problems, hits, strict=True) if belongs(problem)]
        accuracy = sum(inside) / len(inside) * 100 if inside else -1
        printed = f"{accuracy:.2f}" if inside else "-1"
        rows.append({"group": group, "accuracy": accuracy, "rows": len(inside), "printed": printed})
    return rows


def _groups() -> dict[str, Callable[[Mapping[str, Any]], bool]]:
    def is_in(key: str, *values: str) -> Callable[[Mapping[str, Any]], bool]:
        return lambda problem: problem.get(key) in values

    return {
        "NAT": is_in("subject", "natural science"),
        "SOC": is_in("subject", "social science"),
        "LAN": is_in("subject", "language science"),
        "TXT": lambda problem: bool(problem.get("hint")),
        "IMG": lambda problem: bool(problem.get("image")),
        "NO": lambda problem: not problem.get("hint") and not problem.get("image"),
        **{name: is_in("grade", *(f"grade{year}" for year in years)) for name, years in _GRADES.items()},
        "Average": lambda problem: True,
        **{topic: is_in("topic", topic) for topic in TOPICS},
    }


@dataclass(frozen=True)
class Combination:
    """LLaVA with GPT-4: GPT-4's answer, ours where it names none. upper: where either is right."""

    total: int
    correct: int
    upper: int
    gpt4_failed: int
    unlucky: int
    """Problems whose count the original draws by chance: neither names a choice, or a letter beyond them."""

    @property
    def printed(self) -> str:
        """What the original prints."""

        def share(count: int) -> str:
            return f"{count / self.total * 100 if self.total else 0:.2f}%"

        return (
            f"Total: {self.total}, Correct: {self.correct}, Accuracy: {share(self.correct)}\n"
            f"Total: {self.total}, Correct (upper): {self.upper}, Accuracy: {share(self.upper)}\n"
            f"Total: {self.total}, GPT-4 NO-ANS (RANDOM): {self.gpt4_failed}, Percentage: {share(self.gpt4_failed)}"
        )


def combine(problems: Mapping[str, Mapping[str, Any]], ours: Mapping[str, str], gpt4: Mapping[str, str]) -> Combination:
    """Both sides' texts by problem; a problem that one side has not is left out, as officially.

    Only the sentence "The answer is X." is read here, so ours must be of a model that writes it (LLaVA v0's does).
    """
    both = [key for key in problems if key in ours and key in gpt4]
    correct = upper = failed = unlucky = 0
    for key in both:
        choices, truth = len(problems[key]["choices"]), problems[key]["answer"]
        mine, theirs = (index_of(read_sentence(texts[key]), choices) for texts in (ours, gpt4))
        if read_sentence(gpt4[key]) == FAILED:
            failed += 1
            theirs = mine
        correct += theirs == truth
        upper += truth in (mine, theirs)
        unlucky += -1 in (mine, theirs)
    return Combination(len(both), correct, upper, failed, unlucky)
