"""Answers find their questions, and what cannot be matched is said."""

from pathlib import Path

import pytest

from llava.errors import DataError
from llava.eval.matching import benchmark_folder, check_rows, in_question_order, match_by_words, unique_ids
from llava.eval.task import AnswerRow, Question

QUESTIONS = [
    Question("x.png", "Is it red?", (), {"question_id": "x.png"}, 8),
    Question("x.png#2", "Is it blue?", (), {"question_id": "x.png"}, 8),
    Question("y.png", "Is it red?", (), {"question_id": "y.png"}, 8),
]


def answer(question_id: str, prompt: str | None = None, own: str | None = None) -> AnswerRow:
    meta = {} if prompt is None else {"prompt": prompt}
    return AnswerRow(question_id, "yes", {**meta, "metadata": {} if own is None else {"id": own}})


def matched(*answers: AnswerRow) -> list[str]:
    return [question.id for question, _ in match_by_words(QUESTIONS, answers, task="t")]


def test_questions_that_share_an_id_are_told_apart_by_their_words() -> None:
    found = matched(answer("x.png", "Is it blue?"), answer("y.png"), answer("x.png", "Is it red?"))
    assert found == ["x.png#2", "y.png", "x.png"]


def test_an_id_written_here_needs_no_words() -> None:
    assert matched(answer("x.png", own="x.png#2"), answer("x.png", own="x.png"), answer("y.png")) == [
        "x.png#2",
        "x.png",
        "y.png",
    ]


def test_answers_without_a_prompt_go_to_questions_of_their_id_in_turn() -> None:
    assert matched(answer("x.png"), answer("x.png"), answer("y.png")) == ["x.png", "x.png#2", "y.png"]


def test_pairs_can_be_put_into_the_questions_order() -> None:
    pairs = match_by_words(QUESTIONS, [answer("y.png"), answer("x.png"), answer("x.png")], task="t")
    assert [question.id for question, _ in in_question_order(pairs, QUESTIONS)] == ["x.png", "x.png#2", "y.png"]


@pytest.mark.parametrize(
    ("answers", "problem"),
    [
        ([answer("x.png"), answer("y.png")], "1 of 3 questions have no answer, such as x.png#2"),
        ([answer("y.png"), answer("y.png")], "two answers to question y.png"),
        ([answer("z.png")], "an answer to no question, z.png"),
        ([answer("x.png", "Is it green?")], "an answer to no question, x.png"),
    ],
)
def test_what_does_not_match_is_an_error(answers: list[AnswerRow], problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        matched(*answers)


def test_ids_become_unique() -> None:
    assert unique_ids([7, "7", 8, 7]) == ["7", "7#2", "8", "7#3"]


def test_a_folder_may_hold_all_benchmarks_or_be_one(tmp_path: Path) -> None:
    (tmp_path / "MME").mkdir()
    assert benchmark_folder(tmp_path, "mme-new", "MME") == tmp_path / "MME"
    assert benchmark_folder(tmp_path, "pope") == tmp_path


def test_a_file_that_was_cut_off_or_grew_is_refused_and_a_small_one_is_taken() -> None:
    for rows in (99, 101, 51):
        with pytest.raises(DataError, match=f"{rows} rows, but the published file has 100"):
            check_rows(rows, 100, path=Path("q.jsonl"))
    check_rows(100, 100, path=Path("q.jsonl"))
    check_rows(50, 100, path=Path("q.jsonl"))
