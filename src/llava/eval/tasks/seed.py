"""SEED-Bench: four options on a picture, or on the middle frame of a video; the answer is a lone letter."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava.errors import DataError
from llava.eval.reading import check_keys, match_answers, read_json, read_lines
from llava.eval.task import AnswerRow, Question, Score, TaskFacts, TaskFile

_QUESTIONS, _ANNOTATIONS = "seed_bench/llava-seed-bench.jsonl", "seed_bench/SEED-Bench.json"
_KINDS = ("image", "video")
_ROWS = {"image": 14_233, "video": 5_009}


class SEED:
    """Both halves; split `image` or `video` asks one."""

    name = "seed"

    def describe(self) -> TaskFacts:
        return TaskFacts(
            title="SEED-Bench",
            files=[
                TaskFile(_QUESTIONS, "the questions as LLaVA asks them", "LLaVA's eval.zip, folder seed_bench"),
                TaskFile(_ANNOTATIONS, "answers and types", "https://huggingface.co/datasets/AILab-CVC/SEED-Bench"),
                TaskFile("seed_bench/SEED-Bench-image", "pictures", "the same", rows=_ROWS["image"]),
                TaskFile(
                    "seed_bench/SEED-Bench-video-image",
                    "middle frames",
                    "LLaVA's extract_video_frames.py",
                    rows=_ROWS["video"],
                ),
            ],
            prompt="{question}\nA. {choice_a}\n...\nAnswer with the option's letter from the given choices directly.",
            decoding={"temperature": 0.0, "max_new_tokens": 128},
            published_metric="total",
            published={
                "llava-1.5-7b": 58.6,
                "llava-1.5-13b": 61.6,
                "llava-1.5-7b-lora": 60.1,
                "llava-1.5-13b-lora": 61.3,
            },
            splits=("all", *_KINDS),
            traps=(
                "The text must be the letter and nothing else: 'A.' and 'a' are wrong.",
                "Figures are means over questions, not over types. LLaVA-1.6's published figure is the image half's:"
                " 70.2, 71.9, 72.2, 75.9 for 7B, 13B, Mistral-7B, 34B.",
                "A type without one right answer stops the original with a KeyError; here it is 0.00%.",
                "The paper ranks the options by likelihood instead of asking for a letter.",
            ),
        )

    def read(self, root: Path, *, split: str | None) -> list[Question]:
        split = split or "all"
        if split not in ("all", *_KINDS):
            raise DataError(f"{self.name}: no split {split!r}; there are all, {', '.join(_KINDS)}")
        annotations = _read_annotations(root / _ANNOTATIONS)
        path = root / _QUESTIONS
        rows = read_lines(path, what="LLaVA's questions of SEED-Bench", needs=("question_id", "image", "text"))
        questions = []
        for row in rows:
            key = str(row["question_id"])
            if key not in annotations:
                raise DataError(f"{path}: question {key} is not in {root / _ANNOTATIONS}; take both of one version")
            meta = annotations[key]
            if split in ("all", meta["kind"]):
                questions.append(Question(key, row["text"], (root / "seed_bench" / row["image"],), meta, 128))
        if split == "all" and len(questions) < len(annotations):
            raise DataError(f"{path}: {len(questions):,} of {len(annotations):,} questions; it was cut, fetch it again")
        return questions

    def score(self, questions: Sequence[Question], answers: Sequence[AnswerRow], *, strict: bool = False) -> Score:
        pairs = match_answers(questions, answers, task=self.name)
        right = {
            question.id: (_lone_letter(answer.text) if strict else answer.text) == question.meta["answer"]
            for question, answer in pairs
        }
        asked, correct, kinds = Counter[int](), Counter[int](), {kind: [0, 0] for kind in _KINDS}
        names: dict[int, str] = {}
        for question, _ in pairs:
            number = question.meta["type"]
            names[number] = question.meta["type_name"]
            asked[number] += 1
            correct[number] += right[question.id]
            kinds[question.meta["kind"]][0] += right[question.id]
            kinds[question.meta["kind"]][1] += 1
        headline = {"total": 100 * sum(right.values()) / len(right)}
        headline |= {kind: 100 * hits / rows for kind, (hits, rows) in kinds.items() if rows}
        table = [
            {"type": names[n], "questions": asked[n], "right": correct[n], "accuracy": correct[n] / asked[n] * 100}
            for n in sorted(asked)
        ]
        lines = [f"{row['type']}: {row['accuracy']:.2f}%" for row in table]
        lines += [f"{'Total' if kind == 'total' else kind} accuracy: {value:.2f}%" for kind, value in headline.items()]
        loose = sum(not right[q.id] and _lone_letter(a.text) == q.meta["answer"] for q, a in pairs)
        notes = [f"{loose:,} answers name the right letter with something beside it and are wrong by the official rule"]
        notes += [
            f"{kind}: {rows:,} questions; published figures are over {_ROWS[kind]:,}"
            for kind, (_, rows) in kinds.items()
            if rows and rows != _ROWS[kind]
        ]
        return Score(headline, {"types": table}, notes, "\n".join(lines), {k: float(v) for k, v in right.items()})

    def write_upload(self, questions: Sequence[Question], answers: Sequence[AnswerRow], path: Path) -> Path | None:
        """JSONL of question_id, as the annotations have it, and prediction."""
        pairs = match_answers(questions, answers, task=self.name)
        rows = [{"question_id": question.meta["question_id"], "prediction": answer.text} for question, answer in pairs]
        path = path.with_suffix(".jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path


def _read_annotations(path: Path) -> dict[str, dict[str, Any]]:
    what = "SEED-Bench's annotations: question_type and questions"
    content = read_json(path, what=what)
    check_keys(content, ("question_type", "questions"), origin=str(path), what=what)
    names = {number: name for name, number in content["question_type"].items()}
    found = {}
    for index, row in enumerate(content["questions"]):
        origin = f"{path}: question {index}"
        check_keys(row, ("question_id", "answer", "data_type", "question_type_id"), origin=origin, what=what)
        if row["data_type"] not in _KINDS or row["question_type_id"] not in names:
            raise DataError(f"{origin}: data_type {row['data_type']!r}, type {row['question_type_id']!r} are not known")
        found[str(row["question_id"])] = {
            "question_id": row["question_id"],
            "answer": row["answer"],
            "kind": row["data_type"],
            "type": row["question_type_id"],
            "type_name": names[row["question_type_id"]],
        }
    return found


def _lone_letter(text: str) -> str:
    return text.strip().strip("().:").upper()[:1] if len(text.strip().strip("().:")) == 1 else text.strip()
