"""Judges: exact payloads, replies kept, asked once, and never without a key."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from llava.errors import DataError, EngineError, UsageError
from llava.eval.judge import JUDGED, Judge, JudgeRequest, ReplyStore, judge_answers, replies_of
from llava.eval.task import AnswerRow, Question
from tests.eval.judges import judging

QUESTIONS = [Question(str(number), "q", (), {}, 8) for number in range(3)]
ANSWERS = [AnswerRow(question.id, f"answer {question.id}") for question in QUESTIONS]


class Graded:
    """A judged task whose reply must be a digit; it asks up to two more times."""

    name = "graded"

    def judge_requests(self, questions: Sequence[Question], answers: Sequence[AnswerRow]) -> list[JudgeRequest]:
        return [JudgeRequest(answer.question_id, self._payload(answer.text, 0.0)) for answer in answers]

    def ask_again(self, request: JudgeRequest, replies: Sequence[str]) -> JudgeRequest | None:
        if replies[-1].isdigit() or len(replies) == 3:
            return None
        content = request.payload["messages"][0]["content"]
        return JudgeRequest(request.question_id, self._payload(content, 0.5 * len(replies)))

    def _payload(self, content: str, temperature: float) -> dict[str, object]:
        turns = [{"role": "user", "content": content}]
        return {"model": "gpt-4-0613", "max_tokens": 3, "temperature": temperature, "messages": turns}


def test_payloads_go_out_as_they_are_and_replies_come_back_with_the_answers(tmp_path: Path) -> None:
    said: list[str] = []
    with judging(lambda body, before: (200, body["messages"][0]["content"][-1])) as (url, asked):
        judge = Judge(url, key="secret")
        store = ReplyStore(tmp_path / "replies.jsonl")
        judged = judge_answers(Graded(), QUESTIONS, ANSWERS, store=store, judge=judge, say=said.append)
    assert [replies_of(answer, task="graded") for answer in judged] == [("0",), ("1",), ("2",)]
    assert [answer.text for answer in judged] == [answer.text for answer in ANSWERS]
    bodies = sorted(asked, key=lambda body: body["messages"][0]["content"])
    extra = {"key": "Bearer secret", "path": "/v1/chat/completions"}
    assert bodies[0] == {**Graded().judge_requests(QUESTIONS, ANSWERS)[0].payload, **extra}
    assert "3 requests to the judge" in said[0]
    assert "estimated" in said[0]
    # 3,000 tokens in at 30 dollars a million and 300 out at 60
    assert said[1] == "graded: 3,000 tokens in, 300 out, 0.11 US dollars at list price (measured)"
    assert "secret" not in (tmp_path / "replies.jsonl").read_text()


def test_a_second_scoring_asks_nothing_and_a_changed_answer_alone_is_asked_again(tmp_path: Path) -> None:
    path = tmp_path / "replies.jsonl"
    with judging(lambda body, before: (200, str(before))) as (url, asked):
        judge = Judge(url, key="k")
        first = judge_answers(Graded(), QUESTIONS, ANSWERS, store=ReplyStore(path), judge=judge)
        assert judge_answers(Graded(), QUESTIONS, ANSWERS, store=ReplyStore(path)) == first
        changed = [*ANSWERS[:2], AnswerRow("2", "another")]
        with pytest.raises(UsageError, match="1 of 3 answers have no judge's reply"):
            judge_answers(Graded(), QUESTIONS, changed, store=ReplyStore(path))
        second = judge_answers(Graded(), QUESTIONS, changed, store=ReplyStore(path), judge=judge)
        assert len(asked) == 4
    assert second[2].meta[JUDGED] == ("3",)


def test_an_unreadable_reply_is_asked_again_as_the_task_says(tmp_path: Path) -> None:
    with judging(lambda body, before: (200, "five" if body["temperature"] < 0.9 else "5")) as (url, asked):
        judged = judge_answers(
            Graded(), QUESTIONS[:1], ANSWERS[:1], store=ReplyStore(tmp_path / "r.jsonl"), judge=Judge(url, key="k")
        )
    assert judged[0].meta[JUDGED] == ("five", "five", "5")
    assert [body["temperature"] for body in asked] == [0.0, 0.5, 1.0]


def test_a_killed_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path = tmp_path / "replies.jsonl"
    with judging(lambda body, before: (200, str(before))) as (url, asked):
        judge = Judge(url, key="k", concurrency=1)
        judge_answers(Graded(), QUESTIONS, ANSWERS, store=ReplyStore(path), judge=judge)
        whole = path.read_text()
        path.write_text(whole[:-20])
        judge_answers(Graded(), QUESTIONS, ANSWERS, store=ReplyStore(path), judge=judge)
        assert len(asked) == 4
    assert len(path.read_text().splitlines()) == 3
    path.write_text("{}\n")
    with pytest.raises(DataError, match=r"replies\.jsonl:1: no stored reply"):
        ReplyStore(path)


def test_limits_are_waited_out_and_a_refusal_ends_the_run_with_what_there_is(tmp_path: Path) -> None:
    with judging(lambda body, before: (429, "slow down") if before < 2 else (200, "1")) as (url, asked):
        judge = Judge(url, key="k", wait_seconds=0.001, concurrency=1)
        judge_answers(Graded(), QUESTIONS[:1], ANSWERS[:1], store=ReplyStore(tmp_path / "a.jsonl"), judge=judge)
        assert len(asked) == 3
    with judging(lambda body, before: (200, "1") if before == 0 else (401, "bad key")) as (url, asked):
        judge = Judge(url, key="k", wait_seconds=0.001, concurrency=1)
        with pytest.raises(EngineError, match=r"no reply .401: .*bad key.*; those so far are kept"):
            judge_answers(Graded(), QUESTIONS, ANSWERS, store=ReplyStore(tmp_path / "b.jsonl"), judge=judge)
    assert len((tmp_path / "b.jsonl").read_text().splitlines()) == 1


def test_without_a_key_nothing_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(UsageError, match=r"needs a key: set OPENAI_API_KEY .* Nothing was asked"):
        Judge("http://127.0.0.1:9/v1")
    with pytest.raises(UsageError, match="begins with http"):
        Judge("127.0.0.1:9", key="k")


def test_another_model_may_judge(tmp_path: Path) -> None:
    with judging(lambda body, before: (200, "1")) as (url, asked):
        judge = Judge(url, key="k", model="my-judge")
        said: list[str] = []
        store = ReplyStore(tmp_path / "r.jsonl")
        judge_answers(Graded(), QUESTIONS[:1], ANSWERS[:1], store=store, judge=judge, say=said.append)
    assert asked[0]["model"] == "my-judge"
    assert "price of my-judge not known" in said[0]
    assert json.loads(store.path.read_text())["model"] == "judge-1"


def test_an_answer_that_was_not_judged_says_so() -> None:
    with pytest.raises(DataError, match="question 0 was not judged"):
        replies_of(ANSWERS[0], task="graded")
