"""VQAv2: test-dev as EvalAI takes it, and the validation set scored here as vqaEval does."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from llava.errors import DataError
from llava.eval.matching import benchmark_folder, check_rows, first_there, in_question_order, match_by_words
from llava.eval.metrics.vqa import has_dot_limit, normalise_m4c, vqa_accuracy
from llava.eval.published import published
from llava.eval.question_files import GREEDY_128, SHORT_ANSWER, read_original_questions
from llava.eval.reading import read_lines, row_notes
from llava.eval.task import AnswerRow, Question, Score, TaskFacts, TaskFile
from llava.eval.vqa_files import read_vqa_questions

ROWS = {"test-dev": 107394, "test": 447793, "val": 214354}
_FILES = {
    "test-dev": "llava_vqav2_mscoco_test-dev2015.jsonl",
    "test": "llava_vqav2_mscoco_test2015.jsonl",
    "val": "v2_OpenEnded_mscoco_val2014_questions.json",
}
_ANNOTATIONS = "v2_mscoco_val2014_annotations.json"
_SERVER = "https://eval.ai/web/challenges/challenge-page/830"


class VQAV2:
    """test-dev (usual) and test go to EvalAI's challenge 830; val has public answers."""

    name: ClassVar[str] = "vqav2"

    def describe(self) -> TaskFacts:
        zips, own = "eval.zip of LLaVA", "https://visualqa.org/download.html"
        return TaskFacts(
            title="VQAv2",
            files=(
                TaskFile(f"vqav2/{_FILES['test-dev']}", "questions of test-dev", zips, rows=ROWS["test-dev"]),
                TaskFile(f"vqav2/{_FILES['test']}", "the upload is laid over these", zips, rows=ROWS["test"]),
                TaskFile("vqav2/test2015/", "pictures", "http://images.cocodataset.org/zips/test2015.zip"),
                TaskFile(f"vqav2/{_FILES['val']}", "questions of val", own, rows=ROWS["val"]),
                TaskFile(f"vqav2/{_ANNOTATIONS}", "answers of val", own, rows=ROWS["val"]),
                TaskFile("vqav2/val2014/", "pictures of val", "http://images.cocodataset.org/zips/val2014.zip"),
            ),
            prompt=f"{{question}}\n{SHORT_ANSWER}",
            decoding=GREEDY_128,
            published_metric="overall",
            published=published(self.name),
            splits=tuple(ROWS),
            traps=(
                f"test-dev is scored by {_SERVER}; the file holds all of test, the rest as empty texts.",
                "When all ten people agree, answers are compared as they are: 'Yes' is wrong where ten said 'yes'.",
                "Otherwise both sides are normalised; only the first 32 full stops are removed.",
                "Ten answers, one left out at a time: 3 equal ones are worth .9; not min(1, n / 3).",
                "The upload is normalised by another normaliser (m4c's) than the scorer's own.",
            ),
        )

    def read(self, root: Path, *, split: str | None) -> list[Question]:
        split = split or "test-dev"
        if split not in ROWS:
            raise DataError(f"vqav2: no split {split!r}; there are {', '.join(ROWS)}")
        folder = benchmark_folder(root, "vqav2", "VQAv2")
        if split == "val":
            return read_vqa_questions(
                folder / _FILES["val"],
                folder / _ANNOTATIONS,
                images=first_there(folder / "val2014", root / "coco" / "val2014"),
                picture="COCO_val2014_{:012}.jpg",
                meta={"split": "val"},
                published=ROWS["val"],
            )
        questions = read_original_questions(
            folder / _FILES[split],
            images=first_there(folder / "test2015", root / "coco" / "test2015"),
            what=f"VQAv2's questions of {split} from LLaVA's eval.zip",
            published=ROWS[split],
        )
        over = folder / _FILES["test"]
        return [replace(question, meta={**question.meta, "split": split, "over": over}) for question in questions]

    def score(self, questions: Sequence[Question], answers: Sequence[AnswerRow], *, strict: bool = False) -> Score:
        """strict: all dots go, and answers are normalised even where ten people agree."""
        pairs = in_question_order(match_by_words(questions, answers, task=self.name), questions)
        split = questions[0].meta["split"]
        notes = row_notes(len(pairs), ROWS[split])
        if split != "val":
            return Score({}, {}, [*notes, f"the answers of {split} are not public: upload the file to {_SERVER}"], "")
        correct = {q.id: vqa_accuracy(answer.text, q.meta["answers"], strict=strict) for q, answer in pairs}
        tables = {name: _by(name, questions, correct) for name in ("question_type", "answer_type")}
        touched = 0
        for question, answer in pairs:
            truths = question.meta["answers"]
            if len(set(truths)) == 1 and not vqa_accuracy(answer.text, truths):
                touched += vqa_accuracy(answer.text, truths, strict=True) > 0
        limited = sum(has_dot_limit(answer.text) for _, answer in pairs)
        overall = _percent(list(correct.values()))
        notes += [
            f"{touched:,} answers are wrong only because ten people agree, and nothing is normalised then",
            f"{limited:,} answers have more dots than the normaliser removes (32)",
        ]
        return Score({"overall": overall}, tables, notes, _printed(overall, tables), correct)

    def write_upload(self, questions: Sequence[Question], answers: Sequence[AnswerRow], path: Path) -> Path | None:
        """EvalAI's file: every question of test2015 in its order, with "" where nothing was asked; none for val."""
        pairs = match_by_words(questions, answers, task=self.name)
        if questions[0].meta["split"] == "val":
            return None
        over = questions[0].meta["over"]
        rows = read_lines(over, what="all questions of VQAv2's test set", needs=("question_id",))
        check_rows(len(rows), ROWS["test"], path=over)
        texts = {str(question.meta["question_id"]): answer.text for question, answer in pairs}
        path.write_text(json.dumps(lay_over([row["question_id"] for row in rows], texts)), encoding="utf-8")
        return path


def lay_over(question_ids: Sequence[Any], texts: Mapping[str, str]) -> list[dict[str, Any]]:
    """The rows of an upload: every id in order, its normalised answer, or "" without one."""
    return [{"question_id": key, "answer": normalise_m4c(texts.get(str(key), ""))} for key in question_ids]


def _by(name: str, questions: Sequence[Question], correct: Mapping[str, float]) -> list[dict[str, Any]]:
    groups: dict[str, list[float]] = defaultdict(list)
    for question in questions:
        groups[question.meta[name]].append(correct[question.id])
    return [{name: key, "accuracy": _percent(hits), "rows": len(hits)} for key, hits in groups.items()]


def _percent(hits: Sequence[float]) -> float:
    """As vqaEval keeps it: two decimals."""
    return round(100 * sum(hits) / len(hits), 2)


def _printed(overall: float, tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    lines = [f"Overall Accuracy is: {overall:.2f}\n"]
    for name, title in (("question_type", "Question"), ("answer_type", "Answer")):
        lines.append(f"Per {title} Type Accuracy is the following:")
        lines += [*(f"{row[name]} : {row['accuracy']:.2f}" for row in tables[name]), ""]
    return "\n".join(lines)
