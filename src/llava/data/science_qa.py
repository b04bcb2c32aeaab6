"""ScienceQA as LLaVA conversations, in every prompt format of its authors: `problems.json` and `pid_splits.json`.

A prompt format is what goes in, a dash, what comes out: QCM-LEA asks Question, Context and Multiple choice, and answers
with Lecture, Explanation and Answer. The texts are those of the original LLaVA's converter to the byte (its golden
files are tests), blanks included; where it swaps lecture and explanation in AL and AE, so does this.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llava.errors import DataError, UsageError, name_nearest

_LETTERS = "ABCDE"
_DEFAULT_PROMPT = "QCM-LEA"
# Fields: question, context, choices, lecture, explanation (the data's "solution"), answer (its letter).
INPUTS = {
    "CQM": "Context: {context}\nQuestion: {question}\nOptions: {choices}",
    "QCM": "Question: {question}\nContext: {context}\nOptions: {choices}",
    "QCML": "Question: {question}\nContext: {context}\nOptions: {choices}\nBECAUSE: {lecture}",
    "QCME": "Question: {question}\nContext: {context}\nOptions: {choices}\nBECAUSE: {explanation}",
    "QCMLE": "Question: {question}\nContext: {context}\nOptions: {choices}\nBECAUSE: {lecture} {explanation}",
    "QCLM": "Question: {question}\nContext: {context}\nBECAUSE: {lecture}\nOptions: {choices}",
    "QCEM": "Question: {question}\nContext: {context}\nBECAUSE: {explanation}\nOptions: {choices}",
    "QCLEM": "Question: {question}\nContext: {context}\nBECAUSE: {lecture} {explanation}\nOptions: {choices}",
}
OUTPUTS = {
    "A": "Answer: The answer is {answer}.",
    "AL": "Answer: The answer is {answer}. BECAUSE: {explanation}",
    "AE": "Answer: The answer is {answer}. BECAUSE: {lecture}",
    "ALE": "Answer: The answer is {answer}. BECAUSE: {lecture} {explanation}",
    "AEL": "Answer: The answer is {answer}. BECAUSE: {explanation} {lecture}",
    "LA": "Answer: {lecture} The answer is {answer}.",
    "EA": "Answer: {explanation} The answer is {answer}.",
    "LEA": "Answer: {lecture} {explanation} The answer is {answer}.",
    "ELA": "Answer: {explanation} {lecture} The answer is {answer}.",
    "LEPA": "",  # written line by line, only those that there are
}


def read_science_qa(folder: Path, *, split: str = "train", prompt: str = _DEFAULT_PROMPT) -> Iterator[tuple[str, Any]]:
    """(origin, LLaVA record) of each problem of a split, in the split's order; pictures are `<id>/<file>`.

    Raises UsageError for an unknown split or prompt format, DataError for a problem that is not whole.
    """
    asked, told = _known_prompt(prompt)
    splits, problems = _load(folder / "pid_splits.json"), _load(folder / "problems.json")
    if split not in splits:
        raise UsageError(f"split={split}: {folder / 'pid_splits.json'}: {name_nearest(split, splits)}")
    for number in splits[split]:
        origin = f"{folder / 'problems.json'}: problem {number}"
        problem = problems.get(str(number))
        if not isinstance(problem, Mapping):
            raise DataError(f"{origin}: named by the split {split!r}, but not there")
        yield origin, to_record(str(number), problem, inputs=asked, outputs=told, origin=origin)


def to_record(
    number: str, problem: Mapping[str, Any], *, inputs: str, outputs: str, origin: str = ""
) -> dict[str, Any]:
    """One problem as a LLaVA record."""
    question, answer = _write(_fields(problem, origin), inputs, outputs)
    # The original takes every "Question: " out of a text that begins with it, not only the first.
    question = question.replace("Question: ", "") if question.startswith("Question: ") else question
    answer = answer.replace("Answer: ", "") if answer.startswith("Answer: ") else answer
    picture = problem.get("image")
    if picture:
        question += "\n<image>"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": number, **({"image": f"{number}/{picture}"} if picture else {}), "conversations": turns}


def _write(fields: Mapping[str, str], inputs: str, outputs: str) -> tuple[str, str]:
    question = _tidy(INPUTS[inputs].format_map(fields) + "\n")
    if outputs != "LEPA":
        return question, _tidy(OUTPUTS[outputs].format_map(fields))
    answer = ""
    for name, key in (("LECTURE", "lecture"), ("SOLUTION", "explanation")):
        if fields[key].strip():
            answer += f"{name}: {fields[key]}\n"
    return question, _tidy(f"{answer}###\nANSWER: {fields['answer']}.")


def _tidy(text: str) -> str:
    """As the original: two blanks become one, once; an empty BECAUSE at the end goes (and all others with it)."""
    text = text.replace("  ", " ").strip()
    return text.replace("BECAUSE:", "").strip() if text.endswith("BECAUSE:") else text


def _fields(problem: Mapping[str, Any], origin: str) -> dict[str, str]:
    choices, answer = problem.get("choices"), problem.get("answer")
    texts = {key: problem.get(key, "") for key in ("question", "hint", "lecture", "solution")}
    wrong = [key for key, value in texts.items() if not isinstance(value, str)]
    if wrong or not isinstance(choices, list) or not isinstance(answer, int):
        raise DataError(f"{origin}: needs question, hint, lecture, solution (texts), choices (list), answer (number)")
    if len(choices) > len(_LETTERS) or not 0 <= answer < len(choices):
        raise DataError(f"{origin}: answer {answer} of {len(choices)} choices; at most {len(_LETTERS)} have letters")
    return {
        "question": texts["question"],
        "context": texts["hint"].strip() or "N/A",
        "choices": " ".join(f"({letter}) {choice}" for letter, choice in zip(_LETTERS, choices, strict=False)),
        "lecture": _unescaped(texts["lecture"]),
        "explanation": _unescaped(texts["solution"]),
        "answer": _LETTERS[answer],
    }


def _unescaped(text: str) -> str:
    """A written backslash and n is a line's end here, as the original's way there and back makes it."""
    return text.replace("\\n", "\n")


def _known_prompt(prompt: str) -> tuple[str, str]:
    asked, dash, told = prompt.partition("-")
    if not dash or asked not in INPUTS or told not in OUTPUTS:
        raise UsageError(
            f"prompt={prompt}: a prompt format is IN-OUT, such as {_DEFAULT_PROMPT}; "
            f"in: {', '.join(INPUTS)}; out: {', '.join(OUTPUTS)}"
        )
    return asked, told


def _load(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise DataError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: must hold an object")
    return value
