"""MathVista, testmini: figures and mathematics; a judge takes the final answer out of the text."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.errors import DataError
from llava.eval.judge import JUDGED, JudgeRequest
from llava.eval.matching import check_rows
from llava.eval.reading import check_keys, match_answers, read_json, read_text, row_notes
from llava.eval.task import AnswerRow, Question, Score, TaskFacts, TaskFile

_ROWS = 1000
_DATA, _EXAMPLES = "MathVista/data/testmini.json", "MathVista/evaluation/prompts/ext_ans.py"
_HINTS = {
    "integer": "requiring an integer answer and provide the final value, e.g., 1, 2, 3, at the end.",
    "float1": "requiring a floating-point number with one decimal place and provide the final value, e.g., 1.2, 1.3,"
    " 1.4, at the end.",
    "float2": "requiring a floating-point number with two decimal places and provide the final value, e.g., 1.23, 1.34,"
    " 1.45, at the end.",
    "list": "requiring a Python list as an answer and provide the final list, e.g., [1, 2, 3], [1.2, 1.3, 1.4], at the"
    " end.",
}
_CHOICE_HINT = "and provide the correct option letter, e.g., A, B, C, D, at the end."
_COLUMNS = ("question", "image", "choices", "unit", "precision", "answer", "question_type", "answer_type", "metadata")
_KEYS = ("question_type", "answer_type", "language", "source", "category", "task", "context", "grade", "skills")
_BRACKETED = re.compile(r"\(([a-zA-Z])\)")
_STATED = re.compile(r'The answer is "(.*)"\.')


class MathVista:
    """ROOT/MathVista is a clone of its repository, with the pictures in data/images."""

    name = "mathvista"

    def describe(self) -> TaskFacts:
        source = "https://github.com/lupantech/MathVista"
        return TaskFacts(
            title="MathVista, testmini",
            files=[
                TaskFile(_DATA, "questions and answers", source, rows=_ROWS),
                TaskFile(_EXAMPLES, "the head of the judge's prompt", source),
                TaskFile("MathVista/data/images", "pictures", "https://huggingface.co/datasets/AI4Math/MathVista"),
            ],
            prompt="Question: {question} (Unit: {unit})\nChoices:\n(A) {choice}\nHint: {hint}\nSolution:",
            decoding={"temperature": 0.0, "max_new_tokens": 1024},
            published_metric="accuracy",
            published={"llava-1.6-vicuna-7b": 34.6, "llava-1.6-vicuna-13b": 35.3, "llava-1.6-mistral-7b": 37.7}
            | {"llava-1.6-34b": 46.5},
            splits=("testmini",),
            needs=("judge",),
            traps=(
                "An answer that is an option's text or a bare number is not shown to the judge.",
                "An extraction that is no option becomes the option nearest by edit distance, even an empty one.",
                "A whole number is cut, not rounded; a float is rounded to the question's decimals, as text.",
            ),
        )

    def read(self, root: Path, *, split: str | None) -> list[Question]:
        if split not in (None, "testmini"):
            raise DataError(f"{self.name}: no split {split!r}; answers are public for testmini only")
        path, what = root / _DATA, "MathVista's testmini: problems by pid"
        content = read_json(path, what=what)
        check_keys(content, (), origin=str(path), what=what)
        head = _read_examples(root / _EXAMPLES)
        questions = []
        for key, row in content.items():
            check_keys(row, _COLUMNS, origin=f"{path}: {key}", what=what)
            meta = {**{name: row[name] for name in _COLUMNS if name != "image"}, "head": head}
            questions.append(Question(key, _query(row, origin=f"{path}: {key}"), (_picture(root, row),), meta, 1024))
        if not questions:
            raise DataError(f"{path}: no problems; fetch it again")
        check_rows(len(questions), _ROWS, path=path)
        return questions

    def judge_requests(self, questions: Sequence[Question], answers: Sequence[AnswerRow]) -> list[JudgeRequest]:
        """One for each answer from which `extract_alone` takes nothing. Raises DataError without the prompt's head."""
        requests = []
        for question, answer in match_answers(questions, answers, task=self.name):
            if extract_alone(answer.text, question.meta) is not None:
                continue
            if not question.meta["head"]:
                raise DataError(f"{_EXAMPLES}: not there; the judge's prompt begins with it: clone the repository")
            parts = (question.meta["head"].strip(), question.meta["question"], answer.text, "Extracted answer: ")
            content = "\n\n".join(parts)
            payload = {"model": "gpt-4-0613", "temperature": 0, "messages": [{"role": "user", "content": content}]}
            requests.append(JudgeRequest(question.id, payload))
        return requests

    def ask_again(self, request: JudgeRequest, replies: Sequence[str]) -> JudgeRequest | None:
        return None

    def score(self, questions: Sequence[Question], answers: Sequence[AnswerRow], *, strict: bool = False) -> Score:
        """strict: an empty extraction is wrong rather than the nearest option."""
        right: dict[str, bool] = {}
        empty = 0
        for question, answer in match_answers(questions, answers, task=self.name):
            extraction = extracted(answer, question.meta)
            empty += not extraction.strip()
            prediction = normalise(extraction, question.meta)
            right[question.id] = prediction == question.meta["answer"] and not (strict and not extraction.strip())
        tables = {key: _by_key(key, questions, right) for key in _KEYS}
        correct, total = sum(right.values()), len(right)
        treated = "wrong" if strict else "take the nearest option, as the official script does"
        return Score(
            headline={"accuracy": 100 * correct / total},
            tables=tables,
            notes=[f"{empty:,} extractions are empty; with options they {treated}", *row_notes(total, _ROWS)],
            printed=f"Correct: {correct}/{total} - Accuracy: {correct / total * 100:.2f}%",
            correct={key: float(value) for key, value in right.items()},
        )

    def write_upload(self, questions: Sequence[Question], answers: Sequence[AnswerRow], path: Path) -> Path | None:
        return None


