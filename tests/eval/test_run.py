from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from llava.errors import DataError, EngineError, UsageError
from llava.eval.result import load_results, load_rows
from llava.eval.run import Asking, run_task, score_answers
from llava.eval.runner import OnAnswer, Shard
from llava.eval.task import AnswerRow, Question, Score
from tests.eval.made_up import MadeUp, write_benchmark
from tests.eval.models import draw_pictures


class Says:
    """Answers with the last letter of the picture's name, or with what `words` has for it."""

    model_id = "says"

    def __init__(self, words: Mapping[str, str], *, weights: str = "w") -> None:
        self.words = words
        self.weights = weights
        self.asked = 0

    def describe(self) -> dict[str, Any]:
        return {"model": "says", "weights": self.weights}

    def answer(self, questions: Sequence[Question], decoding: Mapping[str, Any], on_answer: OnAnswer) -> None:
        assert decoding == {"temperature": 0.0}
        for question in reversed(questions):
            self.asked += 1
            word = self.words.get(question.id)
            on_answer(question, word or "", None if word else EngineError("no word"))


WORDS = {"0": "Yes", "1": "no", "10": "no", "11": "No"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_benchmark(tmp_path / "data", draw_pictures(tmp_path, 2))


def run(root: Path, out: Path, says: Says, **asking: Any) -> Any:
    return run_task(MadeUp(), says, root=root, out=out, asking=Asking(**asking))


def test_a_benchmark_runs_from_its_files_to_figures_and_upload(root: Path, tmp_path: Path) -> None:
    result = run(root, tmp_path / "out", Says(WORDS))
    assert result.headline == {"accuracy": 75.0}
    assert result.interval == (50.0, 100.0)
    assert result.provenance["rows"] == 4
    assert result.provenance["pictures"] == 2
    assert result.provenance["decoding"] == {"temperature": 0.0, "max_new_tokens": 4}
    assert result.provenance["weights"] == "w"
    assert result.provenance["files"][0]["sha256"]
    assert json.loads((tmp_path / "out/made_up/upload/made_up.json").read_text()) == ["Yes", "no", "no", "No"]
    assert load_results(tmp_path / "out")[0][0] == result
    rows = load_rows(tmp_path / "out/made_up")
    assert [(row.text, row.reference, row.correct) for row in rows] == [
        ("Yes", "yes", 1.0),
        ("no", "yes", 0.0),
        ("no", "no", 1.0),
        ("No", "no", 1.0),
    ]


def test_a_finished_benchmark_is_scored_again_without_asking(root: Path, tmp_path: Path) -> None:
    run(root, tmp_path / "out", Says(WORDS))
    again = Says({})
    assert run(root, tmp_path / "out", again, strict=True).headline == {"accuracy": 25.0}
    assert again.asked == 0


def test_another_models_answers_are_not_taken_for_these(root: Path, tmp_path: Path) -> None:
    run(root, tmp_path / "out", Says(WORDS))
    with pytest.raises(UsageError, match="another run"):
        run(root, tmp_path / "out", Says(WORDS, weights="other"))


def test_shards_become_one_result(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shards = [Says(WORDS), Says(WORDS)]
    for number, says in enumerate(shards):
        assert run(root, out, says, shard=Shard(number, 2)) is None
    last = Says({})
    result = run(root, out, last)
    assert [says.asked for says in (*shards, last)] == [2, 2, 0]
    assert result.headline == {"accuracy": 75.0}


def test_a_question_that_cannot_be_asked_ends_the_run_and_the_rest_is_kept(root: Path, tmp_path: Path) -> None:
    words = {key: word for key, word in WORDS.items() if key != "0"}
    with pytest.raises(EngineError, match="question 0"):
        run(root, tmp_path / "out", Says(words))
    whole = Says(WORDS)
    run(root, tmp_path / "out", whole)
    assert whole.asked == 1


def test_what_was_skipped_is_left_out_and_said(root: Path, tmp_path: Path) -> None:
    words = {key: word for key, word in WORDS.items() if key != "1"}
    result = run(root, tmp_path / "out", Says(words), skip_errors=True)
    assert result.headline == {"accuracy": 100.0}
    assert result.provenance["rows"] == 3
    assert result.notes[0].startswith("1 questions could not be asked")


def test_missing_answers_are_no_score(root: Path) -> None:
    questions = MadeUp().read(root, split=None)
    with pytest.raises(DataError, match="no answer to 0"):
        score_answers(MadeUp(), questions, [], root=root, folder=None)


def test_a_limit_asks_only_the_first(root: Path, tmp_path: Path) -> None:
    says = Says(WORDS)
    assert run(root, tmp_path / "out", says, limit=3).provenance["rows"] == 3
    assert says.asked == 3


def test_the_split_hash_changes_with_what_is_asked_and_not_with_where_it_lies(root: Path, tmp_path: Path) -> None:
    from llava.eval.result import split_hash

    questions = MadeUp().read(root, split=None)
    moved = [Question(q.id, q.prompt, (tmp_path / "x" / q.images[0].name,), {}, 4) for q in questions]
    assert split_hash(questions, tmp_path) == split_hash(moved, tmp_path / "x")
    assert split_hash(questions[:3], tmp_path) != split_hash(questions, tmp_path)


def test_a_figure_that_happens_to_lie_near_the_mean_is_not_taken_for_it(root: Path) -> None:
    class Near(MadeUp):
        def score(self, questions: Sequence[Question], answers: Sequence[AnswerRow], *, strict: bool = False) -> Score:
            score = super().score(questions, answers)
            return Score({"accuracy": 75.00123}, {}, [], "", score.correct)

    questions = MadeUp().read(root, split=None)
    answers = [AnswerRow(key, text) for key, text in WORDS.items()]
    assert score_answers(Near(), questions, answers, root=root, folder=None).interval is None


def test_a_figure_that_is_no_mean_of_the_answers_has_no_interval(root: Path) -> None:
    class Harmonic(MadeUp):
        def score(self, questions: Sequence[Question], answers: Sequence[AnswerRow], *, strict: bool = False) -> Score:
            score = super().score(questions, answers)
            return Score({"accuracy": 12.5}, {}, [], "", score.correct)

    questions = MadeUp().read(root, split=None)
    answers = [AnswerRow(key, text) for key, text in WORDS.items()]
    result = score_answers(Harmonic(), questions, answers, root=root, folder=None)
    assert result.interval is None
    assert result.notes == ["answers right: 75.0%, 95 % interval 50.0% to 100.0%"]
