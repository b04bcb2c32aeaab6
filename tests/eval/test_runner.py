from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from llava.errors import ContextLengthError, DataError, ImageError, UsageError
from llava.eval.answers import AnswerLog
from llava.eval.runner import LocalModel, OnAnswer, Shard, ask_all, longest_first, read_decoding
from llava.eval.task import AnswerRow, Question
from llava.inference.talk import Model
from tests.eval.models import ask_about, draw_pictures, speaking_model

GREEDY = {"temperature": 0.0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return speaking_model(tmp_path_factory.mktemp("model"))


def ask(model: Model, questions: Sequence[Question], path: Path, **more: Any) -> list[AnswerRow]:
    decoding = more.pop("decoding", GREEDY)
    with AnswerLog(path, questions, run={"model_id": "m"}) as log:
        return ask_all(LocalModel(model), questions, decoding, log, **more)


def test_trees_give_the_answers_of_one_by_one_in_the_questions_order(model: Model, tmp_path: Path) -> None:
    questions = ask_about(draw_pictures(tmp_path, 3), 6)
    rows = ask(model, questions, tmp_path / "a.jsonl")
    alone = [model.chat(q.images[0], q.prompt, max_new_tokens=q.max_new_tokens) for q in questions]
    assert [row.text for row in rows] == alone
    assert [row.question_id for row in rows] == [q.id for q in questions]
    assert len(set(alone)) > 4


def test_beams_give_what_the_model_says_with_beams(model: Model, tmp_path: Path) -> None:
    questions = ask_about(draw_pictures(tmp_path, 2), 5)
    same_length = [Question(q.id, q.prompt, q.images, {}, 5) for q in questions]
    decoding = {"temperature": 0.0, "num_beams": 3, "length_penalty": -1.0}
    rows = ask(model, same_length, tmp_path / "a.jsonl", decoding=decoding)
    from llava.prompt.conversation import Image

    pairs = [(Image(q.images[0]), q.prompt) for q in same_length]
    assert [row.text for row in rows] == model.answer_all(pairs, beams=3, length_penalty=-1.0, max_new_tokens=5)


def test_the_longest_come_first_and_a_picture_stays_together() -> None:
    questions = [
        Question("a", "x", (Path("1"),), {}, 10),
        Question("b", "x" * 9, (Path("2"),), {}, 10),
        Question("c", "x" * 5, (Path("1"),), {}, 20),
    ]
    assert [[q.id for q in group] for group in longest_first(questions)] == [["c", "a"], ["b"]]


def test_a_run_that_was_stopped_asks_only_what_is_left(model: Model, tmp_path: Path) -> None:
    questions = ask_about(draw_pictures(tmp_path, 2), 3)
    whole = ask(model, questions, tmp_path / "whole.jsonl")
    path = tmp_path / "a.jsonl"

    def stop(question: Question, error: Any) -> None:
        if path.read_text().count("\n") == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ask(model, questions, path, on_answer=stop)
    heard: list[str] = []
    assert ask(model, questions, path, on_answer=lambda q, error: heard.append(q.id)) == whole
    assert len(heard) == 3
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_shards_ask_everything_once_and_a_picture_in_one_place() -> None:
    questions = ask_about([Path(str(n)) for n in range(10)], 3)
    parts = [Shard(number, 6).of(questions) for number in range(6)]
    assert sorted(q.id for part in parts for q in part) == sorted(q.id for q in questions)
    pictures = [{q.images for q in part} for part in parts]
    assert sum(len(part) for part in pictures) == 10


def test_more_shards_than_pictures_leave_some_with_nothing() -> None:
    assert Shard(5, 6).of(ask_about([Path("1")], 2)) == []


@pytest.mark.parametrize("text", ["4/4", "1", "a/b", "-1/2", "1/0"])
def test_a_shard_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="K/N"):
        Shard.parse(text)


def test_missing_pictures_are_said_before_any_work(tmp_path: Path) -> None:
    class Nobody:
        model_id = "nobody"

        def describe(self) -> dict[str, Any]:
            return {}

        def answer(self, questions: Sequence[Question], decoding: Mapping[str, Any], on_answer: OnAnswer) -> None:
            raise AssertionError("asked")

    questions = ask_about([*draw_pictures(tmp_path, 1), tmp_path / "x.png", tmp_path / "y.png"], 1)
    with (
        AnswerLog(tmp_path / "a.jsonl", questions, run={}) as log,
        pytest.raises(DataError, match=r"x.png: no such picture \(2 of 3"),
    ):
        ask_all(Nobody(), questions, {}, log)


def test_a_damaged_picture_ends_the_run_or_is_left_out_as_asked(model: Model, tmp_path: Path) -> None:
    pictures = draw_pictures(tmp_path, 2)
    pictures[1].write_bytes(b"not a picture")
    questions = ask_about(pictures, 1)
    with pytest.raises(ImageError, match="question 0-1"):
        ask(model, questions, tmp_path / "a.jsonl")
    rows = ask(model, questions, tmp_path / "a.jsonl", skip_errors=True)
    assert [row.question_id for row in rows] == ["0-0"]


def test_a_question_too_long_for_the_model_names_itself(model: Model, tmp_path: Path) -> None:
    questions = [Question("long", "x" * 600, (), {}, 4)]
    with pytest.raises(ContextLengthError, match="question long"):
        ask(model, questions, tmp_path / "a.jsonl")


def test_a_system_text_of_a_question_reaches_the_model(model: Model, tmp_path: Path) -> None:
    (picture,) = draw_pictures(tmp_path, 1)
    asked = [
        Question(said or "none", "Who?", (picture,), {} if said is None else {"system": said}, 4)
        for said in (None, "a b c d e f g")
    ]
    texts = [row.text for row in ask(model, asked, tmp_path / "a.jsonl")]
    assert texts[1] == model.chat(picture, "Who?", system="a b c d e f g", max_new_tokens=4)


def test_a_decoding_setting_that_nobody_knows_is_an_error() -> None:
    with pytest.raises(UsageError, match="top_q"):
        read_decoding({"top_q": 1})
    assert read_decoding({"temperature": 0.0}, max_new_tokens=3).max_new_tokens == 3