def extract_alone(text: str, problem: Mapping[str, Any]) -> str | None:
    """What needs no judge: nothing, an option's text, a bare number of the right kind. None: ask the judge."""
    if text == "" or (problem["question_type"] == "multi_choice" and text in problem["choices"]):
        return text
    try:
        if problem["answer_type"] == "integer":
            return str(int(text))
        if problem["answer_type"] == "float":
            return str(float(text))
    except ValueError:
        pass
    return None


def extracted(answer: AnswerRow, problem: Mapping[str, Any]) -> str:
    """The answer itself, the judge's reply, or the column `extraction` of a file of the official tool.

    Without all of them, the official quick rule: The answer is "...". Raises DataError when that finds nothing.
    """
    alone = extract_alone(answer.text, problem)
    if JUDGED in answer.meta:
        return str(answer.meta[JUDGED][-1])
    if "extraction" in answer.meta:
        return str(answer.meta["extraction"])
    if alone is not None:
        return alone
    if stated := _STATED.search(answer.text):
        return stated[1]
    raise DataError(f"mathvista: question {answer.question_id} was not judged; give a judge, or its stored replies")


def normalise(extraction: str, problem: Mapping[str, Any]) -> str | None:
    """The extraction in the form of the reference answer; None when it has not that form."""
    if problem["question_type"] == "multi_choice":
        choices: Sequence[str] = problem["choices"]
        extraction = extraction.strip()
        if letter := _BRACKETED.search(extraction):
            extraction = letter[1].upper()
        letters = [chr(ord("A") + index) for index in range(len(choices))]
        if extraction in letters:
            return choices[letters.index(extraction)]
        return min(choices, key=lambda choice: edit_distance(extraction, choice))
    try:
        if problem["answer_type"] == "integer":
            return str(int(float(extraction)))
        if problem["answer_type"] == "float":
            return str(round(float(extraction), int(problem["precision"])))
    except (ValueError, OverflowError):
        return None
    return extraction


def edit_distance(one: str, two: str) -> int:
    """Levenshtein's: insertions, deletions and replacements of a letter."""
    row = list(range(len(two) + 1))
    for at, letter in enumerate(one, start=1):
        above_left, row[0] = row[0], at
        for place, other in enumerate(two, start=1):
            above_left, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, above_left + (letter != other))
    return row[-1]


def _query(row: Mapping[str, Any], *, origin: str) -> str:
    if row["question_type"] == "multi_choice":
        hint = _CHOICE_HINT
    else:
        kind = row["answer_type"] + (str(int(row["precision"])) if row["answer_type"] == "float" else "")
        if kind not in _HINTS:
            raise DataError(
                f"{origin}: answer_type {row['answer_type']!r}, precision {row['precision']!r} are not known"
            )
        hint = _HINTS[kind]
    lines = [f"Question: {row['question']}" + (f" (Unit: {row['unit']})" if row["unit"] else "")]
    if row["choices"]:
        lines += ["Choices:", *(f"({chr(ord('A') + n)}) {choice}" for n, choice in enumerate(row["choices"]))]
    return "\n".join([*lines, f"Hint: Please answer the question {hint}", "Solution:"])


def _picture(root: Path, row: Mapping[str, Any]) -> Path:
    return root / "MathVista/data" / str(row["image"])


def _read_examples(path: Path) -> str:
    """The string `demo_prompt` of the official file, read without running it; empty when the file is not there."""
    if not path.is_file():
        return ""
    try:
        tree = ast.parse(read_text(path, what="MathVista's ext_ans.py"))
    except SyntaxError as error:
        raise DataError(f"{path}:{error.lineno}: no Python ({error.msg}); fetch it again") from None
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(
            isinstance(t, ast.Name) and t.id == "demo_prompt" for t in node.targets
        ):
            return str(ast.literal_eval(node.value))
    raise DataError(f"{path}: no demo_prompt; is it MathVista's ext_ans.py?")


def _by_key(key: str, questions: Sequence[Question], right: Mapping[str, bool]) -> list[dict[str, Any]]:
    groups: dict[str, list[bool]] = {}
    for question in questions:
        value = question.meta.get(key, question.meta["metadata"].get(key, ""))
        for name in value if isinstance(value, list) else [value]:
            groups.setdefault(str(name), []).append(right[question.id])
    rows = [{"name": n, "correct": sum(h), "total": len(h), "accuracy": sum(h) / len(h)} for n, h in groups.items()]
    return sorted(rows, key=lambda row: row["accuracy"], reverse=True)
