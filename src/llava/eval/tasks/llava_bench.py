"""LLaVA-Bench, in the wild and COCO: a judge grades each answer beside a reference by text-only GPT-4."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.errors import DataError
from llava.eval.answers import write_answers
from llava.eval.judge import JUDGED, JudgeRequest, replies_of
from llava.eval.matching import check_rows
from llava.eval.reading import match_answers, read_lines, row_notes
from llava.eval.task import AnswerRow, Question, Score, TaskFacts, TaskFile

_SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
_SEEN = {
    "wild": "a few sentences describing the image. ",
    "coco": "five descriptive sentences describing the same image and the bounding box coordinates of each object in"
    " the scene. These coordinates are in the form of bounding boxes, represented as (x1, y1, x2, y2) with floating"
    " numbers ranging from 0 to 1. These values correspond to the top left x, top left y, bottom right x, and bottom"
    " right y. ",
}
# The text of LLaVA's rule.json (Apache-2.0): a judge's grades compare only under the same words.
_RULE = (
    "We would like to request your feedback on the performance of two AI assistants in response to the user question"
    " displayed above. The user asks the question on observing an image. For your reference, the visual content in the"
    " image is represented with {seen}\nPlease rate the helpfulness, relevance, accuracy, level of details of their"
    " responses. Each assistant receives an overall score on a scale of 1 to 10, where a higher score indicates better"
    " overall performance.\nPlease first output a single line containing only two values indicating the scores for"
    " Assistant 1 and 2, respectively. The two scores are separated by a space.\nIn the subsequent line, please provide"
    " a comprehensive explanation of your evaluation, avoiding any potential bias and ensuring that the order in which"
    " the responses were presented does not affect your judgment."
)
_CATEGORIES = ("conv", "detail", "complex")
_TWO_NUMBERS = re.compile(r"\d+(?:\.\d+)?")
FAILED = (-1.0, -1.0)


@dataclass(frozen=True)
class LlavaBench:
    """One of the two. kind: "wild" or "coco". files: questions, contexts, references, folder of pictures."""

    name: str
    kind: str
    files: tuple[str, ...]
    rows: int
    published: Mapping[str, float]

    def describe(self) -> TaskFacts:
        source = (
            "https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild"
            if self.kind == "wild"
            else "LLaVA's playground/data/coco2014_val_*.jsonl; pictures from https://cocodataset.org"
        )
        what = ("questions", "what the judge is told of each picture", "references by text-only GPT-4", "pictures")
        return TaskFacts(
            title={"wild": "LLaVA-Bench in the wild", "coco": "LLaVA-Bench COCO"}[self.kind],
            files=[TaskFile(path, text, source) for path, text in zip(self.files, what, strict=True)],
            prompt="{question}",
            decoding={"temperature": 0.0, "max_new_tokens": 1024},
            published_metric="relative",
            published=self.published,
            needs=("judge",),
            traps=(
                "The judge was gpt-4-0314 at temperature 0.2; another judge's figures do not compare.",
                "A review whose first line is not exactly two numbers counts as -1 and -1, and is averaged in.",
                "Means are rounded to three decimals before they are divided.",
            ),
        )

    def read(self, root: Path, *, split: str | None) -> list[Question]:
        if split is not None:
            raise DataError(f"{self.name}: no split {split!r}; there is only one")
        asked, told, references, folder = (root / name for name in self.files)
        rows = read_lines(asked, what="its questions", needs=("question_id", "image", "text", "category"))
        contexts = {row["image"]: row for row in read_lines(told, what="its contexts", needs=("image",))}
        answered = read_lines(references, what="its references by GPT-4", needs=("question_id", "text"))
        if [row["question_id"] for row in rows] != [row["question_id"] for row in answered]:
            raise DataError(
                f"{references}: not the questions of {asked} in their order; one of both was cut or changed"
            )
        questions = []
        for row, reference in zip(rows, answered, strict=True):
            if row["image"] not in contexts or row["category"] not in _CATEGORIES:
                raise DataError(
                    f"{asked}: question {row['question_id']}: no context in {told}, or a category not known"
                )
            meta = {
                "question_id": row["question_id"],
                "category": ("llava_bench_" if self.kind == "wild" else "") + row["category"],
                "context": _describe_picture(contexts[row["image"]], origin=str(told)),
                "reference": reference["text"],
                "reference_id": reference.get("answer_id", reference["question_id"]),
            }
            questions.append(Question(str(row["question_id"]), row["text"], (folder / row["image"],), meta, 1024))
        check_rows(len(questions), self.rows, path=asked)
        return questions

    def judge_requests(self, questions: Sequence[Question], answers: Sequence[AnswerRow]) -> list[JudgeRequest]:
        return [
            JudgeRequest(question.id, self._payload(question, answer))
            for question, answer in match_answers(questions, answers, task=self.name)
        ]

    def ask_again(self, request: JudgeRequest, replies: Sequence[str]) -> JudgeRequest | None:
        return None

    def _payload(self, question: Question, answer: AnswerRow) -> dict[str, Any]:
        content = (
            f"[Context]\n{question.meta['context']}\n\n[Question]\n{question.prompt}\n\n"
            f"[Assistant 1]\n{question.meta['reference']}\n\n[End of Assistant 1]\n\n"
            f"[Assistant 2]\n{answer.text}\n\n[End of Assistant 2]\n\n"
            f"[System]\n{_RULE.format(seen=_SEEN[self.kind])}\n\n"
        )
        turns = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": content}]
        return {"model": "gpt-4-0314", "temperature": 0.2, "max_tokens": 1024, "messages": turns}

    def score(self, questions: Sequence[Question], answers: Sequence[AnswerRow], *, strict: bool = False) -> Score:
        pairs = match_answers(questions, answers, task=self.name)
        read = read_review_strictly if strict else read_review
        grades = [(question, read(replies_of(answer, task=self.name)[-1])) for question, answer in pairs]
        failed = sum(grade == FAILED for _, grade in grades)
        kept = [(question, grade) for question, grade in grades if not strict or grade != FAILED]
        by_category: dict[str, list[tuple[float, float]]] = {}
        for question, grade in kept:
            by_category.setdefault("all", []).append(grade)
            by_category.setdefault(question.meta["category"], []).append(grade)
        table = [summarise(name, by_category[name]) for name in sorted(by_category)]
        if not table:
            raise DataError(f"{self.name}: no review could be read; is this the judge's file?")
        treated = "left out" if strict else "averaged in as -1 and -1, as the official script does"
        return Score(
            headline={key: table[0][key] for key in ("relative", "reference", "model")},
            tables={"categories": table},
            notes=[
                f"{failed:,} reviews do not begin with two numbers and are {treated}",
                *row_notes(len(pairs), self.rows),
            ],
            printed="\n".join(
                f"{row['name']} {row['relative']:.1f} {row['reference']:.1f} {row['model']:.1f}" for row in table
            ),
        )

    def write_upload(self, questions: Sequence[Question], answers: Sequence[AnswerRow], path: Path) -> Path | None:
        return None

    def write_reviews(self, questions: Sequence[Question], answers: Sequence[AnswerRow], path: Path) -> Path:
        """The original's file of reviews, which its summarize_gpt_review reads."""
        rows = []
        for number, (question, answer) in enumerate(match_answers(questions, answers, task=self.name), start=1):
            content = replies_of(answer, task=self.name)[-1]
            row = {"id": number, "question_id": question.meta["question_id"]}
            row |= {"answer1_id": question.meta["reference_id"], "answer2_id": answer.meta.get("answer_id", "")}
            row |= {"category": question.meta["category"], "content": content, "tuple": list(read_review(content))}
            rows.append(row)
        write_answers(path, rows)
        return path


