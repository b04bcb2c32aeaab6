"""A made-up benchmark: is the picture red? One JSONL, answers yes or no, mean accuracy in percent."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from llava.errors import DataError
from llava.eval.task import AnswerRow, Question, Score, TaskFacts, TaskFile


class MadeUp:
    name = "made_up"

    def describe(self) -> TaskFacts:
        return TaskFacts(
            title="Made up",
            files=(TaskFile("made_up.jsonl", "questions", "nowhere", rows=4),),
            prompt="{question}",
            decoding={"temperature": 0.0, "max_new_tokens": 4},
            published_metric="accuracy",
            published={"LLaVA-1.5-7B": 61.5, "LLaVA-1.6-Vicuna-7B": 70.0},
        )

    def read(self, root: Path, *, split: str | None) -> list[Question]:
        path = root / "made_up.jsonl"
        if not path.exists():
            raise DataError(f"{path}: not there; make it up")
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return [
            Question(str(row["id"]), row["text"], (root / row["image"],), {"answer": row["answer"]}, 4) for row in rows
        ]

    def score(self, questions: Sequence[Question], answers: Sequence[AnswerRow], *, strict: bool = False) -> Score:
        said = {answer.question_id: answer.text for answer in answers}
        missing = [question.id for question in questions if question.id not in said]
        if missing:
            raise DataError(f"made_up: no answer to {missing[0]}")
        correct = {
            q.id: float(said[q.id].lower() == q.meta["answer"] if not strict else said[q.id] == q.meta["answer"])
            for q in questions
        }
        accuracy = 100 * sum(correct.values()) / len(correct)
        rows = [{"answer": word, "rows": sum(q.meta["answer"] == word for q in questions)} for word in ("yes", "no")]
        return Score({"accuracy": accuracy}, {"answers": rows}, ["one note"], f"Accuracy: {accuracy:.2f}", correct)

    def write_upload(self, questions: Sequence[Question], answers: Sequence[AnswerRow], path: Path) -> Path | None:
        path = path.with_suffix(".json")
        path.write_text(json.dumps([answer.text for answer in answers]))
        return path


TARGET = "tests.eval.made_up:MadeUp"


def write_benchmark(root: Path, pictures: Sequence[Path], each: int = 2) -> Path:
    root.mkdir(exist_ok=True, parents=True)
    with (root / "made_up.jsonl").open("w") as file:
        for number, picture in enumerate(pictures):
            for turn in range(each):
                row = {"id": 10 * number + turn, "text": f"Is it red {turn}?", "image": str(picture), "answer": "yes"}
                file.write(json.dumps(row | {"answer": ("yes", "no")[number % 2]}) + "\n")
    return root
