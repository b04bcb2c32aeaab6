from __future__ import annotations

import json
from pathlib import Path

import pytest

from llava.errors import LlavaError
from llava.inference.questions import Pairs, Question, read_questions


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.png", "a.jpg", "notes.txt"):
        (tmp_path / name).touch()
    return tmp_path


def test_every_picture_of_a_folder_is_asked_every_question(folder: Path) -> None:
    found = read_questions([str(folder)], ask=["What?", "Why?"])
    assert [(Path(one.path).name, one.text) for one in found] == [
        ("a.jpg", "What?"),
        ("a.jpg", "Why?"),
        ("b.png", "What?"),
        ("b.png", "Why?"),
    ]


@pytest.mark.parametrize("as_list", [False, True])
def test_records_bring_their_questions(folder: Path, as_list: bool) -> None:
    records = [
        {"question_id": 5, "image": "b.png", "text": "<image>\nWhat?", "category": "x"},
        {"id": "q", "image": "sub/c.png", "question": "Why?"},
    ]
    file = folder / "q.jsonl"
    file.write_text(json.dumps(records) if as_list else "\n\n".join(map(json.dumps, records)) + "\n")
    assert read_questions([str(file)]) == [
        Question("b.png", str(folder / "b.png"), "What?", 5),
        Question("sub/c.png", str(folder / "sub/c.png"), "Why?", "q"),
    ]
    moved = read_questions([str(file)], images=Path("/elsewhere"), ask=["Who?"])
    assert [(one.path, one.text) for one in moved] == [("/elsewhere/b.png", "Who?"), ("/elsewhere/sub/c.png", "Who?")]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", r"q\.jsonl:2: not JSON"),
        ("[1]", r"q\.jsonl:2: a record must be an object"),
        ('{"text": "What?"}', r'q\.jsonl:2: no "image"'),
        ('{"image": ["a.png", "b.png"], "text": "What?"}', r'q\.jsonl:2: no "image"'),
        ('{"image": "a.png", "text": " "}', r"q\.jsonl:2: no question"),
        ('{"image": "https://pictures.example/a.png", "text": "What?"}', "--allow-urls"),
    ],
)
def test_a_wrong_record_is_named(tmp_path: Path, line: str, says: str) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text(f'{{"image": "a.png", "text": "What?"}}\n{line}\n')
    with pytest.raises(LlavaError, match=says):
        read_questions([str(file)])


def test_pictures_without_a_question_and_missing_files_are_refused(folder: Path) -> None:
    with pytest.raises(LlavaError, match="nothing is asked"):
        read_questions([str(folder)])
    with pytest.raises(LlavaError, match=r"gone\.jsonl: No such file"):
        read_questions([str(folder / "gone.jsonl")])


def test_an_address_is_fetched_when_its_turn_comes_and_not_before() -> None:
    address = "http://127.0.0.1/a.png"
    pairs = Pairs(read_questions([address], ask=["What?"], allow_urls=True))
    assert len(pairs) == 1
    with pytest.raises(LlavaError, match="not a public address"):
        pairs[0]
