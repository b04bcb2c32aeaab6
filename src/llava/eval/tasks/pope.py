"""POPE: is there such a thing in the picture? Yes and no, scored as LLaVA's eval_pope does, by position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from llava.errors import DataError
from llava.eval.matching import benchmark_folder, first_there, in_question_order, match_by_words
from llava.eval.metrics.yes_no import binary_figures, read_pope, read_strictly
from llava.eval.published import published
from llava.eval.question_files import GREEDY_128, SHORT_ANSWER, first_line, read_original_questions
from llava.eval.reading import read_lines, row_notes
from llava.eval.task import AnswerRow, Question, Score, TaskFacts, TaskFile

CATEGORIES = {"adversarial": 3000, "popular": 3000, "random": 2910}
LABELS = "https://github.com/AoiDragon/POPE/tree/e3e39262c85a6a83f26cf5094022a782cb0df58d/output/coco"
_WRONG_LABELS = f"take the labels from {LABELS}; today's have 3,000 random rows and match another file of questions"


class POPE:
    """The three files of labels over COCO val2014."""

    name: ClassVar[str] = "pope"

    def describe(self) -> TaskFacts:
        files = [
            TaskFile("pope/llava_pope_test.jsonl", "questions", "eval.zip of LLaVA", rows=sum(CATEGORIES.values())),
            *(TaskFile(f"pope/coco/coco_pope_{name}.json", "labels", LABELS, rows=n) for name, n in CATEGORIES.items()),
            TaskFile("pope/val2014/", "pictures", "http://images.cocodataset.org/zips/val2014.zip"),
        ]
        return TaskFacts(
            title="POPE",
            files=files,
            prompt=f"{{question}}\n{SHORT_ANSWER}",
            decoding=GREEDY_128,
            published_metric="F1",
            published=published(self.name),
            traps=(
                "Today's random labels have 3,000 rows; LLaVA's questions follow the revision with 2,910.",
                "Answers meet labels by position, so a shuffled file gets another figure in silence.",
                "Only the words No, no and not before the first full stop mean no: NO, None and an empty text are yes.",
                "The paper's figure is the mean F1 of the three; lmms-eval pools 9,000 rows and matches whole answers.",
            ),
        )

    def read(self, root: Path, *, split: str | None) -> list[Question]:
        """split: one of the categories, None for all three."""
        if split is not None and split not in CATEGORIES:
            raise DataError(f"pope: no split {split!r}; there are {', '.join(CATEGORIES)}, and all without --split")
        folder = benchmark_folder(root, "pope", "POPE")
        images = first_there(folder / "val2014", root / "coco" / "val2014", root / "val2014")
        path = folder / "llava_pope_test.jsonl"
        questions = read_original_questions(
            path, images=images, what="POPE's questions from LLaVA's eval.zip", published=sum(CATEGORIES.values())
        )
        found = []
        for category in CATEGORIES if split is None else (split,):
            asked = [question for question in questions if question.meta["category"] == category]
            labels = first_there(folder / "coco" / f"coco_pope_{category}.json", folder / f"coco_pope_{category}.json")
            if asked or labels.exists():
                found += _labelled(asked, labels)
        if not found:
            raise DataError(f"{path}: no question of the categories {', '.join(CATEGORIES)}; is it POPE's?")
        return found

    def score(self, questions: Sequence[Question], answers: Sequence[AnswerRow], *, strict: bool = False) -> Score:
        """strict: labels by question, not by position, and every way to say no (or nothing) read as what it is."""
        pairs = match_by_words(questions, answers, task=self.name)
        moved = differ = 0
        tables, printed = [], []
        correct: dict[str, float] = {}
        for category in CATEGORIES:
            told = [pair for pair in pairs if pair[0].meta["category"] == category]
            if not told:
                continue
            asked = in_question_order(told, questions)
            moved += sum(one[0].id != two[0].id for one, two in zip(told, asked, strict=True))
            differ += sum(read_pope(answer.text) != read_strictly(answer.text) for _, answer in told)
            read = read_strictly if strict else read_pope
            labels = [question.meta["label"] for question, _ in asked]
            judged = asked if strict else told
            row, hits = binary_figures([read(answer.text) for _, answer in judged], labels)
            correct.update((question.id, float(hit)) for (question, _), hit in zip(judged, hits, strict=True))
            tables.append({"category": category, **row})
            printed.append(_printed(category, row))
        mean = sum(row["F1"] for row in tables) / len(tables)
        notes = [
            *row_notes(len(pairs), sum(CATEGORIES[row["category"]] for row in tables)),
            f"{moved:,} answers are not in the questions' order; the official rule goes by position",
            f"{differ:,} answers are read otherwise than they mean (NO, None, nothing at all count as yes)",
        ]
        return Score({"F1": mean * 100}, {"categories": tables}, notes, "\n".join(printed), correct)

    def write_upload(self, questions: Sequence[Question], answers: Sequence[AnswerRow], path: Path) -> Path | None:
        return None


def _labelled(asked: Sequence[Question], path: Path) -> list[Question]:
    labels = read_lines(path, what="POPE's labels", needs=("label",))
    if len(labels) != len(asked):
        raise DataError(f"{path}: {len(labels):,} labels for {len(asked):,} questions; {_WRONG_LABELS}")
    found = []
    for number, (question, label) in enumerate(zip(asked, labels, strict=True), start=1):
        for name, ours in (("image", question.meta["image"]), ("text", first_line(question.prompt))):
            if label.get(name, ours) != ours:
                raise DataError(
                    f"{path}:{number}: {name} {label[name]!r}, but the question has {ours!r}; {_WRONG_LABELS}"
                )
        if label["label"] not in ("yes", "no"):
            raise DataError(f"{path}:{number}: label {label['label']!r}; yes and no there are")
        meta = {**question.meta, "label": label["label"], "answers": [label["label"]]}
        found.append(Question(question.id, question.prompt, question.images, meta, question.max_new_tokens))
    return found


def _printed(category: str, row: Mapping[str, Any]) -> str:
    figures = ", ".join(f"{row[name]:.3f}" for name in ("F1", "accuracy", "precision", "recall", "yes ratio"))
    return (
        f"Category: {category}, # samples: {row['rows']}\nTP\tFP\tTN\tFN\t\n"
        f"{row['TP']}\t{row['FP']}\t{row['TN']}\t{row['FN']}\nAccuracy: {row['accuracy']}\n"
        f"Precision: {row['precision']}\nRecall: {row['recall']}\nF1 score: {row['F1']}\n"
        f"Yes ratio: {row['yes ratio']}\n{figures}\n===================================="
    )
