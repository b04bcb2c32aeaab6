"""MMBench in English and Chinese, and CCBench: a picture, a question, up to four options in each of their orders."""

from __future__ import annotations

import base64
import binascii
import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.errors import DataError
from llava.eval.metrics.choices import find_option, find_option_anywhere, first_capitals
from llava.eval.pictures import PictureStore
from llava.eval.reading import match_answers
from llava.eval.spreadsheet import write_sheet
from llava.eval.task import AnswerRow, Question, Score, TaskFacts, TaskFile

SUFFIX_ENGLISH = "Answer with the option's letter from the given choices directly."
SUFFIX_CHINESE = "请直接回答选项字母。"
_LETTERS = "ABCD"
_ROTATION = 1_000_000
_REFERENCE_LETTERS = 16
_FIELD_BYTES = 1 << 28
# What pandas takes for an empty cell, and with it the original: an option "None" ends the list of options.
_EMPTY = frozenset(
    ("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA")
) | {"NULL", "NaN", "None", "n/a", "nan", "null"}
_SHORT = {
    "coarse_perception": "CP",
    "finegrained_perception (instance-level)": "FP-S",
    "finegrained_perception (cross-instance)": "FP-C",
    "logic_reasoning": "LR",
    "relation_reasoning": "RR",
    "attribute_reasoning": "AR",
}
_LEFT_OUT_OF_UPLOAD = ("hint", "category", "source", "image", "comment", "l2-category")
_PREDICTION_COLUMN = 6


