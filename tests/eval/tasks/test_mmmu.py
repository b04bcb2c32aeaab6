"""MMMU: subjects' Parquet tables, letters and phrases by its parser, guesses by its seed."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from llava.errors import DataError
from llava.eval.metrics.mmmu_parsing import matches_open, parse_choice, parse_open
from llava.eval.task import AnswerRow
from llava.eval.tasks.mmmu import MMMU

OPTIONS = {"A": "apple", "B": "banana", "C": "cherry", "D": "date"}


def _row(key: str, **changes: Any) -> dict[str, Any]:
    picture = {"bytes": b"\x89PNG made up", "path": "x.png"}
    row = {"id": key, "question": "Which <image 1>?", "options": "['apple', \"ba'nana\"]", "answer": "B"}
    return row | {"question_type": "multiple-choice", "image_1": picture} | changes


def _folder(root: Path, *, broken: dict[str, Any] | None = None) -> Path:
    art = [_row("validation_Art_1"), _row("validation_Art_2", answer="A")]
    math = [_row("validation_Math_1", question_type="open", options="[]", answer="['3.5', 'seven halves']")]
    for subject, rows in {"Math": [broken or math[0]], "Art": art}.items():
        (root / "MMMU" / subject).mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(
            pyarrow.Table.from_pylist(rows), root / "MMMU" / subject / "validation-00000-of-00001.parquet"
        )
    return root


def test_options_stand_in_brackets_and_open_questions_ask_for_a_word(tmp_path: Path) -> None:
    first, _, third = MMMU().read(_folder(tmp_path), split=None)
    assert first.prompt == (
        "Which <image 1>?\n\n(A) apple\n(B) ba'nana\n\nAnswer with the option's letter from the given choices directly."
    )
    assert third.prompt == "Which <image 1>?\n\nAnswer the question using a single word or phrase."
    assert third.meta["answer"] == ["3.5", "seven halves"]
    assert first.images == third.images
    assert first.images[0].read_bytes() == b"\x89PNG made up"


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("A", "A"),
        ("(B)", "B"),
        ("A or B", "B"),
        ("(A) and (C), not D", "C"),
        ("the apple is red and tasty today", "A"),
        ("banana", None),
        ("'A'", "A"),
        ('"D"', None),
        ("Answer:A", None),
        ("is A.", "A"),
    ],
)
def test_the_last_letter_counts_and_brackets_go_first(answer: str, letter: str | None) -> None:
    assert parse_choice(answer, OPTIONS) == letter


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ("36 watts", {"36 watts", 36.0}),
        ("The answer is 1,234.567", {1234.0, 1234.57, 234.57}),
        ("It could be 3 or 4. Therefore 7", {7.0}),
        ("A", {" a", "a "}),
        ("x = 5\ny = 6", {6.0}),
        ("no number", {"no number"}),
    ],
)
def test_an_open_answer_is_its_key_phrases_and_numbers(answer: str, found: set[str | float]) -> None:
    assert parse_open(answer) == found


def test_a_reference_is_looked_for_in_phrases_and_a_number_must_be_equal() -> None:
    assert matches_open("watt", parse_open("36 watts"))
    assert matches_open(["7", "8.004"], parse_open("it is 8"))
    assert not matches_open("8", parse_open("it is 88"))
    assert not matches_open("a", parse_open("banana"))


def test_what_says_nothing_is_guessed_from_the_seed_unless_strict(tmp_path: Path) -> None:
    questions = MMMU().read(_folder(tmp_path), split="validation")
    answers = [
        AnswerRow("validation_Art_1", "who knows"),
        AnswerRow("validation_Art_2", "no"),
        AnswerRow("validation_Math_1", "It is 3.50"),
    ]
    drawn = random.Random(42)
    guessed = [drawn.choice(["A", "B"]) for _ in range(2)]
    expected = (guessed[0] == "B") + (guessed[1] == "A") + 1
    score = MMMU().score(questions, answers)
    assert score.headline["overall"] == expected / 3
    assert score.notes[0].startswith("2 answers name no option and are guessed from seed 42")
    strict = MMMU().score(questions, answers, strict=True)
    assert strict.headline["overall"] == 1 / 3
    assert strict.printed == (
        "{'Overall-Art and Design': {'num': 2, 'acc': 0.0}, 'Overall-Science': {'num': 1, 'acc': 1.0}, "
        "'Art': {'num': 2, 'acc': 0.0}, 'Math': {'num': 1, 'acc': 1.0}, 'Overall': {'num': 3, 'acc': 0.333}}"
    )


def test_missing_cut_and_changed_tables_say_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no Accounting/validation-\*\.parquet"):
        MMMU().read(tmp_path, split=None)
    root = _folder(tmp_path / "b", broken=_row("validation_Math_1", options="apple, pear"))
    with pytest.raises(DataError, match="'apple, pear' is no list"):
        MMMU().read(root, split=None)
    path = root / "MMMU/Math/validation-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        MMMU().read(root, split=None)
    with pytest.raises(DataError, match="public for validation only"):
        MMMU().read(root, split="test")
