"""TextVQA, validation set: words in pictures. m4c's normaliser and soft accuracy, as LLaVA's eval_textvqa."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from llava.errors import DataError
from llava.eval.matching import benchmark_folder, check_rows, first_there, in_question_order, match_by_words
from llava.eval.metrics.vqa import has_dot_limit, normalise_m4c, soft_accuracies
from llava.eval.published import published
from llava.eval.question_files import GREEDY_128, SHORT_ANSWER, read_original_questions
from llava.eval.reading import check_keys, read_json, row_notes
from llava.eval.task import AnswerRow, Question, Score, TaskFacts, TaskFile

ROWS = 5000
OCR_LINE = "Reference OCR token: "
_OTHER_FORM = re.compile(r"Question: (.*?) Short answer:", re.DOTALL)
_WHAT = "TextVQA's annotations, an object with a list `data`"


class TextVQA:
    """Questions of LLaVA's file, with its OCR line, against the ten answers of TextVQA 0.5.1."""

    name: ClassVar[str] = "textvqa"

    def describe(self) -> TaskFacts:
        return TaskFacts(
            title="TextVQA",
            files=(
                TaskFile("textvqa/llava_textvqa_val_v051_ocr.jsonl", "questions", "eval.zip of LLaVA", rows=ROWS),
                TaskFile(
                    "textvqa/TextVQA_0.5.1_val.json",
                    "annotations",
                    "https://dl.fbaipublicfiles.com/textvqa/data/TextVQA_0.5.1_val.json",
                    rows=ROWS,
                ),
                TaskFile(
                    "textvqa/train_images/",
                    "pictures",
                    "https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip",
                ),
            ),
            prompt=f"{{question}}\n{OCR_LINE}{{tokens}}\n{SHORT_ANSWER}",
            decoding=GREEDY_128,
            published_metric="accuracy",
            published=published(self.name),
            traps=(
                "Several questions share a picture, whose id is all the id they have: they are found by their words.",
                "A row without OCR tokens keeps the blank after the colon.",
                "Ten answers, one left out at a time: 4 equal ones are worth 1, 3 are worth .9; not min(1, n / 3).",
                "This normaliser is not VQAv2's own: `'s` becomes a word, commas go before anything else.",
            ),
        )

    def read(self, root: Path, *, split: str | None) -> list[Question]:
        if split not in (None, "val"):
            raise DataError(f"textvqa: no split {split!r}; there is val")
        folder = benchmark_folder(root, "textvqa", "TextVQA")
        path = folder / "llava_textvqa_val_v051_ocr.jsonl"
        questions = read_original_questions(
            path,
            images=first_there(folder / "train_images", folder / "train_val_images" / "train_images"),
            what="TextVQA's questions from LLaVA's eval.zip",
            published=ROWS,
        )
        truths = _truths(folder / "TextVQA_0.5.1_val.json")
        found = []
        for question in questions:
            key = (str(question.meta["question_id"]), question_in(question.prompt).lower())
            if key not in truths:
                raise DataError(
                    f"{path}: {question.meta['origin']}: no annotation for {key}; are both files 0.5.1 val?"
                )
            found.append(replace(question, meta={**question.meta, "answers": truths[key]}))
        return found

    def score(self, questions: Sequence[Question], answers: Sequence[AnswerRow], *, strict: bool = False) -> Score:
        """strict: every dot is removed by the normaliser, not only the first 32."""
        pairs = match_by_words(questions, answers, task=self.name, words=lambda prompt: question_in(prompt).lower())
        correct = {}
        for question, answer in in_question_order(pairs, questions):
            truths = [normalise_m4c(text, all_dots=strict) for text in question.meta["answers"]]
            correct[question.id] = soft_accuracies(truths).get(normalise_m4c(answer.text, all_dots=strict), 0.0)
        accuracy = 100.0 * sum(correct.values()) / len(correct)
        limited = sum(has_dot_limit(answer.text) for _, answer in pairs)
        return Score(
            headline={"accuracy": accuracy},
            tables={},
            notes=[
                *row_notes(len(pairs), ROWS),
                f"{limited:,} answers have more dots than the normaliser removes (32)",
            ],
            printed=f"Samples: {len(pairs)}\nAccuracy: {accuracy:.2f}%\n",
            correct=correct,
        )

    def write_upload(self, questions: Sequence[Question], answers: Sequence[AnswerRow], path: Path) -> Path | None:
        return None


def question_in(prompt: str) -> str:
    """The question in a prompt of any of the forms in use. Raises DataError for another form."""
    if prompt.startswith("OCR tokens: ") and (found := _OTHER_FORM.search(prompt)):
        return found[1]
    lines = prompt.split("\n")
    if OCR_LINE in prompt and len(lines) == 3:
        return lines[1] if prompt.startswith(OCR_LINE) else lines[0]
    if OCR_LINE not in prompt and len(lines) == 2:
        return lines[0]
    raise DataError(f"textvqa: no question in the prompt {prompt[:80]!r}; it is question, OCR line, instruction")


def _truths(path: Path) -> dict[tuple[str, str], list[str]]:
    """Answers by picture and lower-cased question; of two alike the last is used, as officially."""
    value = read_json(path, what=_WHAT)
    check_keys(value, ("data",), origin=str(path), what=_WHAT)
    rows: list[Any] = value["data"]
    check_rows(len(rows), ROWS, path=path)
    truths = {}
    for number, row in enumerate(rows):
        origin = f"{path}: row {number}"
        check_keys(row, ("image_id", "question", "answers"), origin=origin, what=_WHAT)
        if len(row["answers"]) != 10:
            raise DataError(f"{origin}: {len(row['answers'])} answers; the rule is made for ten")
        truths[str(row["image_id"]), row["question"].lower()] = row["answers"]
    return truths