@dataclass(frozen=True)
class MMBench:
    """One of the three.

    folder: where its tables are. tables: the names that each split's TSV goes by; the first that is there is read.
    """

    name: str
    title: str
    suffix: str
    folder: str
    tables: Mapping[str, tuple[str, ...]]
    published: Mapping[str, float]

    def describe(self) -> TaskFacts:
        source = "https://github.com/open-compass/MMBench"
        return TaskFacts(
            title=self.title,
            files=[
                TaskFile(f"{self.folder}/{names[0]}", f"{split}: a TSV, or {', '.join(names[1:])}", source)
                for split, names in self.tables.items()
            ],
            prompt="{hint}\n{question}\nA. {A}\nB. {B}\n...\n" + self.suffix,
            decoding={"temperature": 0.0, "max_new_tokens": 1024},
            published_metric="overall",
            published=self.published,
            splits=tuple(self.tables),
            needs=("extra xlsx, for the upload file",),
            traps=(
                "A question counts only if it is right in every order of its options (index + 1,000,000 * k).",
                "The options end at the first empty one; the original takes None, NA and n/a for empty.",
                "Official scores found letters by ChatGPT; here VLMEvalKit's exact matching, and XTuner's beside it.",
                "XTuner reads the first run of capitals A to D: 'Answer: B' is A. lmms-eval has another dev set.",
            ),
        )

    def read(self, root: Path, *, split: str | None) -> list[Question]:
        split = split or next(iter(self.tables))
        if split not in self.tables:
            raise DataError(f"{self.name}: no split {split!r}; there are {', '.join(self.tables)}")
        root = root / self.folder
        path = next((root / name for name in self.tables[split] if (root / name).is_file()), None)
        if path is None:
            raise DataError(
                f"{root}: none of {', '.join(self.tables[split])} is there; llava eval --describe says more"
            )
        rows = _read_table(path)
        columns = tuple(rows[0])
        images = {row["index"]: row["image"] for row in rows}
        store = PictureStore(root / f"{path.stem}_pictures")
        questions = []
        for row in rows:
            options = _options(row)
            if len(options) < 2:
                raise DataError(f"{path}: index {row['index']}: fewer than two options before the first empty one")
            picture = store.put(_picture(row["index"], images, origin=f"{path}: index {row['index']}"))
            meta: dict[str, Any] = {key: row[key] for key in columns if key != "image"}
            meta |= {"columns": columns, "options": options, "split": split}
            questions.append(Question(row["index"], self._prompt(row, options), (picture,), meta, 1024))
        return questions

    def _prompt(self, row: Mapping[str, str], options: Mapping[str, str]) -> str:
        lines = [] if _is_empty(row.get("hint", "")) else [row["hint"]]
        lines += [row["question"], *(f"{letter}. {text}" for letter, text in options.items()), self.suffix]
        return "\n".join(lines)

    def score(self, questions: Sequence[Question], answers: Sequence[AnswerRow], *, strict: bool = False) -> Score:
        pairs = match_answers(questions, answers, task=self.name)
        if any(_is_empty(str(question.meta.get("answer", ""))) for question in questions):
            raise DataError(f"{self.name}: this split holds no answers; write the upload file and send that in")
        rule = find_option_anywhere if strict else find_option
        found = {question.id: rule(answer.text, question.meta["options"]) for question, answer in pairs}
        right = {question.id: found[question.id] == question.meta["answer"] for question, _ in pairs}
        capitals = {question.id: first_capitals(answer.text) == question.meta["answer"] for question, answer in pairs}
        asked = {question.id: question for question in questions}
        circular, by_capitals = _circular(right), _circular(capitals)
        if strays := [key for key in circular if key not in asked]:
            raise DataError(f"{self.name}: rotations of question {strays[0]} without the question itself; wrong table")
        tables = {
            column: _by_category(circular, {key: str(asked[key].meta[column]) for key in circular})
            for column in ("l2-category", "category")
            if column in questions[0].meta
        }
        unresolved = sum(letter is None for letter in found.values())
        headline = {
            "overall": 100 * _mean(circular),
            "overall (XTuner)": 100 * _mean(by_capitals),
            "vanilla": 100 * _mean({key: right[key] for key in circular}),
            "vanilla, all orders": 100 * _mean(right),
        }
        notes = [
            f"{len(circular):,} questions in {len(right):,} rows; {unresolved:,} answers name no option and are wrong",
            f"{sum(right[key] != capitals[key] for key in right):,} answers are judged otherwise by XTuner's rule",
        ]
        lines = [f"Overall: {_mean(circular):.4f}"]
        lines += [
            f"{_SHORT.get(str(row['name']), row['name'])}: {row['accuracy']:.4f}" for t in tables.values() for row in t
        ]
        return Score(headline, tables, notes, "\n".join(lines), {key: float(value) for key, value in right.items()})

    def write_upload(self, questions: Sequence[Question], answers: Sequence[AnswerRow], path: Path) -> Path | None:
        """The xlsx that the server takes: the table without pictures and hints, `prediction` its seventh column.

        Needs the extra xlsx.
        """
        pairs = match_answers(questions, answers, task=self.name)
        columns = [name for name in questions[0].meta["columns"] if name not in _LEFT_OUT_OF_UPLOAD]
        columns.insert(_PREDICTION_COLUMN, "prediction")
        rows: list[list[str | int | None]] = []
        for question, answer in pairs:
            cells = {name: _cell(str(question.meta.get(name, ""))) for name in columns}
            rows.append([*({**cells, "index": int(question.id), "prediction": answer.text}.values())])
        return write_sheet(path.with_suffix(".xlsx"), columns, rows)


def _read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a TSV with quotes as pandas reads them. Raises DataError for a cut or foreign one."""
    limit = csv.field_size_limit(_FIELD_BYTES)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter="\t", strict=True)
            missing = {"index", "question", "A", "B", "image"} - set(reader.fieldnames or ())
            if missing:
                raise DataError(f"{path}: no column {', '.join(sorted(missing))}; is it a TSV of MMBench?")
            rows = list(reader)
    except (csv.Error, UnicodeDecodeError, OSError) as error:
        raise DataError(f"{path}: cannot be read as a TSV ({error}); fetch it again") from None
    finally:
        csv.field_size_limit(limit)
    for number, row in enumerate(rows, start=1):
        if None in row or None in row.values() or not row["index"].isdigit():
            raise DataError(
                f"{path}: row {number}: not {len(reader.fieldnames or ())} columns; it was cut, fetch it again"
            )
    if not rows:
        raise DataError(f"{path}: no rows; fetch it again")
    return rows


def _picture(index: str, images: Mapping[str, str], *, origin: str) -> bytes:
    """A row's picture: base64, or in newer tables the index of the row that has it."""
    content = images[index]
    if len(content) < _REFERENCE_LETTERS:
        if content not in images:
            raise DataError(
                f"{origin}: its picture should be that of row {content}, which is not there; fetch it again"
            )
        content = images[content]
    try:
        return base64.b64decode(content, validate=True)
    except binascii.Error:
        raise DataError(f"{origin}: the picture is no base64; the table was cut, fetch it again") from None


