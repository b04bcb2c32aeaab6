"""GQA, balanced test-dev: one right answer, equal to the letter. After the data set's own description of its scores."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from llava.errors import DataError
from llava.eval.matching import benchmark_folder, first_there, in_question_order, match_by_words
from llava.eval.metrics.gqa import distribution, prediction, tables_of
from llava.eval.published import published
from llava.eval.question_files import GREEDY_128, SHORT_ANSWER, read_original_questions
from llava.eval.reading import check_keys, read_json, row_notes
from llava.eval.task import AnswerRow, Question, Score, TaskFacts, TaskFile

ROWS = 12578
_WHAT = "GQA's questions, an object by question id"
_TABLES = {
    "structural": "Accuracy / structural type",
    "semantic": "Accuracy / semantic type",
    "steps": "Accuracy / steps number",
    "words": "Accuracy / words number",
}


class GQA:
    """LLaVA's questions, and the data set's own file for answers and types."""

    name: ClassVar[str] = "gqa"

    def describe(self) -> TaskFacts:
        source = "https://cs.stanford.edu/people/dorarad/gqa/download.html"
        return TaskFacts(
            title="GQA",
            files=(
                TaskFile("gqa/llava_gqa_testdev_balanced.jsonl", "questions", "eval.zip of LLaVA", rows=ROWS),
                TaskFile("gqa/data/testdev_balanced_questions.json", "answers and types", source, rows=ROWS),
                TaskFile("gqa/data/images/", "pictures", source),
            ),
            prompt=f"{{question}}\n{SHORT_ANSWER}",
            decoding=GREEDY_128,
            published_metric="accuracy",
            published=published(self.name),
            traps=(
                "An answer is lower-cased and loses its full stops at the end, nothing else: ' No. ' is wrong.",
                "lmms-eval ignores case and marks, so its figures are higher.",
                "Validity and plausibility are 0 on test-dev: the file of possible answers is not published for it.",
            ),
        )

    def read(self, root: Path, *, split: str | None) -> list[Question]:
        if split not in (None, "testdev"):
            raise DataError(f"gqa: no split {split!r}; there is testdev")
        folder = benchmark_folder(root, "gqa", "GQA")
        path = folder / "llava_gqa_testdev_balanced.jsonl"
        truth = first_there(
            folder / "data" / "testdev_balanced_questions.json",
            folder / "data" / "questions1.2" / "testdev_balanced_questions.json",
            folder / "testdev_balanced_questions.json",
        )
        questions = read_original_questions(
            path,
            images=first_there(folder / "data" / "images", folder / "images"),
            what="GQA's questions from LLaVA's eval.zip",
            published=ROWS,
        )
        rows = read_json(truth, what=_WHAT)
        check_keys(rows, (), origin=str(truth), what=_WHAT)
        found = []
        for question in questions:
            key = str(question.meta["question_id"])
            if key not in rows:
                raise DataError(f"{truth}: no question {key} ({question.meta['origin']}); is it test-dev, balanced?")
            check_keys(rows[key], ("answer", "isBalanced", "types", "question"), origin=f"{truth}: {key}", what=_WHAT)
            found.append(replace(question, meta={**question.meta, "answers": [rows[key]["answer"]], "gqa": rows[key]}))
        asked = {question.id for question in questions}
        unasked = [key for key, row in rows.items() if row.get("isBalanced") and key not in asked]
        if unasked:
            raise DataError(f"{path}: {len(unasked):,} questions of {truth.name} are not asked, such as {unasked[0]}")
        return found

    def score(self, questions: Sequence[Question], answers: Sequence[AnswerRow], *, strict: bool = False) -> Score:
        """strict: blanks round an answer and its full stop do not make it wrong."""
        pairs = in_question_order(match_by_words(questions, answers, task=self.name), questions)
        correct: dict[str, float] = {}
        groups: dict[str, dict[Any, list[float]]] = {name: defaultdict(list) for name in ("all", "kind", *_TABLES)}
        gold: dict[str, Counter[str]] = defaultdict(Counter)
        told: dict[str, Counter[str]] = defaultdict(Counter)
        blanks = 0
        for question, answer in pairs:
            row, truth = question.meta["gqa"], question.meta["answers"][0]
            said = prediction(answer.text, strict=strict)
            blanks += prediction(answer.text) != prediction(answer.text, strict=True)
            if not row["isBalanced"]:
                continue
            correct[question.id] = hit = float(said == truth)
            for name, key in tables_of(row).items():
                groups[name][key].append(hit)
            if (group := row.get("groups", {}).get("global")) is not None:
                gold[group][truth] += 1
                told[group][said] += 1
        if not correct:
            raise DataError("gqa: no balanced question; use the balanced test-dev")
        headline = {
            "binary": _percent(groups["kind"]["binary"]),
            "open": _percent(groups["kind"]["open"]),
            "accuracy": _percent(groups["all"][""]),
            "validity": 0.0,
            "plausibility": 0.0,
            "distribution": distribution(gold, told),
        }
        tables = {
            name: [{name: key, "accuracy": _percent(hits), "rows": len(hits)} for key, hits in sorted(found.items())]
            for name, found in groups.items()
            if name in _TABLES
        }
        notes = [*row_notes(len(pairs), ROWS), f"{blanks:,} answers have blanks at an end, which make them wrong"]
        return Score(headline, tables, notes, _printed(headline, tables), correct)

    def write_upload(self, questions: Sequence[Question], answers: Sequence[AnswerRow], path: Path) -> Path | None:
        """The predictions that GQA's own script reads."""
        pairs = match_by_words(questions, answers, task=self.name)
        rows = [{"questionId": q.meta["question_id"], "prediction": prediction(answer.text)} for q, answer in pairs]
        path.write_text(json.dumps(rows), encoding="utf-8")
        return path


def _percent(hits: Sequence[float]) -> float:
    return 100 * sum(hits) / len(hits) if hits else 0.0


def _printed(headline: Mapping[str, float], tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    lines = [""]
    for name, figure in headline.items():
        lines.append(f"{name.capitalize()}: {figure:.2f}{' (lower is better)' if name == 'distribution' else '%'}")
    for name, title in _TABLES.items():
        lines += ["", f"{title}:"]
        lines += [f"  {row[name]}: {row['accuracy']:.2f}% ({row['rows']} questions)" for row in tables[name]]
    return "\n".join(lines)
