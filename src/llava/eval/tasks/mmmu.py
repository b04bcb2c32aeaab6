"""MMMU, validation: college questions of thirty subjects, multiple choice or open, by MMMU's own parser."""

from __future__ import annotations

import ast
import random
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llava.errors import DataError, MissingExtraError
from llava.eval.matching import check_rows
from llava.eval.metrics.mmmu_parsing import guess, matches_open, parse_choice, parse_open
from llava.eval.pictures import PictureStore
from llava.eval.reading import check_keys, match_answers, row_notes
from llava.eval.task import AnswerRow, Question, Score, TaskFacts, TaskFile

_DOMAINS = {
    "Art and Design": ("Art", "Art_Theory", "Design", "Music"),
    "Business": ("Accounting", "Economics", "Finance", "Manage", "Marketing"),
    "Science": ("Biology", "Chemistry", "Geography", "Math", "Physics"),
    "Health and Medicine": (
        "Basic_Medical_Science",
        "Clinical_Medicine",
        "Diagnostics_and_Laboratory_Medicine",
        "Pharmacy",
        "Public_Health",
    ),
    "Humanities and Social Science": ("History", "Literature", "Sociology", "Psychology"),
    "Tech and Engineering": (
        "Agriculture",
        "Architecture_and_Engineering",
        "Computer_Science",
        "Electronics",
        "Energy_and_Power",
        "Materials",
        "Mechanical_Engineering",
    ),
}
SUBJECTS = tuple(sorted(subject for subjects in _DOMAINS.values() for subject in subjects))
_ROWS = 900
_SEED = 42
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_COLUMNS = ("id", "question", "options", "answer", "question_type", "image_1")
_CHOICE_SUFFIX = "Answer with the option's letter from the given choices directly."
_OPEN_SUFFIX = "Answer the question using a single word or phrase."


class MMMU:
    """Questions in the subjects' alphabetical order, in which the official guesses are drawn."""

    name = "mmmu"

    def describe(self) -> TaskFacts:
        return TaskFacts(
            title="MMMU, validation",
            files=[
                TaskFile(
                    "MMMU/{subject}/validation-*.parquet",
                    "questions and pictures of thirty subjects",
                    "https://huggingface.co/datasets/MMMU/MMMU",
                    rows=_ROWS,
                )
            ],
            prompt="{question}\n\n(A) {option}\n(B) ...\n\n" + _CHOICE_SUFFIX + " (open: " + _OPEN_SUFFIX + ")",
            decoding={"temperature": 0.0, "max_new_tokens": 128},
            published_metric="overall",
            published={"llava-1.6-vicuna-7b": 0.358, "llava-1.6-vicuna-13b": 0.362, "llava-1.6-mistral-7b": 0.353}
            | {"llava-1.6-34b": 0.511},
            splits=("validation",),
            needs=("extra parquet",),
            traps=(
                "An answer that names no option is guessed at random from seed 42, in the subjects' order.",
                "A letter in brackets goes before a bare one; of several, the last in the text counts.",
                "An open answer is right when the reference is anywhere in one of its key phrases.",
                "One picture is asked; questions with several refer to the others in vain.",
            ),
        )

    def read(self, root: Path, *, split: str | None) -> list[Question]:
        if split not in (None, "validation"):
            raise DataError(f"{self.name}: no split {split!r}; answers are public for validation only")
        root = root / "MMMU"
        store = PictureStore(root / "validation_pictures")
        questions = []
        for subject in SUBJECTS:
            for origin, row in _read_subject(root, subject):
                check_keys(row, _COLUMNS, origin=origin, what="a row of MMMU")
                questions.append(_question(row, subject, store, origin=origin))
        if not questions:
            raise DataError(
                f"{root}: no {SUBJECTS[0]}/validation-*.parquet nor any other subject's; --describe says more"
            )
        check_rows(len(questions), _ROWS, path=root)
        return questions

    def score(self, questions: Sequence[Question], answers: Sequence[AnswerRow], *, strict: bool = False) -> Score:
        """strict: an answer that names no option is wrong, not guessed."""
        drawn, guesses = random.Random(_SEED), 0
        right: dict[str, bool] = {}
        for question, answer in match_answers(questions, answers, task=self.name):
            options, gold = question.meta["options"], question.meta["answer"]
            if not options:
                right[question.id] = matches_open(gold, parse_open(answer.text))
                continue
            letter = parse_choice(answer.text, options)
            if letter is None:
                guesses += 1
                letter = "" if strict else guess(list(options), drawn)
            right[question.id] = letter in ([gold] if isinstance(gold, str) else gold)
        subjects = {name: [right[q.id] for q in questions if q.meta["subject"] == name] for name in SUBJECTS}
        domains, rows = [], []
        for domain, names in _DOMAINS.items():
            hits = [hit for name in names for hit in subjects[name]]
            if hits:
                domains.append(_row(f"Overall-{domain}", hits))
                rows += [_row(name, subjects[name]) for name in names if subjects[name]]
        overall = _row("Overall", list(right.values()))
        printed = {row["name"]: {"num": row["num"], "acc": round(row["acc"], 3)} for row in [*domains, *rows, overall]}
        treated = "wrong" if strict else "guessed from seed 42, as the official tool does"
        return Score(
            headline={"overall": overall["acc"]},
            tables={"domains": domains, "subjects": rows},
            notes=[f"{guesses:,} answers name no option and are {treated}", *row_notes(len(right), _ROWS)],
            printed=str(printed),
            correct={key: float(value) for key, value in right.items()},
        )

    def write_upload(self, questions: Sequence[Question], answers: Sequence[AnswerRow], path: Path) -> Path | None:
        return None


