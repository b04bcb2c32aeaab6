"""VizWiz-VQA, test: photographs by blind people. Its answers are not public; this writes what EvalAI takes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from llava.errors import DataError
from llava.eval.matching import benchmark_folder, in_question_order, match_by_words
from llava.eval.metrics.vqa import normalise_m4c
from llava.eval.published import published
from llava.eval.question_files import GREEDY_128, SHORT_ANSWER, read_original_questions
from llava.eval.reading import row_notes
from llava.eval.task import AnswerRow, Question, Score, TaskFacts, TaskFile

ROWS = 8000
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."
_SERVER = "https://eval.ai/web/challenges/challenge-page/2185"


class VizWiz:
    """Questions of LLaVA's file; the upload, in the questions' order."""

    name: ClassVar[str] = "vizwiz"

    def describe(self) -> TaskFacts:
        return TaskFacts(
            title="VizWiz",
            files=(
                TaskFile("vizwiz/llava_test.jsonl", "questions", "eval.zip of LLaVA", rows=ROWS),
                TaskFile(
                    "vizwiz/test/", "pictures", "https://vizwiz.cs.colorado.edu/VizWiz_final/images/test.zip", rows=ROWS
                ),
            ),
            prompt=f"{{question}}\n{UNANSWERABLE}\n{SHORT_ANSWER}",
            decoding=GREEDY_128,
            published_metric="overall",
            published=published(self.name),
            splits=("test",),
            traps=(
                f"Scored by {_SERVER} only.",
                "The upload names pictures, not questions, and its answers are normalised by m4c's normaliser.",
            ),
        )

    def read(self, root: Path, *, split: str | None) -> list[Question]:
        if split not in (None, "test"):
            raise DataError(f"vizwiz: no split {split!r}; there is test")
        folder = benchmark_folder(root, "vizwiz", "VizWiz")
        return read_original_questions(
            folder / "llava_test.jsonl",
            images=folder / "test",
            what="VizWiz's questions from LLaVA's eval.zip",
            published=ROWS,
        )

    def score(self, questions: Sequence[Question], answers: Sequence[AnswerRow], *, strict: bool = False) -> Score:
        """No figures, as the answers are not public: how many were called unanswerable, and where to upload."""
        pairs = match_by_words(questions, answers, task=self.name)
        said = [normalise_m4c(answer.text) for _, answer in pairs]
        table = [{"answer": "unanswerable", "rows": said.count("unanswerable")}, {"answer": "other", "rows": 0}]
        table[1]["rows"] = len(said) - said.count("unanswerable")
        notes = [*row_notes(len(pairs), ROWS), f"the answers of test are not public: upload the file to {_SERVER}"]
        return Score({}, {"answers": table}, notes, "")

    def write_upload(self, questions: Sequence[Question], answers: Sequence[AnswerRow], path: Path) -> Path | None:
        """EvalAI's file: picture and normalised answer of every question, in the questions' order."""
        pairs = in_question_order(match_by_words(questions, answers, task=self.name), questions)
        rows = [{"image": question.meta["image"], "answer": normalise_m4c(answer.text)} for question, answer in pairs]
        path.write_text(json.dumps(rows), encoding="utf-8")
        return path