def _is_empty(value: str) -> bool:
    return value in _EMPTY or value.lower() in ("nan", "none")


def _options(row: Mapping[str, str]) -> dict[str, str]:
    options: dict[str, str] = {}
    for letter in _LETTERS:
        if _is_empty(row.get(letter, "")):
            break
        options[letter] = row[letter]
    return options


def _cell(value: str) -> str | None:
    return None if value in _EMPTY else value


def _circular(right: Mapping[str, bool]) -> dict[str, bool]:
    """By main question: whether every order of it is right."""
    groups: dict[str, bool] = {}
    for key, value in right.items():
        main = str(int(key) % _ROTATION)
        groups[main] = groups.get(main, True) and value
    return groups


def _by_category(hits: Mapping[str, bool], category: Mapping[str, str]) -> list[dict[str, str | int | float]]:
    rows: list[dict[str, str | int | float]] = []
    for name in sorted(set(category.values())):
        of_name = {key: hit for key, hit in hits.items() if category[key] == name}
        rows.append(
            {"name": name, "questions": len(of_name), "right": sum(of_name.values()), "accuracy": _mean(of_name)}
        )
    return rows


def _mean(hits: Mapping[str, bool]) -> float:
    return sum(hits.values()) / len(hits)


MMBENCH = MMBench(
    "mmbench",
    "MMBench",
    SUFFIX_ENGLISH,
    "mmbench",
    {
        "dev": ("mmbench_dev_20230712.tsv", "MMBench_DEV_EN.tsv", "MMBench_DEV_EN_legacy.tsv"),
        "test": ("mmbench_test_20230712.tsv", "MMBench_TEST_EN.tsv", "MMBench_TEST_EN_legacy.tsv"),
    },
    {"llava-1.5-7b": 64.3, "llava-1.5-13b": 67.7, "llava-1.5-7b-lora": 66.1, "llava-1.5-13b-lora": 68.5}
    | {"llava-1.6-vicuna-7b": 67.4, "llava-1.6-vicuna-13b": 70.0, "llava-1.6-mistral-7b": 68.7, "llava-1.6-34b": 79.3},
)
MMBENCH_CN = MMBench(
    "mmbench_cn",
    "MMBench, Chinese",
    SUFFIX_CHINESE,
    "mmbench_cn",
    {
        "dev": ("mmbench_dev_cn_20231003.tsv", "MMBench_DEV_CN.tsv", "MMBench_DEV_CN_legacy.tsv"),
        "test": ("mmbench_test_cn_20231003.tsv", "MMBench_TEST_CN.tsv", "MMBench_TEST_CN_legacy.tsv"),
    },
    {"llava-1.5-7b": 58.3, "llava-1.5-13b": 63.6, "llava-1.5-7b-lora": 58.9, "llava-1.5-13b-lora": 61.5}
    | {"llava-1.6-vicuna-7b": 60.6, "llava-1.6-vicuna-13b": 64.4, "llava-1.6-mistral-7b": 61.2, "llava-1.6-34b": 79.0},
)
CCBENCH = MMBench(
    "ccbench", "CCBench", SUFFIX_CHINESE, "ccbench", {"test": ("CCBench.tsv", "CCBench_legacy.tsv", "ccbench.tsv")}, {}
)
