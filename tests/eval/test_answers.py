from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llava.errors import DataError, UsageError
from llava.eval.answers import AnswerLog, answer_record, read_answers
from llava.eval.task import Question

RUN: dict[str, Any] = {"model_id": "m", "metadata": {"max_new_tokens": 4}}


def questions(count: int) -> list[Question]:
    return [Question(str(number), f"How many {number}?", (), {}, 4) for number in range(count)]


def test_lines_have_the_originals_columns_in_their_order() -> None:
    record = answer_record(questions(1)[0], "Two", model_id="m")
    assert list(record) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
    assert record["metadata"] == {}
    assert len(record["answer_id"]) == 22


def test_answers_in_any_order_end_in_the_questions_order(tmp_path: Path) -> None:
    asked = questions(3)
    with AnswerLog(tmp_path / "a.jsonl", asked, run=RUN) as log:
        for number in (2, 0, 1):
            log.write(asked[number], f"text {number}")
        rows = log.finish()
    assert [row.text for row in rows] == ["text 0", "text 1", "text 2"]
    assert [row.text for row in read_answers(tmp_path / "a.jsonl")] == ["text 0", "text 1", "text 2"]


def test_a_line_cut_off_by_a_kill_is_asked_again_and_the_others_are_not(tmp_path: Path) -> None:
    path, asked = tmp_path / "a.jsonl", questions(3)
    with AnswerLog(path, asked, run=RUN) as log:
        log.write(asked[2], "é two")
        log.write(asked[1], "é one")
    path.write_bytes(path.read_bytes()[:-40])
    with AnswerLog(path, asked, run=RUN) as log:
        assert log.done == {"2"}
        log.write(asked[0], "zero")
        log.write(asked[1], "one")
        assert [row.text for row in log.finish()] == ["zero", "one", "é two"]


def test_every_place_at_which_a_kill_can_cut_leaves_a_file_that_goes_on(tmp_path: Path) -> None:
    path, asked = tmp_path / "a.jsonl", questions(2)
    with AnswerLog(path, asked, run=RUN) as log:
        log.write(asked[0], "é")
        log.write(asked[1], "ü")
    whole = path.read_bytes()
    first = whole.index(b"\n")
    for end in range(len(whole)):
        path.write_bytes(whole[:end])
        with AnswerLog(path, asked, run=RUN) as log:
            assert ("0" in log.done) == (end >= first), end
            for question in asked:
                if question.id not in log.done:
                    log.write(question, "again")
            assert len(log.finish()) == 2


def test_an_answer_with_an_error_is_asked_again(tmp_path: Path) -> None:
    path, asked = tmp_path / "a.jsonl", questions(1)
    with AnswerLog(path, asked, run=RUN) as log:
        log.write(asked[0], "", error="no picture")
    with AnswerLog(path, asked, run=RUN) as log:
        assert not log.done


@pytest.mark.parametrize("other", [{"model_id": "n", "metadata": {"max_new_tokens": 4}}, {"model_id": "m"}])
def test_a_file_of_another_run_is_refused_unless_forced(tmp_path: Path, other: dict[str, Any]) -> None:
    path, asked = tmp_path / "a.jsonl", questions(1)
    with AnswerLog(path, asked, run=RUN) as log:
        log.write(asked[0], "zero")
    with pytest.raises(UsageError, match="another run"):
        AnswerLog(path, asked, run=other)
    with AnswerLog(path, asked, run=other, force=True) as log:
        assert not log.done
    assert path.read_text() == ""


def test_shards_are_taken_over(tmp_path: Path) -> None:
    asked = questions(4)
    with AnswerLog(tmp_path / "shard.jsonl", asked, run=RUN) as log:
        log.write(asked[3], "three")
        log.write(asked[1], "one")
    with AnswerLog(tmp_path / "a.jsonl", asked, run=RUN) as log:
        log.write(asked[1], "mine")
        assert log.take_over(tmp_path / "shard.jsonl") == 1
        assert [row.text for row in log.finish()] == ["mine", "three"]


def test_shards_of_a_folder_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in (10, 2, 0):
        (tmp_path / f"16_{number}.jsonl").write_text(json.dumps({"question_id": number, "text": "t"}) + "\n")
    assert [row.question_id for row in read_answers(tmp_path)] == ["0", "2", "10"]


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ('{"question_id": 1, "text": "a"}\n{"question_id": "x", "text": "b"}\n', ["1", "x"]),
        ('{"question_id": 1, "text": "a"}{"question_id": 2, "text": "b"}', ["1", "2"]),
        ('[{"questionId": "1", "prediction": "a"}, {"question_id": 2, "answer": "b"}]', ["1", "2"]),
        ('{"v1_0": "a", "v1_1": "b"}', ["v1_0", "v1_1"]),
        ('{\n "v1_0": "a",\n "v1_1": "b"\n}\n', ["v1_0", "v1_1"]),
    ],
)
def test_every_format_of_answers_is_read(tmp_path: Path, text: str, ids: list[str]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    rows = read_answers(path)
    assert [row.question_id for row in rows] == ids
    assert [row.text for row in rows] == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"question_id": 1, "text": "a"}\n{"question_id": 2, "te', "a.jsonl:2: the last line is cut off"),
        ('{"question_id": 1, "text": "a"}\n{"question_id": 2\n{"question_id": 3, "text": ""}\n', "a.jsonl:2: not JSON"),
        ('{"question_id": 1}\n', 'a.jsonl:1: no "text"'),
        ('{"text": 1, "x": []}\n', 'a.jsonl:1: no "question_id"'),
        ('[{"question_id": 1, "text": "a"}', "not JSON"),
        ("[1]", "an object, not int"),
        ("3", "an object, not int"),
    ],
)
def test_a_damaged_file_is_an_error_that_names_the_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=said):
        read_answers(path)


def test_the_originals_own_answers_read_back() -> None:
    row = read_answers(Path(__file__).parent / "originals_answers.jsonl")[0]
    assert row.meta["model_id"]
    assert row.meta["prompt"]


def test_a_question_with_an_id_that_the_benchmark_has_twice_is_found_again(tmp_path: Path) -> None:
    asked = [Question(f"7 {n}", "How?", (), {"question_id": 7}, 4) for n in range(2)]
    path = tmp_path / "a.jsonl"
    with AnswerLog(path, asked, run=RUN) as log:
        log.write(asked[1], "one")
    assert read_answers(path)[0].question_id == "7"
    with AnswerLog(path, asked, run=RUN) as log:
        assert log.done == {"7 1"}
