"""ScienceQA's records are those of the original's converter, to the byte, in every prompt format."""

import json
from pathlib import Path
from typing import Any

import pytest

from llava.data.conversion import convert
from llava.data.science_qa import INPUTS, OUTPUTS, read_science_qa, to_record
from llava.errors import DataError, UsageError

GOLDEN = Path(__file__).parent.parent / "golden" / "scienceqa"

PROBLEM: dict[str, Any] = {
    "question": "Question: Q?",
    "choices": ["x", "y"],
    "answer": 1,
    "hint": " H ",
    "image": None,
    "lecture": "L1\\nL2",
    "solution": "S",
}


@pytest.mark.parametrize("file", sorted(GOLDEN.glob("llava_test_*.json")), ids=lambda file: file.stem)
def test_records_equal_the_originals(file: Path, tmp_path: Path) -> None:
    prompt = file.stem.removeprefix("llava_test_")
    out = tmp_path / "out.json"
    convert(GOLDEN, out, to="llava", read_as="scienceqa", options={"split": "test", "prompt": prompt})
    made, recorded = json.loads(out.read_text()), json.loads(file.read_text())
    assert made == recorded
    assert [list(record) for record in made] == [list(record) for record in recorded]


@pytest.mark.parametrize(
    ("inputs", "asked"),
    [
        ("CQM", "Context: H\nQuestion: Question: Q?\nOptions: (A) x (B) y"),
        ("QCM", "Q?\nContext: H\nOptions: (A) x (B) y"),
        ("QCML", "Q?\nContext: H\nOptions: (A) x (B) y\nBECAUSE: L1\nL2"),
        ("QCME", "Q?\nContext: H\nOptions: (A) x (B) y\nBECAUSE: S"),
        ("QCMLE", "Q?\nContext: H\nOptions: (A) x (B) y\nBECAUSE: L1\nL2 S"),
        ("QCLM", "Q?\nContext: H\nBECAUSE: L1\nL2\nOptions: (A) x (B) y"),
        ("QCEM", "Q?\nContext: H\nBECAUSE: S\nOptions: (A) x (B) y"),
        ("QCLEM", "Q?\nContext: H\nBECAUSE: L1\nL2 S\nOptions: (A) x (B) y"),
    ],
)
def test_every_way_of_asking(inputs: str, asked: str) -> None:
    record = to_record("1", PROBLEM, inputs=inputs, outputs="A")
    assert record["conversations"][0]["value"] == asked


@pytest.mark.parametrize(
    ("outputs", "told"),
    [
        ("A", "The answer is B."),
        ("AL", "The answer is B. BECAUSE: S"),
        ("AE", "The answer is B. BECAUSE: L1\nL2"),
        ("ALE", "The answer is B. BECAUSE: L1\nL2 S"),
        ("AEL", "The answer is B. BECAUSE: S L1\nL2"),
        ("LA", "L1\nL2 The answer is B."),
        ("EA", "S The answer is B."),
        ("LEA", "L1\nL2 S The answer is B."),
        ("ELA", "S L1\nL2 The answer is B."),
        ("LEPA", "LECTURE: L1\nL2\nSOLUTION: S\n###\nANSWER: B."),
    ],
)
def test_every_way_of_answering(outputs: str, told: str) -> None:
    record = to_record("1", PROBLEM, inputs="QCM", outputs=outputs)
    assert record["conversations"][1]["value"] == told


def test_every_format_is_tested() -> None:
    assert (len(INPUTS), len(OUTPUTS)) == (8, 10)


def test_an_empty_because_goes(tmp_path: Path) -> None:
    bare = {**PROBLEM, "lecture": "", "solution": ""}
    record = to_record("1", bare, inputs="QCML", outputs="ALE")
    assert [turn["value"] for turn in record["conversations"]] == [
        "Q?\nContext: H\nOptions: (A) x (B) y",
        "The answer is B.",
    ]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"split": "tset"}, "did you mean 'test'"),
        ({"prompt": "QCM"}, "a prompt format is IN-OUT"),
        ({"prompt": "QCM-XYZ"}, "out: A, AL"),
    ],
)
def test_what_is_unknown_is_named(options: dict[str, str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        list(read_science_qa(GOLDEN, **options))


def test_a_problem_that_is_not_whole_is_named() -> None:
    with pytest.raises(DataError, match="problem 7: needs question, hint"):
        to_record("7", {"question": "Q"}, inputs="QCM", outputs="A", origin="problem 7")
    with pytest.raises(DataError, match="answer 2 of 2 choices"):
        to_record("7", {**PROBLEM, "answer": 2}, inputs="QCM", outputs="A")
