"""Q-Bench, low-level perception: a question on a picture's quality with two to four candidates (LLVisionQA)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from llava.errors import DataError
from llava.eval.reading import check_keys, match_answers, read_json, row_notes
from llava.eval.task import AnswerRow, Question, Score, TaskFacts, TaskFile

_LETTERS = "ABCDEFGH"
_ROWS = {"dev": 1495, "test": 1495}
_MARKS = ".,:;!?()'\" "


class QBench:
    """id: the row's number, since a picture has several questions."""

    name = "qbench"

    def describe(self) -> TaskFacts:
        source = "https://huggingface.co/datasets/teowu/LLVisionQA-QBench"
        return TaskFacts(
            title="Q-Bench (LLVisionQA)",
            files=[
                *(
                    TaskFile(f"qbench/llvisionqa_{split}.json", "questions", source, rows=rows)
                    for split, rows in _ROWS.items()
                ),
                TaskFile("qbench/images", "pictures", source),
            ],
            prompt="{question}\nChoose between one of the options as follows:\nA. {candidate}\nB. ...\n",
            decoding={"temperature": 0.0, "max_new_tokens": 1024},
            published_metric="accuracy",
            published={},
            splits=tuple(_ROWS),
            traps=(
                "The prompt ends with a line's end.",
                "The original's runner for it was taken out at version 1.6; it cut pictures as CLIP does, unpadded.",
                "The leaderboard matched free answers with a judge; here a letter or the option's text counts.",
                "The test split's answers are not public: write the upload file.",
            ),
        )

    def read(self, root: Path, *, split: str | None) -> list[Question]:
        split = split or "dev"
        if split not in _ROWS:
            raise DataError(f"{self.name}: no split {split!r}; there are {', '.join(_ROWS)}")
        root = root / "qbench"
        path, what = root / f"llvisionqa_{split}.json", "Q-Bench's list of img_path, question, candidates"
        questions = []
        for index, row in enumerate(read_json(path, what=what)):
            origin = f"{path}: row {index}"
            check_keys(row, ("img_path", "question", "candidates"), origin=origin, what=what)
            if not 2 <= len(row["candidates"]) <= len(_LETTERS):
                raise DataError(f"{origin}: {len(row['candidates'])} candidates; there should be two to eight")
            options = dict(zip(_LETTERS, row["candidates"], strict=False))
            right = row.get("correct_ans")
            if right is not None and right not in row["candidates"]:
                raise DataError(f"{origin}: correct_ans {right!r} is none of its candidates; the file was changed")
            lines = [row["question"], "Choose between one of the options as follows:"]
            lines += [f"{letter}. {text}" for letter, text in options.items()]
            meta = {"row": row, "options": options, "answer": right, "split": split}
            prompt = "\n".join(lines) + "\n"
            questions.append(Question(str(index), prompt, (root / "images" / row["img_path"],), meta, 1024))
        if not questions:
            raise DataError(f"{path}: no rows; it is {what}; fetch it again")
        return questions

    def score(self, questions: Sequence[Question], answers: Sequence[AnswerRow], *, strict: bool = False) -> Score:
        """A letter at the start of the answer, or the text of the option alone, counts; nothing else does."""
        pairs = match_answers(questions, answers, task=self.name)
        if any(question.meta["answer"] is None for question in questions):
            raise DataError(f"{self.name}: this split holds no answers; write the upload file and send that in")
        chosen = {question.id: choose(answer.text, question.meta["options"]) for question, answer in pairs}
        right = {question.id: chosen[question.id] == question.meta["answer"] for question, _ in pairs}
        accuracy = sum(right.values()) / len(right)
        kinds = sorted({str(question.meta["row"].get("type", "")) for question, _ in pairs} - {""})
        rows = []
        for kind in kinds:
            hits = [right[question.id] for question, _ in pairs if str(question.meta["row"].get("type", "")) == kind]
            rows.append({"type": kind, "questions": len(hits), "right": sum(hits), "accuracy": sum(hits) / len(hits)})
        unresolved = sum(value is None for value in chosen.values())
        notes = [
            f"{unresolved:,} answers name no option and are wrong; the leaderboard asked a judge about such answers"
        ]
        notes += row_notes(len(pairs), _ROWS[questions[0].meta["split"]])
        printed = f"Accuracy: {100 * accuracy:.2f}%"
        return Score({"accuracy": accuracy}, {"types": rows}, notes, printed, {k: float(v) for k, v in right.items()})

    def write_upload(self, questions: Sequence[Question], answers: Sequence[AnswerRow], path: Path) -> Path | None:
        """One JSON object a line, the row with `response`; the original wrote them without a line's end between."""
        pairs = match_answers(questions, answers, task=self.name)
        path = path.with_suffix(".jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps({**question.meta["row"], "response": answer.text}) + "\n" for question, answer in pairs]
        path.write_text("".join(lines), encoding="utf-8")
        return path


def choose(text: str, options: dict[str, str]) -> str | None:
    """The option that an answer names by its letter first, or by its text alone; None when by neither."""
    bare = text.strip()
    first = bare.split(" ")[0].split("\n")[0].strip(_MARKS)
    if first in options and (len(bare.strip(_MARKS)) == 1 or bare.lstrip("(")[1:2] in (".", ")", ":", ",")):
        return options[first]
    named = [option for option in options.values() if option.lower().strip(_MARKS) == bare.lower().strip(_MARKS)]
    return named[0] if len(named) == 1 else None