def _read_subject(root: Path, subject: str) -> list[tuple[str, dict[str, Any]]]:
    paths = sorted((root / subject).glob("validation-*.parquet"))
    if not paths:
        return []
    if find_spec("pyarrow") is None:
        raise MissingExtraError("MMMU's tables", "parquet")
    from pyarrow import ArrowException
    from pyarrow.parquet import read_table

    rows = []
    for path in paths:
        try:
            table = read_table(path)
        except (ArrowException, OSError) as error:
            raise DataError(f"{path}: cannot be read as Parquet ({error}); fetch it again") from None
        rows += [(f"{path}: row {index}", row) for index, row in enumerate(table.to_pylist())]
    return rows


def _question(row: Mapping[str, Any], subject: str, store: PictureStore, *, origin: str) -> Question:
    picture = (row["image_1"] or {}).get("bytes")
    if not picture:
        raise DataError(f"{origin}: no bytes in image_1; take the Parquet files of the dataset, pictures in them")
    options: dict[str, str] = {}
    answer: str | list[str] = row["answer"]
    if row["question_type"] == "multiple-choice":
        options = dict(zip(_LETTERS, (str(option) for option in _listed(row["options"], origin=origin)), strict=False))
        lines = "\n".join(f"({letter}) {text}" for letter, text in options.items())
        prompt = f"{row['question']}\n\n{lines}\n\n{_CHOICE_SUFFIX}"
    else:
        prompt = f"{row['question']}\n\n{_OPEN_SUFFIX}"
        if row["answer"].startswith("["):
            answer = [str(one) for one in _listed(row["answer"], origin=origin)]
    meta = {"options": options, "answer": answer, "subject": subject}
    return Question(row["id"], prompt, (store.put(picture),), meta, 128)


def _listed(text: str, *, origin: str) -> list[Any]:
    try:
        found = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        found = None
    if not isinstance(found, list) or not found:
        raise DataError(f"{origin}: {text[:40]!r} is no list; the table was changed, fetch it again")
    return found


def _row(name: str, hits: Sequence[bool]) -> dict[str, Any]:
    return {"name": name, "num": len(hits), "acc": sum(hits) / len(hits)}