def with_reviews(answers: Sequence[AnswerRow], path: Path) -> list[AnswerRow]:
    """Answers with the reviews of the original's file, which another run paid for."""
    rows = read_lines(path, what="reviews of LLaVA-Bench", needs=("question_id", "content"))
    found = {str(row["question_id"]): row["content"] for row in rows}
    if missing := [answer.question_id for answer in answers if answer.question_id not in found]:
        raise DataError(f"{path}: no review of question {missing[0]}, with {len(missing):,} missing")
    return [AnswerRow(a.question_id, a.text, {**a.meta, JUDGED: (found[a.question_id],)}) for a in answers]


def read_review(review: str) -> tuple[float, float]:
    """Grades of the reference and the answer: the first line, commas as spaces, is two numbers with one space between.

    Anything else is `FAILED`: a double or trailing space, "8, 9", "8/10 9/10".
    """
    parts = review.split("\n")[0].replace(",", " ").split(" ")
    try:
        one, two = (float(part) for part in parts)
    except ValueError:
        return FAILED
    return one, two


def read_review_strictly(review: str) -> tuple[float, float]:
    """The repaired rule: the two numbers of the first line, however they stand."""
    numbers = [float(number) for number in _TWO_NUMBERS.findall(review.split("\n")[0])]
    return (numbers[0], numbers[1]) if len(numbers) == 2 and all(0 <= n <= 10 for n in numbers) else FAILED


def summarise(name: str, grades: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Means rounded to three decimals; then the answer's share of the reference in percent, and both times ten."""
    reference, model = (round(math.fsum(column) / len(grades), 3) for column in zip(*grades, strict=True))
    relative = model / reference * 100 if reference else math.nan
    return {
        "name": name,
        "reviews": len(grades),
        "relative": relative,
        "reference": reference * 10,
        "model": model * 10,
    }


def _describe_picture(context: Mapping[str, Any], *, origin: str) -> str:
    if "captions" in context:
        boxes = "\n".join(f"{thing['category']}: {thing['bbox']}" for thing in context["instances"])
        return "\n".join(context["captions"]) + f"\n\n{boxes}"
    if "caption" not in context:
        raise DataError(f"{origin}: picture {json.dumps(context.get('image'))} has no caption")
    caption = context["caption"]
    return caption if isinstance(caption, str) else "\n".join(caption)


LLAVA_BENCH = LlavaBench(
    "llava_bench",
    "wild",
    tuple(
        "llava-bench-in-the-wild/" + name
        for name in ("questions.jsonl", "context.jsonl", "answers_gpt4.jsonl", "images")
    ),
    60,
    {"llava-1.5-7b": 65.4, "llava-1.5-13b": 72.5, "llava-1.5-7b-lora": 67.9, "llava-1.5-13b-lora": 69.5}
    | {"llava-1.6-vicuna-7b": 81.6, "llava-1.6-vicuna-13b": 87.3, "llava-1.6-mistral-7b": 83.2, "llava-1.6-34b": 89.6},
)
LLAVA_BENCH_COCO = LlavaBench(
    "llava_bench_coco",
    "coco",
    (
        "llava_bench_coco/qa90_questions.jsonl",
        "llava_bench_coco/caps_boxes_coco2014_val_80.jsonl",
        "llava_bench_coco/qa90_gpt4_answer.jsonl",
        "coco/val2014",
    ),
    90,
    {"llava-v0-13b": 85.1},
)
